"""The real Prometheus and its promtool for tests: those in PATH, or Debian's package unpacked into the cache (no root
needed)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_local.ports import pick
from tests.waiting import wait_until

CACHE = Path.home() / ".cache" / "finetune-operator" / "prometheus"


def find_prometheus() -> str | None:
    """Path of the program; None where there is neither it nor Debian's package tools."""
    return _find("prometheus")


def find_promtool() -> str | None:
    """The same for what comes with it."""
    return _find("promtool")


@contextlib.contextmanager
def scraping(targets: list[str], folder: Path, **more: Any) -> Iterator[str]:
    """A Prometheus that scrapes these, or itself where there are none, each second; its URL. `more` is for its scrape
    configuration. Skips the test where it cannot be had."""
    program = find_prometheus()
    if program is None:
        pytest.skip("no prometheus in PATH, and no Debian package tools to get one with")
    (port,) = pick(1)
    settings, log = folder / "prometheus.yml", folder / "prometheus.log"
    scrape = {
        "job_name": "targets",
        "static_configs": [{"targets": targets or [f"127.0.0.1:{port}"]}],
        **more,
    }
    settings.write_text(json.dumps({"global": {"scrape_interval": "1s"}, "scrape_configs": [scrape]}))
    command = [
        program,
        f"--config.file={settings}",
        f"--storage.tsdb.path={folder / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        wait_until(lambda: "ready to receive" in log.read_text(), what="Prometheus is ready")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait(timeout=10)


def _find(name: str) -> str | None:
    if found := shutil.which(name):
        return found
    program = CACHE / "usr" / "bin" / name
    if not os.access(program, os.X_OK):
        _unpack()
    return str(program) if os.access(program, os.X_OK) else None


def _unpack() -> None:
    if not shutil.which("apt-get") or not shutil.which("dpkg-deb"):
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(
            ["apt-get", "-q", "download", "prometheus"],
            cwd=folder, check=False, capture_output=True, timeout=180,
        )  # fmt: skip
        for package in folder.glob("prometheus_*.deb"):
            CACHE.parent.mkdir(parents=True, exist_ok=True)
            unpacked = Path(tempfile.mkdtemp(dir=CACHE.parent))
            subprocess.run(["dpkg-deb", "-x", str(package), str(unpacked)], check=True)
            with contextlib.suppress(OSError):  # another process was faster
                unpacked.rename(CACHE)  # whole or not at all
            shutil.rmtree(unpacked, ignore_errors=True)

"""The real Prometheus and its promtool for tests: those in PATH, or Debian's package unpacked into the cache (no root
needed)."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

CACHE = Path.home() / ".cache" / "finetune-operator" / "prometheus"


def find_prometheus() -> str | None:
    """Path of the program; None where there is neither it nor Debian's package tools."""
    return _find("prometheus")


def find_promtool() -> str | None:
    """The same for what comes with it."""
    return _find("promtool")


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

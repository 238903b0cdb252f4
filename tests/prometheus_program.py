"""The real Prometheus for tests: the one in PATH, or Debian's package unpacked into the cache (no root needed)."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

CACHE = Path.home() / ".cache" / "finetune-operator" / "prometheus"
PROGRAM = Path("usr/bin/prometheus")


def find_prometheus() -> str | None:
    """Path of the program; None where there is neither it nor Debian's package tools."""
    found = shutil.which("prometheus")
    if found:
        return found
    if not os.access(CACHE / PROGRAM, os.X_OK):
        _unpack()
    return str(CACHE / PROGRAM) if os.access(CACHE / PROGRAM, os.X_OK) else None


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
            shutil.rmtree(CACHE, ignore_errors=True)
            unpacked.rename(CACHE)  # whole or not at all

"""The installer of Python packages that this environment has: uv or pip. Both read the user's index settings."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path

from finetune_local import errors


def command() -> list[str]:
    """`uv pip install` or `pip install`, without its arguments. Raises LocalClusterError where there is neither."""
    beside = Path(sys.executable).with_name("uv")
    uv = str(beside) if beside.is_file() else shutil.which("uv")
    if uv is not None:
        return [uv, "pip", "install", "--quiet", "--python", sys.executable]
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    raise errors.LocalClusterError(
        f"neither uv nor pip is there for {sys.executable}",
        remedy=f"Install one: {sys.executable} -m ensurepip",
    )

"""Ctrl-C while a program of ours still loads its modules, which takes a second."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

COMPARE = ("finetune_trainer", "compare", "--base=b", "--adapter=a", "--data=d.jsonl")


@pytest.mark.parametrize(
    ("module", "command", "code"),
    [
        ("typer", ("finetune_cli", "jobs", "list"), -signal.SIGINT),
        ("kopf", ("finetune_operator",), -signal.SIGINT),
        ("uvloop", ("finetune_router",), -signal.SIGINT),
        ("aiohttp", ("finetune_server", "--model=m"), 130),
        ("pydantic", COMPARE, 130),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_ctrl_c_while_modules_are_loaded_is_no_traceback(
    module: str, command: tuple[str, ...], code: int, tmp_path: Path
) -> None:
    (tmp_path / f"{module}.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(300)\n")
    path = os.pathsep.join((str(tmp_path), *filter(None, sys.path)))
    with subprocess.Popen(
        [sys.executable, "-m", *command],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert (process.returncode, told) == (code, "")

"""A stop that comes at an awkward moment is told, and never lost."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer import lifecycle, signals
from finetune_trainer.failures import Stopped

DURING_IMPORTS = """
import os, signal, sys
class Stop:
    def find_spec(self, name, *_):
        if name == "finetune_trainer.lifecycle":
            os.kill(os.getpid(), signal.SIGTERM)
sys.meta_path.insert(0, Stop())
from finetune_trainer.__main__ import main
sys.exit(main(["run", "--run-file", "none.json"]))
"""


@pytest.fixture
def installed() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signals.install()
    yield
    signals.ignore_more()
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_stop_during_the_first_imports_is_told(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", DURING_IMPORTS], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 75, done.stderr
    assert done.stdout.startswith('TRAINER_RESULT {"class": "Preempted"')


def test_a_stop_that_a_library_swallowed_is_found_later(installed: None) -> None:
    signals.check()
    with contextlib.suppress(BaseException):  # as a callback of a weak reference does, and __del__
        os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Stopped):
        signals.check()
    signals.ignore_more()
    signals.check()


def test_no_pause_is_long_once_a_stop_was_noted(installed: None) -> None:
    began = time.monotonic()
    with signals.noted():
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        signals.pause(60)
        signals.pause(60)
    assert time.monotonic() - began < 10


def test_a_second_stop_leaves_nothing_in_the_work_folder(
    installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model takes a while to remove, and hook and kubelet both send SIGTERM."""
    remove = shutil.rmtree

    def stop_and_remove(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        remove(*arguments, **options)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(shutil, "rmtree", stop_and_remove)
    with pytest.raises(Stopped), lifecycle._work_folder():
        os.kill(os.getpid(), signal.SIGTERM)
    assert list(tmp_path.iterdir()) == []


LEFT_RUNNING = """
import multiprocessing, sys, threading
from finetune_trainer import lifecycle
from finetune_trainer.__main__ import main

def run_job(file):
    threading.Thread(target=threading.Event().wait).start()
    multiprocessing.get_context("fork").Process(target=threading.Event().wait).start()
    return 3

lifecycle.run_job = run_job
sys.exit(main(["run"]))
"""


def test_the_command_does_not_wait_for_what_a_reward_function_left_running(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", LEFT_RUNNING], env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    try:
        assert process.wait(60) == 3
    finally:
        process.kill()

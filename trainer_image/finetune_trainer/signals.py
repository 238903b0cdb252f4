"""SIGTERM: at once where there is nothing to save, after the current step where there is.

Kubernetes, Ray and `finetune-trainer stop` all ask a process to end with SIGTERM and kill it after a grace time.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from finetune_trainer.failures import Stopped

POLL = 0.1  # seconds
HASTE = 0.5  # seconds; no pause is longer when the process is about to be killed

_deferred = False
_breakable = False
_requested = False


def install() -> None:
    """Makes SIGTERM and SIGINT end the process with Stopped, from the main thread, wherever it is."""
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    os.register_at_fork(after_in_child=_uninstall)


def _uninstall() -> None:
    """A process that a reward function forks has nothing to save: who terminates it waits for its end."""
    if signal.getsignal(signal.SIGTERM) is _stop:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Code inside that is not ours may set handlers of its own, as ray.init() does, or an alarm that it forgets:
    afterwards they are as before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)}
    timer = signal.getitimer(signal.ITIMER_REAL)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_more() -> None:
    """The result stands: a SIGTERM from here on, such as the one that follows a preStop hook, must not replace the exit
    code. Python gives up its own handlers some time before the process is gone."""
    global _requested
    _requested = False
    if signal.getsignal(signal.SIGTERM) is _stop:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """While inside, SIGTERM only sets `stop_requested`. SIGINT, a person's Ctrl-C, is never put off."""
    global _deferred
    _deferred = True
    try:
        yield
    finally:
        _deferred = False


def check() -> None:
    """Raises Stopped where SIGTERM came: while it was only noted, or in a callback out of which nothing is raised."""
    if _requested:
        raise Stopped(signal.SIGTERM)


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """While inside, SIGTERM is noted, and somebody looks at `stop_requested` after each step, and saves first.

    A stop that nobody looked at any more takes effect at the end.
    """
    with noted():
        yield
    check()


@contextlib.contextmanager
def breakable() -> Iterator[None]:
    """While inside, SIGTERM is not deferred: for work of unknown length that changes nothing."""
    global _breakable
    _breakable = True
    try:
        yield
    finally:
        _breakable = False


def stop_requested() -> bool:
    return _requested


def pause(seconds: float) -> None:
    """Sleeps, and only for a moment where SIGTERM was noted or comes meanwhile."""
    end = time.monotonic() + seconds
    while not _requested and time.monotonic() < end:
        time.sleep(min(seconds, POLL))
    if _requested:
        time.sleep(min(seconds, HASTE))


def _stop(signal_number: int, frame: FrameType | None) -> None:
    global _requested
    if signal_number == signal.SIGTERM:
        _requested = True
    if _breakable or not (_deferred and signal_number == signal.SIGTERM):
        raise Stopped(signal_number)


# ---------------------------------------------------------------- finetune-trainer stop


def pid_file() -> Path:
    return Path(tempfile.gettempdir()) / "finetune-trainer.pid"


@contextlib.contextmanager
def known_process() -> Iterator[None]:
    """Leaves this process' number where `stop_running` of the same container finds it."""
    try:
        pid_file().write_text(str(os.getpid()))
    except OSError as error:  # what needs this folder says so itself
        from finetune_trainer.progress import say  # slow to import, and only wanted here

        say(f"`finetune-trainer stop` will not find this run ({error})", file=sys.stderr)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            pid_file().unlink(missing_ok=True)


def stop_running(*, patience: float) -> bool:
    """Asks the trainer in this container to stop; says whether none runs any more, after `patience` seconds at most.

    For a preStop hook: where a pod is deleted, Ray kills what runs in it within a second, too soon for a checkpoint.
    The hook runs before that, within the pod's grace time.
    """
    deadline, asked = time.monotonic() + patience, False
    while (pid := _running()) is not None:
        if not asked:
            os.kill(pid, signal.SIGTERM)
            asked = True
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL)
    return True


def _running() -> int | None:
    """The trainer's process; None when it ended, also when it was killed and its number is another process' now."""
    try:
        pid = int(pid_file().read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError):
        return None
    return pid if b"finetune" in command else None

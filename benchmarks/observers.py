"""Watching the training process of a FineTuneJob from outside."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import psutil

POLL = 0.1  # seconds; how exactly the first step is seen


class Observer:
    """When the log of a job's training process shows step 1, and its peak memory.

    The job's status cannot tell: it is written every few seconds only.
    """

    def __init__(self, started: float) -> None:
        self.first_step_at: float | None = None
        self.peak_rss_bytes = 0
        self._started = started
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Observer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        process: psutil.Process | None = None
        while not self._stop.wait(POLL):
            process = process if process and process.is_running() else self._find()
            if process is None:
                continue
            # The process may end between any two of these reads; what was seen before stays.
            with contextlib.suppress(OSError):
                self._look_at(Path("/proc") / str(process.pid))

    def _look_at(self, proc: Path) -> None:
        self.peak_rss_bytes = max(self.peak_rss_bytes, peak_rss((proc / "status").read_text()))
        if self.first_step_at is None and "\nstep 1/" in (proc / "fd" / "1").read_text(errors="replace"):
            self.first_step_at = time.time()

    def _find(self) -> psutil.Process | None:
        """The trainer: a Python process whose program is finetune-trainer, younger than the job."""
        for process in psutil.process_iter(["cmdline", "create_time"]):
            words = process.info["cmdline"] or []
            names = [Path(word).name for word in words[:4]]
            # Linux keeps start times in hundredths of a second.
            if process.info["create_time"] >= self._started - 0.02 and is_trainer(names):
                return process
        return None


def is_trainer(names: list[str]) -> bool:
    """Whether a command line's first words (file names) are `finetune-trainer run`, not a shell around it."""
    return (
        names[:1] != ["sh"]
        and ("finetune-trainer" in names or "finetune_trainer" in names)
        and "run" in names
    )


def peak_rss(status: str) -> int:
    """VmHWM of /proc/<pid>/status in bytes: the same number as ru_maxrss of the plain script."""
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), "VmHWM: 0 kB")
    return int(line.split()[1]) * 1024


def peak_rss_of(pid: int) -> int:
    """The same of a process that runs."""
    return peak_rss(Path(f"/proc/{pid}/status").read_text())

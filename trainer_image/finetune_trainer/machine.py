"""What trainer and engine have in common: the libraries' environment, and the cores. Imports nothing heavy."""

from __future__ import annotations

import os
from pathlib import Path


def prepare_libraries() -> None:
    """Sets what the libraries read when they are imported; must run before them."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # A waiting OpenMP thread must give its core away soon: where other processes share the cores, spinning for long
    # costs a time slice (10 ms) per operation. Not at once, though: on cores of its own that costs 15 % of the speed.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def count_cores() -> tuple[int, str]:
    """Returns the cores that this process may use, a container's CPU limit included, and what sets their number."""
    cores = len(os.sched_getaffinity(0))
    quota = _read_cgroup_quota(Path("/sys/fs/cgroup/cpu.max"))
    return (quota, "cgroup quota") if quota is not None and quota < cores else (cores, "CPU affinity")


def _read_cgroup_quota(path: Path) -> int | None:
    """Returns whole cores of the cgroup's quota (version 2), None without a limit."""
    try:
        quota, period = path.read_text().split()
        return None if quota == "max" else max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return None

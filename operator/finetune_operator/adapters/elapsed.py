"""A clock that nobody sets and that goes on while the process is stopped and the machine sleeps."""

from __future__ import annotations

import time

# Linux leaves sleep out of CLOCK_MONOTONIC and counts it in CLOCK_BOOTTIME.
_WITH_SLEEP = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


def seconds() -> float:
    """Seconds since a moment that is the same for the life of the process."""
    return time.clock_gettime(_WITH_SLEEP)

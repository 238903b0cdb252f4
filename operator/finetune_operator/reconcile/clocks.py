"""The time of day, without its jumps."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime

SLEW = 0.05  # seconds of a difference that are made up for per second


class SteadyClock:
    """UTC that never goes back and never jumps. When somebody sets the machine's clock, deadlines and silences must not
    grow or shrink by that: the difference is made up for slowly, so that recorded times come right again."""

    def __init__(
        self, *, wall: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic
    ) -> None:
        self._wall = wall
        self._steady = steady
        self._now, self._at = wall(), steady()

    def __call__(self) -> datetime:
        at = self._steady()
        elapsed = at - self._at
        even = self._now + elapsed
        most = SLEW * elapsed
        self._now = even + max(-most, min(most, self._wall() - even))
        self._at = at
        return datetime.fromtimestamp(self._now, UTC)

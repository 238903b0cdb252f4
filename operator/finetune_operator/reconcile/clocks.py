"""The operator's time of day: one that does not jump while the process lives.

What is stored are times of day, what is decided are durations. A wall clock that is set while the operator runs would
end deadlines early or keep jobs waiting, so it is read once, and the kernel's own count goes on from there. Both
notice a machine that sleeps; silence from that time says nothing of a trainer, which slept as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from finetune_operator.adapters.elapsed import seconds as seconds_with_sleep

SLEPT_SECONDS = 5.0  # a sleep of this length is one; the two counts differ by microseconds otherwise


class SteadyClock:
    """Calling it gives the time. `wall`, `elapsed` (seconds, with sleep) and `awake` (without) are read from the
    kernel; only tests set them."""

    def __init__(
        self,
        *,
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
        elapsed: Callable[[], float] = seconds_with_sleep,
        awake: Callable[[], float] = time.monotonic,
    ) -> None:
        self._elapsed = elapsed
        self._awake = awake
        self._start = wall()
        self._start_elapsed = elapsed()
        self._slept = self._start_elapsed - awake()
        self._listening_since = self._start

    def __call__(self) -> datetime:
        return self._start + timedelta(seconds=self._elapsed() - self._start_elapsed)

    def begin_to_listen(self) -> None:
        """From now on trainers can be heard: this process leads."""
        self._listening_since = self()

    def listening_since(self) -> datetime:
        """Since when this process has been awake without a break: before that, nobody could be heard."""
        slept = self._elapsed() - self._awake()
        if slept - self._slept >= SLEPT_SECONDS:
            self._listening_since = self()
        self._slept = slept
        return self._listening_since


CLOCK = SteadyClock()
"""That of this process."""

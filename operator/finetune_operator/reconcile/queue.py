"""A keyed work queue, as controllers have it: one worker per key at a time, duplicates merged, errors back off.

Cost follows changes: a key that nobody adds costs nothing. Times are in seconds of the event loop's clock.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import logging
import random
import time
from collections.abc import Awaitable, Callable
from enum import IntEnum
from typing import TypeAlias

logger = logging.getLogger(__name__)

Key: TypeAlias = tuple[str, str]
"""Namespace and name."""
Worker: TypeAlias = Callable[[Key], Awaitable[float | None]]
"""Handles one key; returns the seconds after which it wants to see the key again, or None. Zero means now, while what
it has read and written is fresh: such passes follow each other without a turn in the queue, but for every eighth."""

FIRST_BACKOFF = 0.5
LAST_BACKOFF = 60.0
LAST_ORDINARY_BACKOFF = 10.0  # an API server that is away, busy or refuses says nothing about the key
CONCURRENCY = 96  # passes at once: with fewer, new jobs wait for those who create others (docs/benchmarks.md)
ORDINARY_CONCURRENCY = 16  # the same of those of ORDINARY priority: with more, fewer wishes are merged
STEPS = 8  # passes over one key after which others have their turn


class Priority(IntEnum):
    """Which of the keys that are due come first. All but ORDINARY are due at once."""

    FIRST = 0
    EARLY = 1
    ORDINARY = 2


class KeyedQueue:
    """Runs `worker` for every key that is added, at most `concurrency` at once and never twice at once for one key. Of
    these, at most `ordinary_concurrency` are passes of ORDINARY priority, so that others find a place at once.

    Errors of the `ordinary` kinds are a line in the log, ever more seldom, and are tried again sooner than others."""

    def __init__(
        self,
        worker: Worker,
        *,
        concurrency: int = CONCURRENCY,
        ordinary_concurrency: int = ORDINARY_CONCURRENCY,
        ordinary: type[Exception] | tuple[type[Exception], ...] = (),
    ) -> None:
        self._worker = worker
        self._ordinary = ordinary
        self._concurrency = concurrency
        self._ordinary_concurrency = ordinary_concurrency
        self._due: dict[Key, float] = {}
        self._heap: list[tuple[Priority, float, int, Key]] = []
        self._priorities: dict[Key, Priority] = {}  # of those that are not ORDINARY
        self._order = itertools.count()
        self._failures: dict[Key, int] = {}
        self._started: dict[Key, float] = {}
        self._ordinary_passes: set[Key] = set()  # of those that are started
        self._moved = float("-inf")
        self._changed = asyncio.Event()
        self._jitter = random.Random()  # noqa: S311 - spreads load, protects nothing

    def add(self, key: Key, *, after: float = 0.0, priority: Priority = Priority.ORDINARY) -> None:
        """Ask for a pass over the key in `after` seconds; of several wishes the earliest counts, and the highest
        priority."""
        now = asyncio.get_running_loop().time()
        is_ordinary = priority is Priority.ORDINARY
        when = now + max(after, 0.0) if is_ordinary else now
        known = self._due.get(key)
        if known is not None and known <= when:
            if priority >= self._priorities.get(key, Priority.ORDINARY):
                return
            when = known
        if not is_ordinary:
            self._priorities[key] = priority
        self._due[key] = when
        heapq.heappush(self._heap, (priority, when, next(self._order), key))
        self._changed.set()

    def depth(self) -> int:
        """Keys that are due and wait for their pass; those that are to be looked at later do not. For any thread."""
        now = time.monotonic()  # what the event loop's clock is, without a loop
        return sum(when <= now for when in list(self._due.values()))

    def longest_running(self) -> float:
        """Seconds since the start of the longest pass that is under way; 0 when none is."""
        now = asyncio.get_running_loop().time()
        return max((now - started for started in self._started.values()), default=0.0)

    def standing_still(self) -> float:
        """Seconds for which a key has been due while no pass began or ended; 0 when nothing is due."""
        now = asyncio.get_running_loop().time()
        due = min((when for key, when in self._due.items() if key not in self._started), default=now)
        return max(0.0, now - max(due, self._moved))

    async def run(self) -> None:
        """Serve the queue until cancelled; passes under way are cancelled with it."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._changed.clear()
                delay = self._start_due(group)
                try:
                    await asyncio.wait_for(self._changed.wait(), timeout=delay)
                except TimeoutError:
                    continue

    def _start_due(self, group: asyncio.TaskGroup) -> float | None:
        """Start what is due; return the seconds to the next due key, None when only a change can bring work."""
        now = asyncio.get_running_loop().time()
        blocked: list[tuple[Priority, float, int, Key]] = []
        delay: float | None = None
        while self._heap and len(self._started) < self._concurrency:
            priority, when, _, key = self._heap[0]
            if self._due.get(key) != when:  # replaced by an earlier wish, or one of higher priority
                heapq.heappop(self._heap)
                continue
            if when > now:
                delay = when - now
                break
            is_ordinary = priority is Priority.ORDINARY
            if is_ordinary and len(self._ordinary_passes) >= self._ordinary_concurrency:
                break  # all that comes after it is ordinary too
            first = heapq.heappop(self._heap)
            if key in self._started:  # its worker wakes us when it is done
                blocked.append(first)
                continue
            del self._due[key]
            self._priorities.pop(key, None)
            if is_ordinary:
                self._ordinary_passes.add(key)
            self._started[key] = self._moved = now
            group.create_task(self._serve(key))
        for item in blocked:
            heapq.heappush(self._heap, item)
        return delay

    async def _serve(self, key: Key) -> None:
        try:
            for _ in range(STEPS):
                again = await self._worker(key)
                if again != 0:
                    break
                self._started[key] = self._moved = asyncio.get_running_loop().time()
                if self._due.get(key, float("inf")) <= self._moved:
                    del self._due[key]  # the next pass sees what was asked for until now
                    self._priorities.pop(key, None)
        except self._ordinary as error:
            again = self._backoff(key, most=LAST_ORDINARY_BACKOFF)
            failures = self._failures[key]
            # The 1st, 2nd, 4th, ...: it may last for hours, and concern all keys.
            if failures.bit_count() == 1:
                logger.warning("reconcile of %s/%s has to wait (failure %d): %s", *key, failures, error)
        except Exception:  # the border of a pass: any fault is logged, and the key comes back later
            again = self._backoff(key, most=LAST_BACKOFF)
            logger.exception("reconcile of %s/%s failed; again in %.1f s", *key, again)
        else:
            self._failures.pop(key, None)
        finally:
            self._started.pop(key, None)
            self._ordinary_passes.discard(key)
            self._moved = asyncio.get_running_loop().time()
            self._changed.set()
        if again is not None:
            self.add(key, after=again)

    def _backoff(self, key: Key, *, most: float) -> float:
        """Exponential with full jitter on the upper half, so that keys that failed together do not return together."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        ceiling: float = min(most, FIRST_BACKOFF * 2.0 ** min(failures, 20))
        return ceiling * self._jitter.uniform(0.5, 1.0)

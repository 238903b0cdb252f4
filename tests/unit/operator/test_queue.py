"""The work queue: merging, exclusion per key, order of delays, and backing off."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from finetune_operator.reconcile.queue import (
    FIRST_BACKOFF,
    LAST_ORDINARY_BACKOFF,
    STEPS,
    Key,
    KeyedQueue,
    Priority,
    Worker,
)
from tests.waiting import until

A, B = ("ns", "a"), ("ns", "b")


class AwayError(Exception):
    """The API server's."""


async def away(key: Key) -> None:
    raise AwayError


@asynccontextmanager
async def running(worker: Worker, concurrency: int = 8) -> AsyncIterator[KeyedQueue]:
    queue = KeyedQueue(worker, concurrency=concurrency)
    task = asyncio.create_task(queue.run())
    try:
        yield queue
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_wishes_for_one_key_are_merged() -> None:
    seen: list[Key] = []

    async def worker(key: Key) -> None:
        seen.append(key)

    async with running(worker) as queue:
        for _ in range(100):
            queue.add(A)
        await until(lambda: bool(seen))
        await asyncio.sleep(0.05)
    assert seen == [A]


async def test_a_key_is_never_worked_on_twice_at_once_and_no_wish_is_lost() -> None:
    active: set[Key] = set()
    passes = 0

    async def worker(key: Key) -> None:
        nonlocal passes
        assert key not in active
        active.add(key)
        await asyncio.sleep(0.02)
        active.remove(key)
        passes += 1

    async with running(worker) as queue:
        queue.add(A)
        await until(lambda: bool(active))
        queue.add(A)  # while the first pass is under way
        await until(lambda: passes == 2)
        await asyncio.sleep(0.05)
    assert passes == 2


async def test_other_keys_go_on_while_one_is_slow() -> None:
    seen: list[Key] = []

    async def worker(key: Key) -> None:
        if key == A:
            await asyncio.sleep(10)
        seen.append(key)

    async with running(worker, concurrency=2) as queue:
        queue.add(A)
        queue.add(A, after=0.01)
        queue.add(B)
        await until(lambda: bool(seen))
        await asyncio.sleep(0.06)
        assert queue.longest_running() > 0.05
    assert seen == [B]


async def test_of_two_delays_the_earlier_counts() -> None:
    seen: list[Key] = []

    async def worker(key: Key) -> None:
        seen.append(key)

    async with running(worker) as queue:
        queue.add(A, after=30)
        queue.add(A, after=0.02)
        queue.add(A, after=40)
        await until(lambda: bool(seen))
    assert seen == [A]


async def test_a_requeue_is_obeyed() -> None:
    passes = 0

    async def worker(key: Key) -> float | None:
        nonlocal passes
        passes += 1
        return 0.01 if passes < 4 else None

    async with running(worker) as queue:
        queue.add(A)
        await until(lambda: passes == 4)
        await asyncio.sleep(0.05)
    assert passes == 4


async def test_a_failing_key_comes_back_ever_later_and_stops_no_other() -> None:
    loop = asyncio.get_running_loop()
    times: list[float] = []
    others = 0

    async def worker(key: Key) -> None:
        nonlocal others
        if key == B:
            others += 1
            return
        times.append(loop.time())
        raise RuntimeError("broken")

    async with running(worker) as queue:
        queue.add(A)
        while len(times) < 3:
            queue.add(B)
            await asyncio.sleep(0.05)
    first, second = times[1] - times[0], times[2] - times[1]
    assert first >= FIRST_BACKOFF / 2
    assert second >= FIRST_BACKOFF
    assert others > 1


async def test_at_most_concurrency_passes_run_at_once() -> None:
    active = most = done = 0

    async def worker(key: Key) -> None:
        nonlocal active, most, done
        active += 1
        most = max(most, active)
        await asyncio.sleep(0.01)
        active -= 1
        done += 1

    async with running(worker, concurrency=3) as queue:
        for i in range(20):
            queue.add(("ns", str(i)))
        await until(lambda: done == 20)
    assert most == 3


async def test_ordinary_passes_leave_places_for_those_of_higher_priority() -> None:
    active: set[Key] = set()
    most, release = 0, asyncio.Event()
    ordinary = [("ns", str(number)) for number in range(6)]

    async def worker(key: Key) -> None:
        nonlocal most
        active.add(key)
        most = max(most, len(active.intersection(ordinary)))
        await release.wait()
        active.remove(key)

    queue = KeyedQueue(worker, concurrency=4, ordinary_concurrency=2)
    task = asyncio.create_task(queue.run())
    for key in ordinary:
        queue.add(key)
    await until(lambda: len(active) == 2)
    for key in (A, B, ("ns", "c")):
        queue.add(key, priority=Priority.EARLY)
    await until(lambda: len(active) == 4)
    assert active == {*ordinary[:2], A, B}, "no more than all places"
    release.set()
    await until(lambda: not active and queue.depth() == 0)
    assert most == 2, "the places of the others are not for them, not even in the end"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_queue_in_which_nothing_moves_says_for_how_long() -> None:
    stop = asyncio.Event()

    async def worker(key: Key) -> None:
        await stop.wait()

    async with running(worker, concurrency=1) as queue:
        queue.add(A)
        await until(lambda: queue.longest_running() > 0)
        queue.add(B)
        await asyncio.sleep(0.1)
        assert queue.standing_still() >= 0.09
        stop.set()
        await until(lambda: queue.longest_running() == 0)
        assert queue.standing_still() == 0


async def test_a_key_that_is_due_later_is_no_standstill_and_no_backlog() -> None:
    """Each deployment that serves, and each job that trains, is to be looked at some time."""
    stop = asyncio.Event()

    async def worker(key: Key) -> None:
        await stop.wait()

    async with running(worker, concurrency=1) as queue:
        queue.add(A, after=100)
        await asyncio.sleep(0.02)
        assert queue.standing_still() == 0
        assert await asyncio.to_thread(queue.depth) == 0
        queue.add(B)
        await until(lambda: queue.longest_running() > 0)
        queue.add(("ns", "c"))
        assert await asyncio.to_thread(queue.depth) == 1
        stop.set()


async def test_an_api_server_that_is_away_is_no_reason_for_long_waits() -> None:
    queue = KeyedQueue(away, ordinary=AwayError)
    for _ in range(20):
        assert queue._backoff(A, most=LAST_ORDINARY_BACKOFF) <= LAST_ORDINARY_BACKOFF
    task = asyncio.create_task(queue.run())
    queue.add(B)
    await until(lambda: B in queue._failures)
    assert not task.done()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_an_outage_of_hours_is_a_few_lines_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    queue = KeyedQueue(away, ordinary=AwayError)
    for _ in range(500):
        await queue._serve(A)
    assert [record.args[2] for record in caplog.records if isinstance(record.args, tuple)] == [
        2**n for n in range(9)
    ]


async def test_a_pass_that_goes_on_at_once_keeps_its_turn_for_a_while() -> None:
    seen: list[Key] = []

    async def worker(key: Key) -> float | None:
        seen.append(key)
        await asyncio.sleep(0)
        if key == A and seen.count(A) < STEPS + 2:
            queue.add(A)  # what it wrote comes back as an event
            return 0.0
        return None

    async with running(worker, concurrency=1) as queue:
        queue.add(A)
        queue.add(B)
        await until(lambda: seen.count(A) == STEPS + 2)
        await asyncio.sleep(0.05)
    assert seen == [A] * STEPS + [B] + [A] * 2, "no pass too many, and the others have their turn"


async def test_of_what_is_due_the_highest_priority_comes_first_whatever_waits() -> None:
    seen: list[Key] = []
    keys = [("ns", f"{number}") for number in range(5)]

    async def worker(key: Key) -> None:
        seen.append(key)
        await asyncio.sleep(0.02)

    async with running(worker, concurrency=1) as queue:
        for key in keys:
            queue.add(key)
        await until(lambda: len(seen) == 1)
        queue.add(keys[4], priority=Priority.EARLY)
        queue.add(keys[3], priority=Priority.FIRST)  # it waits already
        queue.add(keys[3], priority=Priority.EARLY)
        queue.add(A, after=3600)
        queue.add(A, priority=Priority.FIRST)  # it would have come much later
        queue.add(keys[0], priority=Priority.FIRST)  # its pass is under way
        assert 0 <= queue.standing_still() < 5
        await until(lambda: len(seen) == 7)
        await asyncio.sleep(0.05)
    order = [keys[0], keys[3], A, keys[0], keys[4], keys[1], keys[2]]
    assert seen == order, "each once, and none is lost"

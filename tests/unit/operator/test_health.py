"""What /healthz says of an operator that does not get on, and of one that does."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, cast

import aiohttp
import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry

from finetune_operator import health
from finetune_operator.adapters.telemetry import Telemetry
from finetune_operator.health import Health
from finetune_operator.parts import Rollouts
from finetune_operator.reconcile.queue import Key, KeyedQueue, Worker

A, B = ("ns", "a"), ("ns", "b")
Probe = Callable[[], Awaitable[tuple[int, str]]]


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "STUCK_SECONDS", 0.5)


@contextlib.asynccontextmanager
async def probed(looked_at: Health) -> AsyncIterator[Probe]:
    """Asks /healthz over HTTP, as a kubelet does."""
    runner = web.AppRunner(looked_at.application(), shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}/healthz"
    async with aiohttp.ClientSession() as session:

        async def probe() -> tuple[int, str]:
            async with session.get(url) as answer:
                return answer.status, await answer.text()

        yield probe
    await runner.cleanup()


def made(*queues: KeyedQueue) -> Health:
    looked_at = Health(Telemetry(CollectorRegistry()))
    looked_at.queues = queues
    return looked_at


@contextlib.asynccontextmanager
async def running(worker: Worker, **options: Any) -> AsyncIterator[KeyedQueue]:
    queue = KeyedQueue(worker, **options)
    task = asyncio.create_task(queue.run())
    try:
        yield queue
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def becomes(probe: Probe, status: int) -> str:
    """The text of the first answer with this status."""
    async with asyncio.timeout(10):
        while (answer := await probe())[0] != status:
            await asyncio.sleep(0.02)
    return answer[1]


async def test_a_pass_that_hangs_fails_the_probe_until_it_ends() -> None:
    released = asyncio.Event()

    async def worker(key: Key) -> None:
        if key == A:
            await released.wait()

    async with running(worker) as queue, probed(made(queue)) as probe:
        assert await probe() == (200, "ok\n")
        queue.add(A)
        assert "a reconcile pass has been running for" in await becomes(probe, 500)
        queue.add(B)  # others that get on are no excuse
        await asyncio.sleep(0.05)
        assert (await probe())[0] == 500
        released.set()
        await becomes(probe, 200)


async def test_each_queue_is_looked_at() -> None:
    async def quick(key: Key) -> None:
        del key

    async def hanging(key: Key) -> None:
        await asyncio.sleep(3600)

    async with running(quick) as first, running(hanging) as second, probed(made(first, second)) as probe:
        second.add(A)
        await becomes(probe, 500)


async def test_a_queue_that_nobody_serves_fails_the_probe() -> None:
    async def worker(key: Key) -> None:
        del key

    queue = KeyedQueue(worker)
    async with probed(made(queue)) as probe:
        queue.add(A, after=0.5)
        await asyncio.sleep(0.4)
        assert (await probe())[0] == 200, "nothing is due yet"
        assert "no pass has begun or ended" in await becomes(probe, 500)


async def test_much_to_do_is_no_problem_while_passes_end() -> None:
    """Keys are due for much longer than the limit, as there are more than can be served."""

    async def worker(key: Key) -> float:
        await asyncio.sleep(0.02)
        return 0.0

    async with running(worker, concurrency=1) as queue, probed(made(queue)) as probe:
        for number in range(100):
            queue.add(("ns", str(number)))
        for _ in range(24):
            await asyncio.sleep(0.05)
            assert await probe() == (200, "ok\n")


async def test_passes_that_fail_are_no_problem_of_the_process() -> None:
    async def worker(key: Key) -> None:
        raise RuntimeError(key)

    async with running(worker) as queue, probed(made(queue)) as probe:
        queue.add(A)
        await asyncio.sleep(0.8)
        assert await probe() == (200, "ok\n")


async def test_a_stand_by_has_no_queues_and_is_well() -> None:
    async with probed(made()) as probe:
        assert await probe() == (200, "ok\n")


async def test_a_loop_that_ends_is_named() -> None:
    looked_at = made()
    go_on = asyncio.Event()

    async def failing() -> None:
        await go_on.wait()
        raise OSError("no such file")

    task = looked_at.look_after(failing(), name="certificates")
    async with probed(looked_at) as probe:
        assert (await probe())[0] == 200
        go_on.set()
        await asyncio.wait([task])
        assert await probe() == (500, "the loop certificates has ended: OSError: no such file\n")


def block(seconds: float) -> None:
    time.sleep(seconds)


async def test_the_lateness_of_the_event_loop_is_measured(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(health, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(health, "BLOCKED_SECONDS", 0.2)
    monkeypatch.setattr("sys.stderr", open(2, "w", closefd=False))  # noqa: SIM115, ASYNC230 - it must have a number
    registry = CollectorRegistry()
    beating = asyncio.create_task(Health(Telemetry(registry)).beat())
    await asyncio.sleep(0.1)
    block(0.5)
    await asyncio.sleep(0.01)
    lag = registry.get_sample_value("finetune_event_loop_lag_seconds")
    assert lag is not None
    assert lag > 0.3
    beating.cancel()
    assert "in block" in capfd.readouterr().err, "the log must name what has blocked the loop"


@pytest.mark.parametrize("part", ["queue", "fleet", "orphans"])
async def test_a_part_of_the_rollouts_that_fails_ends_all(part: str) -> None:
    class Part:
        def __init__(self, fails: bool) -> None:
            self._fails = fails

        async def start(self) -> None:
            return

        async def run(self) -> None:
            await asyncio.sleep(0.01 if self._fails else 3600)
            raise RuntimeError(part)

    names = ("queue", "watchlist", "publisher", "fleet", "orphans")
    rollouts = Rollouts(**{name: cast("Any", Part(name == part)) for name in names})
    with pytest.raises(ExceptionGroup) as ended:
        async with asyncio.timeout(10):
            await rollouts.run()
    assert [str(error) for error in ended.value.exceptions] == [part]

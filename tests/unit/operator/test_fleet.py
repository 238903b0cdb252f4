"""Pushing to and polling of routers: real HTTP servers that keep, break or bend the contract."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from finetune_operator.adapters import addresses, fetching
from finetune_operator.adapters.addresses import Resolver, UnknownHostError
from finetune_operator.adapters.routers import Refused, Routers
from finetune_operator.api.routes import COUNTERS_PATH, ROUTES_PATH, Snapshot
from finetune_operator.manifests.routes import to_text
from finetune_operator.reconcile.fleet import Fleet
from tests.waiting import until


class Router:
    """A router of the contract. `delay`: seconds before each answer; `broken`: status of each answer."""

    def __init__(self) -> None:
        self.version = 0
        self.delay = 0.0
        self.broken: int | None = None
        self.answer: dict[str, Any] = {}
        self.puts: list[int] = []
        self.url = ""

    async def put(self, request: web.Request) -> web.Response:
        await asyncio.sleep(self.delay)
        if self.broken:
            return web.Response(status=self.broken)
        version = Snapshot.model_validate_json(await request.read()).version
        self.puts.append(version)
        if version < self.version:
            return web.json_response({}, status=409)
        self.version = version
        return await self.get(request)

    async def get(self, _: web.Request) -> web.Response:
        return web.json_response({"instance": self.url, "version": self.version})

    async def counters(self, _: web.Request) -> web.Response:
        await asyncio.sleep(self.delay)
        if self.broken:
            return web.Response(status=self.broken)
        return web.json_response({"instance": self.url, "version": self.version, **self.answer})


@asynccontextmanager
async def routers(count: int) -> AsyncIterator[tuple[list[Router], Fleet]]:
    made = [Router() for _ in range(count)]
    runners = []
    for router in made:
        application = web.Application()
        application.router.add_put(ROUTES_PATH, router.put)
        application.router.add_get(ROUTES_PATH, router.get)
        application.router.add_get(COUNTERS_PATH, router.counters)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        router.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        runners.append(runner)
    async with fetching.open_session() as session:
        fleet = Fleet(Routers(session, Resolver(), [router.url for router in made]))
        polling = asyncio.create_task(fleet.run())
        try:
            yield made, fleet
        finally:
            polling.cancel()
            await asyncio.gather(polling, return_exceptions=True)
            for runner in runners:
                await runner.cleanup()


def snapshot(version: int) -> bytes:
    return to_text(Snapshot(version=version)).encode()


async def test_a_slow_router_does_not_delay_the_others() -> None:
    async with routers(3) as (made, fleet):
        await until(lambda: len(fleet.replicas) == 3)
        made[1].delay = 1.5
        began = asyncio.get_running_loop().time()
        fleet.offer(7, snapshot(7))
        await until(lambda: made[0].version == made[2].version == 7)
        assert asyncio.get_running_loop().time() - began < 1
        assert fleet.count_applying(7) < 3
        await until(lambda: fleet.count_applying(7) == 3)


async def test_a_router_that_refuses_is_tried_until_it_takes_it() -> None:
    async with routers(2) as (made, fleet):
        made[0].broken = 500
        fleet.offer(3, snapshot(3))
        await until(lambda: made[1].version == 3 and bool(fleet.silent()))
        assert fleet.last_heard() is None, "one of them was never heard"
        (silent,) = fleet.silent()
        assert "500" in silent
        made[0].broken = None
        await until(lambda: fleet.count_applying(3) == 2)
        await until(lambda: fleet.last_heard() is not None)
        assert fleet.silent() == ()


async def test_a_router_that_lost_its_snapshot_gets_it_again() -> None:
    async with routers(1) as (made, fleet):
        fleet.offer(3, snapshot(3))
        await until(lambda: fleet.count_applying(3) == 1)
        made[0].version = 0
        fleet.hurry = True
        fleet.poll_soon()
        await until(lambda: made[0].version == 3)
        assert made[0].puts == [3, 3]


async def test_a_fault_of_ours_does_not_keep_a_router_on_an_old_snapshot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with routers(1) as (made, fleet):
        fleet.offer(3, snapshot(3))
        await until(lambda: fleet.count_applying(3) == 1)
        with monkeypatch.context() as broken:
            broken.setattr(Routers, "push", None)
            fleet.offer(4, snapshot(4))
            task = fleet.replicas[0].task
            assert task is not None
            await until(task.done)
        await until(lambda: made[0].version == 4)


async def test_a_push_whose_answer_is_lost_does_not_outdate_the_answer_of_a_poll(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with routers(1) as (made, fleet):
        await until(lambda: len(fleet.replicas) == 1 and fleet.polls > 0)
        refused = asyncio.Event()

        async def lost(self: Routers, url: str, body: bytes) -> Refused:
            refused.set()
            await asyncio.sleep(0)
            return Refused("no answer")

        monkeypatch.setattr(Routers, "push", lost)
        counters = Routers.counters

        async def during_a_push(self: Routers, url: str) -> Any:
            made[0].version = 3
            fleet.offer(3, snapshot(3))
            await refused.wait()
            return await counters(self, url)

        monkeypatch.setattr(Routers, "counters", during_a_push)
        await fleet.poll()
        assert fleet.count_applying(3) == 1


async def test_a_router_with_a_newer_snapshot_is_told_of() -> None:
    async with routers(1) as (made, fleet):
        newer: list[int] = []
        fleet.on_newer = newer.append
        made[0].version = 12
        fleet.offer(3, snapshot(3))
        await until(lambda: bool(newer))
        assert set(newer) == {12}
        assert fleet.highest == 12
        fleet.offer(13, snapshot(13))
        await until(lambda: fleet.count_applying(13) == 1)


@pytest.mark.parametrize(
    "epochs",
    [
        [{"epoch": "e", "arms": [{"alias": "a", "arm": "Stable", "revision": "r", "requests": -1}]}],
        [{"epoch": "e", "arms": [{"alias": "a", "arm": "Middle", "revision": "r"}]}],
        [{"epoch": "e", "arms": [{"alias": "a", "arm": "Stable", "revision": "r", "seconds": {"n": -3}}]}],
        "none",
    ],
)
async def test_counters_that_cannot_be_are_not_taken(epochs: Any) -> None:
    async with routers(1) as (made, fleet):
        made[0].answer = {"epochs": epochs}
        await fleet.poll()
        assert fleet.counters() == []
        assert fleet.last_heard() is None
        made[0].answer = {}
        await fleet.poll()
        assert len(fleet.counters()) == 1


async def test_numbers_that_json_does_not_have_make_an_answer_void() -> None:
    async def nan(_: web.Request) -> web.Response:
        arms = '[{"alias":"a","arm":"Stable","revision":"r","seconds":{"n":1,"sum":NaN,"sumSquares":1}}]'
        body = f'{{"instance":"i","version":1,"epochs":[{{"epoch":"e","arms":{arms}}}]}}'
        return web.Response(text=body, content_type="application/json")

    application = web.Application()
    application.router.add_get(COUNTERS_PATH, nan)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    async with fetching.open_session() as session:
        assert isinstance(await Routers(session, Resolver(), [url]).counters(url), Refused)
    await runner.cleanup()


FOUND = {
    "one": [(socket.AF_INET, "10.0.0.1")],
    "three": [(socket.AF_INET, f"10.0.0.{n}") for n in (3, 1, 2)],
    "dual": [(socket.AF_INET, "10.0.0.1"), (socket.AF_INET6, "fd00::1")],
    "six": [(socket.AF_INET6, "fd00::2"), (socket.AF_INET6, "fd00::1")],
}


@pytest.mark.parametrize(
    ("host", "urls"),
    [
        ("one", ("http://one:8081",)),
        ("three", ("http://10.0.0.1:8081", "http://10.0.0.2:8081", "http://10.0.0.3:8081")),
        ("dual", ("http://dual:8081",)),
        ("six", ("http://[fd00::1]:8081", "http://[fd00::2]:8081")),
    ],
)
def test_a_name_with_several_addresses_is_several_processes(host: str, urls: tuple[str, ...]) -> None:
    found = [(int(family), address) for family, address in FOUND[host]]
    assert addresses.urls_of(f"http://{host}:8081", found) == urls


async def test_a_name_without_an_address_is_told_and_a_known_one_stays_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    resolver = Resolver()
    with pytest.raises(UnknownHostError, match="nowhere"):
        await resolver.spread("http://nowhere.invalid:8081")
    assert await resolver.spread("https://engine:8000") == ("https://engine:8000",)
    assert await resolver.spread("http://localhost:8081") == ("http://localhost:8081",)
    monkeypatch.setattr(addresses, "FRESH_SECONDS", 0.0)
    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", _fail)
    assert await resolver.spread("http://localhost:8081") == ("http://localhost:8081",)


async def _fail(*_: Any, **__: Any) -> None:
    raise OSError("the name server is away")

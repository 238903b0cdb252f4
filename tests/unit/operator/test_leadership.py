"""Who leads, told with a Lease on a small server and clocks that the test sets."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, cast

import kopf
import pytest
from aiohttp import web
from kubernetes import aio
from prometheus_client import CollectorRegistry

from finetune_operator import __main__, config, handlers
from finetune_operator.adapters.api_errors import FencedError
from finetune_operator.adapters.kube import Kube
from finetune_operator.adapters.telemetry import Telemetry
from finetune_operator.core import elections
from finetune_operator.core.elections import LeaseFacts, Terms
from finetune_operator.leadership import Leadership, LeadershipLostError

TERMS = Terms(lease_seconds=15, renew_seconds=10, retry_seconds=0.01)
PATH = "/apis/coordination.k8s.io/v1/namespaces/ns/leases"


class LeaseServer:
    """Stores one Lease as an API server does: optimistic locking by resourceVersion."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.version = 0
        self.status: int | None = None
        self.hangs = False
        self.hangs_once = False
        """Whether the next request gets no answer: its connection has died without a word."""

    def application(self) -> web.Application:
        application = web.Application()
        application.router.add_get(f"{PATH}/finetune-operator", self._get)
        application.router.add_post(PATH, self._create)
        application.router.add_put(f"{PATH}/finetune-operator", self._replace)
        return application

    @property
    def holder(self) -> str:
        return str(self.lease["spec"]["holderIdentity"]) if self.lease else ""

    async def _misbehave(self) -> web.Response | None:
        if self.hangs or self.hangs_once:
            self.hangs_once = False
            await asyncio.sleep(3600)
        return web.json_response({"message": "made up"}, status=self.status) if self.status else None

    async def _get(self, _: web.Request) -> web.Response:
        if wrong := await self._misbehave():
            return wrong
        if self.lease is None:
            return web.json_response({"message": "not found"}, status=404)
        return web.json_response(self.lease)

    async def _create(self, request: web.Request) -> web.Response:
        if wrong := await self._misbehave():
            return wrong
        if self.lease is not None:
            return web.json_response({"message": "exists"}, status=409)
        return self._store(await request.json())

    async def _replace(self, request: web.Request) -> web.Response:
        if wrong := await self._misbehave():
            return wrong
        body = await request.json()
        if self.lease is None:
            return web.json_response({"message": "not found"}, status=404)
        if body["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
            return web.json_response({"message": "changed"}, status=409)
        return self._store(body)

    def _store(self, body: dict[str, Any]) -> web.Response:
        self.version += 1
        body["metadata"]["resourceVersion"] = str(self.version)
        self.lease = body
        return web.json_response(body)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@contextlib.asynccontextmanager
async def served() -> AsyncIterator[tuple[LeaseServer, Kube]]:
    server = LeaseServer()
    runner = web.AppRunner(server.application(), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    configuration = aio.client.Configuration(host=f"http://127.0.0.1:{port}")
    kube = Kube(aio.client.ApiClient(configuration))
    try:
        yield server, kube
    finally:
        await kube.close()
        await runner.cleanup()


def candidate(kube: Kube, name: str, clock: Clock) -> Leadership:
    return Leadership(kube, namespace="ns", address=f"http://{name}:8090", terms=TERMS, me=name, clock=clock)


async def test_the_first_leads_and_the_second_takes_over_only_after_a_lease_time_of_silence() -> None:
    clock = Clock()
    async with served() as (server, kube):
        first, second = candidate(kube, "first", clock), candidate(kube, "second", clock)
        await first.acquire()
        assert (first.may_act(), server.holder) == (True, "first")
        assert not await second._try()
        assert second.leader_address == "http://first:8090"
        for _ in range(2):
            clock.now += 7.4
            assert not await second._try()
        assert not first.may_act(), "it gives up before anybody else may lead"
        clock.now += 0.3
        assert await second._try()
        assert (second.may_act(), server.holder) == (True, "second")
        assert second.leader_address is None
        assert server.lease is not None
        assert server.lease["spec"]["leaseTransitions"] == 1


async def test_an_api_server_that_stays_away_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    async with served() as (server, kube):
        first = candidate(kube, "first", clock)
        await first.acquire()
        for _ in range(2):
            clock.now += 11
            server.status = 503
            for _ in range(20):
                assert not await first._try()
            server.status = None
            assert await first._try()
    assert len([line for line in caplog.messages if "made up" in line]) == 2, "once for each outage"


async def test_a_renewal_counts_from_its_beginning_and_not_from_its_answer() -> None:
    clock = Clock()
    async with served() as (server, kube):
        first = candidate(kube, "first", clock)
        await first.acquire()
        store = server._store

        def slowly(body: dict[str, Any]) -> web.Response:
            clock.now += 6
            return store(body)

        server._store = slowly  # type: ignore[method-assign]
        assert await first._try()
        clock.now += 3.9
        assert first.may_act()
        clock.now += 0.2
        assert not first.may_act()


async def test_a_leader_that_wakes_up_after_another_one_led_is_over() -> None:
    clock = Clock()
    async with served() as (server, kube):
        first, second = candidate(kube, "first", clock), candidate(kube, "second", clock)
        await first.acquire()
        assert not await second._try()
        clock.now += 8
        assert not await second._try()
        clock.now += 8
        assert not first.may_act()
        assert not first.may_push()
        assert await second._try()
        await second.release()
        version = server.version
        with pytest.raises(LeadershipLostError):
            await first.keep()
        assert server.version == version, "it took the Lease again with what it knew before"


async def test_a_leader_that_wakes_up_before_anybody_led_leads_on() -> None:
    clock = Clock()
    async with served() as (_, kube):
        first = candidate(kube, "first", clock)
        await first.acquire()
        clock.now += 60
        assert not first.may_act()
        keeping = asyncio.create_task(first.keep())
        async with asyncio.timeout(5):
            while not first.may_act():
                await asyncio.sleep(0.01)
        keeping.cancel()


async def test_after_an_outage_the_leader_gets_its_chance_first() -> None:
    clock = Clock()
    async with served() as (server, kube):
        first, second = candidate(kube, "first", clock), candidate(kube, "second", clock)
        await first.acquire()
        assert not await second._try()
        server.status = 503
        for _ in range(10):
            clock.now += 6
            assert not await second._try()
        server.status = None
        assert not await second._try(), "the holder could not renew it: that says nothing"
        assert await first._try()
        assert (first.may_act(), server.holder) == (True, "first")


async def test_a_leader_whose_lease_another_one_holds_stops_at_once() -> None:
    clock = Clock()
    async with served() as (server, kube):
        first = candidate(kube, "first", clock)
        await first.acquire()
        assert server.lease is not None
        server._store({**server.lease, "spec": {**server.lease["spec"], "holderIdentity": "thief"}})
        with pytest.raises(LeadershipLostError, match="thief"):
            async with asyncio.timeout(5):
                await first.keep()
        assert not first.may_act()


@pytest.mark.parametrize("status", [500, 503, 404])
async def test_a_failing_api_server_is_outlived_within_the_time(status: int) -> None:
    clock = Clock()
    async with served() as (server, kube):
        first = candidate(kube, "first", clock)
        await first.acquire()
        server.status = status
        assert not await first._try()
        assert first.may_act()
        server.status = None
        clock.now += 9
        assert await first._try()
        clock.now += 9
        assert first.may_act()


async def test_without_an_answer_nothing_is_written_and_routers_are_still_told() -> None:
    async with served() as (server, kube):
        quick = Terms(lease_seconds=1.5, renew_seconds=0.5, retry_seconds=0.2)
        first = Leadership(kube, namespace="ns", address="http://first", terms=quick, me="first")
        await first.acquire()
        keeping = asyncio.create_task(first.keep())
        server.status = 503
        await asyncio.sleep(1.0)
        assert not first.may_act()
        assert first.may_push()
        server.hangs = True  # a request that hangs does not count as news
        server.status = None
        await asyncio.sleep(0.2)
        server.hangs = False
        async with asyncio.timeout(5):
            while not first.may_act():
                await asyncio.sleep(0.02)
        assert not keeping.done()
        keeping.cancel()


@pytest.mark.parametrize("read_first", [False, True])
async def test_one_request_that_hangs_does_not_cost_the_lease(read_first: bool) -> None:
    """Neither a write nor the read that comes before it when something went wrong."""
    async with served() as (server, kube):
        terms = Terms(lease_seconds=4.0, renew_seconds=2.0, retry_seconds=0.2)
        first = Leadership(kube, namespace="ns", address="http://first", terms=terms, me="first")
        await first.acquire()
        first._read_again, server.hangs_once = read_first, True
        version, began = server.version, asyncio.get_running_loop().time()
        keeping = asyncio.create_task(first.keep())
        while server.version == version:
            assert first.may_act(), "the one request has used up the whole time"
            await asyncio.sleep(0.01)
        took = asyncio.get_running_loop().time() - began
        assert terms.renew_seconds / 2 < took < 0.9 * terms.renew_seconds
        keeping.cancel()


async def test_a_released_lease_is_taken_without_waiting() -> None:
    clock = Clock()
    async with served() as (server, kube):
        first, second = candidate(kube, "first", clock), candidate(kube, "second", clock)
        await first.acquire()
        assert not await second._try()
        await first.release()
        assert (server.holder, first.may_act()) == ("", False)
        assert await second._try()


async def test_of_two_that_see_the_same_chance_one_leads() -> None:
    clock = Clock()
    async with served() as (_, kube):
        all_of_them = [candidate(kube, f"number {n}", clock) for n in range(8)]
        await asyncio.gather(*(one._try() for one in all_of_them))
        assert sum(one.may_act() for one in all_of_them) == 1


async def test_a_write_is_not_sent_by_one_that_leads_no_more() -> None:
    async with served() as (server, kube):
        fenced = Kube(kube._client, may_write=lambda: False)
        with pytest.raises(FencedError):
            await fenced.create({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"namespace": "ns"}})
        assert await fenced.get("coordination.k8s.io/v1", "Lease", "ns", "finetune-operator") is None
        assert server.version == 0


def test_other_clocks_do_not_matter() -> None:
    """A Lease whose holder's clock is a year off is judged by how long it has not changed."""
    lease = LeaseFacts(holder="other", version="7")
    assert not elections.may_take(lease, identity="me", unchanged_seconds=14.9, terms=TERMS)
    assert elections.may_take(lease, identity="me", unchanged_seconds=15.0, terms=TERMS)


async def test_a_server_that_is_too_busy_is_asked_again() -> None:
    async with served() as (server, kube):
        server.status = 429

        async def recover() -> None:
            await asyncio.sleep(0.2)
            server.status = None

        recovering = asyncio.create_task(recover())
        assert await kube.get("coordination.k8s.io/v1", "Lease", "ns", "finetune-operator") is None
        await recovering


async def test_kopf_waits_for_no_task_of_ours_when_it_ends() -> None:
    """Left to itself it would for 5 s, and the next leader with it. Its own watches, which it leaves behind where one
    of them fails, it has to stop."""
    watches = asyncio.create_task(asyncio.sleep(0))
    ours = asyncio.create_task(asyncio.sleep(3600))
    async with asyncio.timeout(1):
        await kopf.run_tasks([watches], ignored=handlers.OtherTasks())
    assert not ours.done()
    ours.cancel()
    its_own = asyncio.create_task(kopf.run_tasks([ours]))
    waiter = asyncio.create_task(kopf.run_tasks([ours]), name="pause-waiter for pods.v1")
    assert set(handlers.OtherTasks()) == {asyncio.current_task(), ours, waiter}
    its_own.cancel()
    waiter.cancel()


class Election:
    """A Leadership that is won at once and whose renewal ends as the test says."""

    def __init__(self, ends: Exception) -> None:
        self._ends = ends
        self.released = False

    async def acquire(self) -> None:
        return

    async def keep(self) -> None:
        await asyncio.sleep(0.01)
        raise self._ends

    async def release(self) -> None:
        self.released = True


async def lead_with(election: Election) -> list[str]:
    """What the leader's part did until the end, which is raised."""
    done: list[str] = []

    async def leading() -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            assert not election.released, "the Lease is released only when nothing acts any more"
            done.append("stopped")

    telemetry = Telemetry(CollectorRegistry())
    with pytest.raises(type(election._ends)):
        await __main__._lead_while_elected(cast("Leadership", election), leading(), telemetry)
    return done


async def test_whatever_ends_the_renewal_ends_the_process_and_hands_over() -> None:
    election = Election(KeyError("metadata"))
    assert await lead_with(election) == ["stopped"]
    assert election.released


def test_what_ends_the_operator_is_logged_and_no_success(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def run(_: object) -> None:
        raise KeyError("metadata")

    monkeypatch.setattr(__main__, "run", run)
    monkeypatch.setattr(config, "load", lambda _: SimpleNamespace(json_logs=False))
    monkeypatch.setattr("kopf.configure", lambda **_: None)
    with pytest.raises(SystemExit) as ended:
        __main__.main()
    assert ended.value.code == 1
    (record,) = [record for record in caplog.records if record.levelno == logging.CRITICAL]
    assert record.exc_info is not None
    assert "metadata" in str(record.exc_info[1])


def test_a_signal_ends_it_well(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(_: object) -> None:
        raise asyncio.CancelledError

    monkeypatch.setattr(__main__, "run", run)
    monkeypatch.setattr(config, "load", lambda _: SimpleNamespace(json_logs=False))
    monkeypatch.setattr("kopf.configure", lambda **_: None)
    __main__.main()

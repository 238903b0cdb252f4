"""The publisher of the routes, where the API server or a router does not answer."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any, cast

import pytest

from finetune_operator.adapters.api_errors import ApiError, UnavailableError
from finetune_operator.adapters.kube import Kube
from finetune_operator.adapters.routers import Refused, Routers
from finetune_operator.api.routes import Route, RouterCounters, RoutesApplied
from finetune_operator.reconcile import durable_routes
from finetune_operator.reconcile.aliases import Claim
from finetune_operator.reconcile.fleet import Fleet
from finetune_operator.reconcile.routes import Publisher, Share
from tests.waiting import until


class AwayKube:
    """An API server that answers nothing while `error` says why."""

    def __init__(self) -> None:
        self.error: ApiError | None = UnavailableError("connection refused")
        self.asked = 0

    async def get(self, *_: Any) -> None:
        self._ask()

    async def list_all(self, *_: Any) -> list[Any]:
        self._ask()
        return []

    async def create(self, body: Any) -> Any:
        self._ask()
        return body | {"metadata": {"resourceVersion": "1"}}

    apply = create

    def _ask(self) -> None:
        self.asked += 1
        if self.error is not None:
            raise self.error


class NoRouters:
    async def replicas(self) -> list[str]:
        return []


async def test_an_api_server_that_stays_away_is_told_of_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_operator.reconcile.routes.RETRY_SECONDS", 0.01)
    monkeypatch.setattr(durable_routes, "RETRY_SECONDS", 0.01)
    kube = AwayKube()
    publisher = Publisher(
        kube=cast("Kube", kube),
        fleet=Fleet(cast("Routers", NoRouters())),
        namespace="ns",
        served=["ns"],
        wake=lambda key: None,
    )

    async def told() -> list[str]:
        """During the next tries."""
        before = kube.asked
        await until(lambda: kube.asked > before + 5)
        said = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
        caplog.clear()
        return said

    start = asyncio.create_task(publisher.start())
    assert await told() == ["the routes cannot be read yet: connection refused"]
    kube.error = UnavailableError("timeout")
    assert await told() == ["the routes cannot be read yet: timeout"]
    kube.error = None
    await start
    claim = Claim(key=("ns", "bot"), uid="1", created="", alias="bot")
    for number in range(2):  # a second outage is news
        kube.error = UnavailableError("gone")
        await publisher.publish(claim, Share(None), agents=[f"http://agent-{number}"])
        assert await told() == ["the routes could not be stored, and are pushed all the same: gone"]
        kube.error = None
        await until(lambda: publisher.facts(claim).not_stored is None and publisher._is_stored())


class SomeRouters:
    """They apply what they are given, but for those that are deaf."""

    def __init__(self) -> None:
        self.urls = ["http://r1", "http://r2"]
        self.deaf: set[str] = set()
        self._applied = dict.fromkeys(self.urls, 0)

    async def replicas(self) -> list[str]:
        return self.urls

    async def push(self, url: str, body: bytes) -> RoutesApplied | Refused:
        if url in self.deaf:
            return Refused("no connection")
        self._applied[url] = json.loads(body)["version"]
        return RoutesApplied(instance=url, version=self._applied[url])

    async def counters(self, url: str) -> RouterCounters | Refused:
        if url in self.deaf:
            return Refused("no connection")
        return RouterCounters(instance=url, version=self._applied[url], epochs=())


async def test_an_alias_that_no_router_has_is_left_behind_whatever_others_publish() -> None:
    kube, routers = AwayKube(), SomeRouters()
    kube.error = None
    fleet = Fleet(cast("Routers", routers))
    publisher = Publisher(
        kube=cast("Kube", kube), fleet=fleet, namespace="ns", served=["ns"], wake=lambda key: None
    )
    await publisher.start()

    async def publish(alias: str) -> Claim:
        claim = Claim(key=("ns", alias), uid="1", created="", alias=alias)
        publisher.claim(claim)
        route = Route(alias=alias, owner=claim.owner, stable=None, salt="")
        await publisher.publish(claim, Share(route), agents=["http://agent"])
        return claim

    first = await publish("bot")
    assert publisher.left_behind() == {}
    await publisher.withdraw(first.key)
    await until(lambda: publisher.left_behind() == {"bot": ["http://agent"]})
    routers.deaf = {"http://r2"}
    second = await publish("other")
    assert publisher.left_behind() == {"bot": ["http://agent"]}, "no router has it, whatever else there is"
    await publisher.withdraw(second.key)
    await until(lambda: fleet.behind(publisher.snapshot.version) != ())
    assert "other" not in publisher.left_behind(), "the deaf router may send requests"
    routers.urls = ["http://r1"]
    await fleet.poll()
    assert set(publisher.left_behind()) == {"bot", "other"}
    await publish("bot")
    assert set(publisher.left_behind()) == {"other"}

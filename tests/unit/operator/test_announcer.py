"""Events and alerts of stored announcements, told through a real API client to a server that keeps Events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from kubernetes import aio

from finetune_operator.adapters import fetching
from finetune_operator.adapters.kube import Kube
from finetune_operator.adapters.prometheus import Prometheus
from finetune_operator.adapters.webhooks import Alerts, Webhooks
from finetune_operator.api.adapterdeployment import AdapterDeploymentSpec
from finetune_operator.api.adapterdeployment_status import AdapterDeploymentStatus, Announcement
from finetune_operator.api.adapterdeployment_strategy import Severity
from finetune_operator.core.rollout_facts import DeploymentFacts
from finetune_operator.reconcile import errands
from finetune_operator.reconcile.announcements import Announcer, Subject
from finetune_operator.reconcile.errands import Errands

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
KEY = ("team", "bot")
BODY = {"kind": "AdapterDeployment", "metadata": {"namespace": "team", "name": "bot", "uid": "u"}}


@dataclass
class World:
    """An API server that knows Events, and a chat room."""

    events: dict[str, Any] = field(default_factory=dict)
    attempts: int = 0
    refused: int = 0
    alerts: list[Any] = field(default_factory=list)
    order: list[str] = field(default_factory=list)
    status: int = 201
    url: str = ""
    folder: Path = Path()

    async def event(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.attempts += 1
        if self.status != 201:
            return web.json_response({"message": "told to fail"}, status=self.status)
        name = body["metadata"]["name"]
        if name in self.events:
            return web.json_response({"message": "exists"}, status=409)
        self.events[name] = body
        self.order.append("event")
        return web.json_response(body, status=201)

    async def refuse(self, request: web.Request) -> web.Response:
        self.refused += 1
        return web.Response(status=404, text=f"Cannot POST {request.path}")

    async def alert(self, request: web.Request) -> web.Response:
        self.alerts.append(await request.json())
        self.order.append("alert")
        return web.Response()

    @asynccontextmanager
    async def announcer(self, now: datetime = NOW) -> AsyncIterator[Announcer]:
        """A new life of the operator."""
        client = aio.client.ApiClient(aio.client.Configuration(host=self.url))
        async with fetching.open_session() as session:
            made = Errands(
                prometheus=Prometheus(session),
                webhooks=Webhooks(session),
                alerts=Alerts(session, self.folder / "providers.json"),
                wake=lambda key: None,
            )
            try:
                yield Announcer(kube=Kube(client), errands=made, clock=lambda: now)
            finally:
                await client.close()


@asynccontextmanager
async def world(folder: Path) -> AsyncIterator[World]:
    made = World(folder=folder)
    application = web.Application()
    application.router.add_post("/api/v1/namespaces/team/events", made.event)
    application.router.add_post("/room", made.alert)
    application.router.add_post("/token-of-a-room", made.refuse)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    (folder / "providers.json").write_text(
        json.dumps({"room": f"{made.url}/room", "closed": f"{made.url}/token-of-a-room"})
    )
    try:
        yield made
    finally:
        await runner.cleanup()


def announcement(name: str, *, time: datetime = NOW) -> Announcement:
    return Announcement(
        name=name, time=time, severity=Severity.ERROR, reason="GuardrailBreached", message="it fails"
    )


def subject(*items: Announcement, providers: Sequence[str] = ("room",)) -> Subject:
    spec = AdapterDeploymentSpec.model_validate(
        {
            "baseModelRef": {"name": "tiny"},
            "adapter": {"fineTuneJobRef": {"name": "j"}},
            "alerts": [{"severity": "warn", "providerRef": {"name": name}} for name in providers],
        }
    )
    status = AdapterDeploymentStatus(announcements=list(items))
    facts = DeploymentFacts("team", "bot", "u", 1, spec, None, status)
    return Subject(KEY, BODY, facts, status)


async def settled(announcer: Announcer, *names: str) -> None:
    async with asyncio.timeout(10):
        while not announcer.told(KEY).issuperset(names):
            await asyncio.sleep(0.01)


async def test_what_was_just_written_is_told_once_and_its_event_comes_last(tmp_path: Path) -> None:
    item = announcement("bot.1")
    async with world(tmp_path) as around, around.announcer() as announcer:
        for _ in range(3):
            announcer.announce(subject(item), [item])
        await settled(announcer, "bot.1")
        announcer.announce(subject(item), [])
        await asyncio.sleep(0.1)
        assert around.order == ["alert", "event"]
        assert around.attempts == 1, "no request more than one per Event"
        assert around.alerts[0]["text"] == "AdapterDeployment team/bot: GuardrailBreached: it fails"
        event = around.events["bot.1"]
        assert (event["reason"], event["type"], event["firstTimestamp"]) == (
            "GuardrailBreached",
            "Warning",
            "2026-01-01T12:00:00Z",
        )


async def test_an_operator_that_starts_tells_only_what_has_no_event(tmp_path: Path) -> None:
    told, lost = announcement("bot.told"), announcement("bot.lost")
    async with world(tmp_path) as around:
        async with around.announcer() as first:
            first.announce(subject(told), [told])
            await settled(first, "bot.told")
        async with around.announcer(NOW + timedelta(minutes=5)) as second:
            second.announce(subject(told, lost), [])
            await settled(second, "bot.told", "bot.lost")
        assert set(around.events) == {"bot.told", "bot.lost"}
        assert around.order == ["alert", "event", "event", "alert"]


async def test_what_is_so_old_that_its_event_may_be_gone_is_not_told_again(tmp_path: Path) -> None:
    async with world(tmp_path) as around, around.announcer(NOW + timedelta(hours=2)) as announcer:
        announcer.announce(subject(announcement("bot.1")), [])
        await settled(announcer, "bot.1")
        assert around.attempts == 0


async def test_an_event_waits_for_the_api_server_and_its_alert_is_not_repeated(tmp_path: Path) -> None:
    item = announcement("bot.1")
    async with world(tmp_path) as around, around.announcer(NOW + timedelta(hours=2)) as announcer:
        around.status = 503
        announcer.announce(subject(item), [item])
        async with asyncio.timeout(10):
            while not around.attempts:
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert announcer.told(KEY) == frozenset()
        around.status = 201
        announcer.announce(subject(item), [])
        await settled(announcer, "bot.1")
        assert around.order == ["alert", "event"]


async def test_an_event_that_is_refused_is_given_up(tmp_path: Path) -> None:
    item = announcement("bot.1")
    async with world(tmp_path) as around, around.announcer() as announcer:
        around.status = 403
        announcer.announce(subject(item), [item])
        await settled(announcer, "bot.1")
        assert (around.attempts, len(around.alerts)) == (1, 1)


async def test_an_alert_that_cannot_be_delivered_is_one_event_per_provider(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(errands, "ALERT_RETRY_SECONDS", 0.01)
    item = announcement("bot.1")
    about = subject(item, providers=["room", "closed", "unknown", "closed"])
    async with world(tmp_path) as around:
        for life in range(2):
            async with around.announcer() as announcer:
                announcer.announce(about, [item])
                await settled(announcer, "bot.1")
                assert around.refused == 2 * errands.ALERT_ATTEMPTS * (life + 1)
        assert set(around.events) == {"bot.1", "bot.1.closed", "bot.1.unknown"}
        refused, unknown = around.events["bot.1.closed"], around.events["bot.1.unknown"]
        assert {(event["type"], event["reason"]) for event in (refused, unknown)} == {
            ("Warning", "AlertNotDelivered")
        }
        assert refused["message"].startswith(
            "alert GuardrailBreached: provider closed: HTTP 404; providers are"
        )
        assert "token" not in refused["message"], "the URL is a secret"
        assert "provider unknown: not in the operator's file" in unknown["message"]
        assert "alerts.existingSecret" in unknown["message"]

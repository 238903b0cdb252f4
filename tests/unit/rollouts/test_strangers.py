"""Addresses that users name: what hangs there holds up nobody, and what it says is not told to whoever named it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry

from finetune_operator import config, parts
from finetune_operator.adapters import fetching
from finetune_operator.adapters.addresses import Resolver
from finetune_operator.adapters.agents import Agents
from finetune_operator.adapters.fetching import UnreachableError
from finetune_operator.adapters.kube import Kube
from finetune_operator.adapters.prometheus import Prometheus, QueryError
from finetune_operator.adapters.telemetry import Telemetry
from finetune_operator.adapters.webhooks import Webhooks
from finetune_operator.api.adapterdeployment_strategy import WebhookSpec
from finetune_operator.api.adapterdeployment_traffic import ServingSpec
from finetune_operator.core import endpoints
from finetune_operator.reconcile.adapterdeployment import AdapterDeploymentReconciler
from finetune_operator.reconcile.engines import Engines
from tests.waiting import until

SECRET = "password=hunter2"
STATUS = {"engine": {"ready": True, "baseModels": ["tiny"]}}
Answer = Callable[[web.Request], Any]


@asynccontextmanager
async def server(answer: Answer) -> AsyncIterator[str]:
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def test_webhooks_that_hang_hold_up_no_push(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "CONNECTIONS", 4)
    waiting = 0

    async def hang(_: web.Request) -> web.Response:
        nonlocal waiting
        waiting += 1
        await asyncio.sleep(60)
        return web.Response()

    async def router(_: web.Request) -> web.Response:
        return web.json_response({"instance": "r", "version": 1})

    async with server(hang) as stranger, server(router) as admin:
        settings = config.load({"FINETUNE_ROUTER_ADMIN_URLS": admin})
        telemetry = Telemetry(CollectorRegistry())
        async with parts.build_rollouts(settings, kube=cast("Kube", None), telemetry=telemetry) as made:
            reconciler = cast("AdapterDeploymentReconciler", made.queue._worker)
            hooks = [
                WebhookSpec.model_validate({"name": f"h{n}", "type": "confirm-rollout", "url": stranger})
                for n in range(8)
            ]
            for hook in hooks:
                reconciler.errands.tell(("team", "bot"), [hook], {})
            await until(lambda: waiting == 4)
            made.fleet.offer(1, b"{}")
            began = time.monotonic()
            await made.fleet.poll()
            await until(lambda: made.fleet.count_applying(1) == 1)
            assert time.monotonic() - began < 2
            told = await reconciler.agents.status(admin)
            assert time.monotonic() - began < 4, told
            for task in list(reconciler.errands._loose):
                task.cancel()


async def test_an_agent_that_hangs_is_waited_for_once() -> None:
    asked = 0
    hanging = True

    async def answer(_: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        if hanging:
            await asyncio.sleep(60)
        return web.json_response(STATUS)

    async with server(answer) as url, fetching.open_session() as session:
        engines = Engines(
            cast("Kube", None), Agents(session), Resolver(), endpoints.parse("127.0.0.1"), url, url
        )
        serving = ServingSpec()
        (engine,) = (await engines.observe("team", serving)).engines
        assert not engine.reachable
        began = time.monotonic()
        for _ in range(4):
            (engine,) = (await engines.observe("team", serving)).engines
            assert "no answer within" in engine.message
        assert time.monotonic() - began < 1.5, "four passes of others would have waited for 2 s each"
        assert asked == 2, "one request at a time"
        hanging = False
        await until(lambda: asked > 2 or engines._asked[url][1].done())
        for _ in range(3):
            (engine,) = (await engines.observe("team", serving)).engines
        assert engine.reachable


def test_only_known_addresses_are_quoted() -> None:
    allowed = endpoints.parse("*.monitoring.svc", configured=["http://engine:8000"])
    assert allowed.is_known("http://prometheus.monitoring.svc:9090")
    assert allowed.is_known("http://engine:8000")
    for url in ("http://169.254.169.254", "http://localhost:2379", "http://[::1", "http://vault.other.svc"):
        assert not allowed.is_known(url)


@pytest.mark.parametrize("text", [SECRET, f'{{"status": "error", "error": "{SECRET}"}}', f'["{SECRET}"]'])
async def test_what_a_strange_address_answers_is_not_told(text: str) -> None:
    async def answer(_: web.Request) -> web.Response:
        return web.Response(text=text, status=403)

    async with server(answer) as url, fetching.open_session() as session:
        for may_quote, told in ((lambda _: False, False), (lambda _: True, True)):
            said = await Webhooks(session, may_quote).ask(url, {}, seconds=2)
            with pytest.raises(QueryError) as refused:
                await Prometheus(session, may_quote).query(url, "up")
            for message in (said.message, str(refused.value)):
                assert "HTTP 403" in message
                assert (SECRET in message) is told


async def test_what_speaks_no_http_is_not_quoted() -> None:
    async def banner(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(f"{SECRET}\r\n\r\n".encode())
        writer.close()

    listening = await asyncio.start_server(banner, "127.0.0.1", 0)
    host, port = listening.sockets[0].getsockname()
    async with listening, fetching.open_session() as session:
        with pytest.raises(UnreachableError) as refused:
            await fetching.fetch(session, "GET", f"http://{host}:{port}", seconds=2)
        assert SECRET not in str(refused.value)

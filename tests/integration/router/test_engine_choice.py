"""Which of several engines answers, and what happens when one cannot."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable, Iterator

import aiohttp

from finetune_operator.api.routes import Arm
from tests.integration.router import engines
from tests.integration.router.engines import Behaviour, Engine
from tests.integration.router.routers import CANDIDATE, CHAT, Router, arms_of, ask, route, target
from tests.waiting import until


async def test_one_engine_of_several_may_die_lack_the_model_or_be_busy(
    router: Router, session: aiohttp.ClientSession, alias: str
) -> None:
    async with (
        engines.running("base-model") as good,
        engines.running("something-else") as lacking,
        engines.running() as busy,
        engines.running() as dying,
    ):
        busy.behaviours["base-model"] = Behaviour(status=503)
        dying.behaviours["base-model"] = Behaviour(break_after=0)
        for other in (lacking, busy, dying):
            await router.push(route(alias, target("base", good.url, other.url)))
            users = [f"u{n}" for n in range(20)]
            assert set((await arms_of(session, router, alias, users)).values()) == {"Stable"}
            assert other.seen
    counted = await router.arm(alias, Arm.STABLE)
    assert (counted.requests, counted.events.get("errors", 0)) == (60, 0)


async def test_an_engine_that_refuses_is_left_out_for_a_while(
    router: Router, engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        await router.push(route(alias, target("base", url, engine.url)))
        await arms_of(session, router, alias, [f"u{n}" for n in range(30)])
    assert len(engine.seen) == 30


@contextlib.contextmanager
def dead_machine() -> Iterator[str]:
    """The URL of a port where connections hang: its queue is full, and the kernel drops what else comes."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(3):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


async def test_an_engine_on_a_dead_machine_is_retried_elsewhere_and_left_out(
    router: Router, engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    with dead_machine() as url:
        await router.push(route(alias, target("base", url, engine.url)))
        users = [f"u{n}" for n in range(20)]
        assert set((await arms_of(session, router, alias, users)).values()) == {"Stable"}
        assert len(engine.seen) == 20
        began = time.monotonic()
        await arms_of(session, router, alias, users)
        assert time.monotonic() - began < 0.9, "the dead engine was tried again at once"
    assert "errors" not in (await router.arm(alias, Arm.STABLE)).events


async def test_a_candidate_on_a_dead_machine_falls_back(
    router: Router, engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    with dead_machine() as url:
        await router.push(route(alias, target("base", engine.url), target(CANDIDATE, url), weight=100))
        async with session.post(router.url + CHAT, json=ask(alias, "u")) as response:
            assert (response.status, response.headers["x-adapter-fallback"]) == (200, "true")
    assert (await router.arm(alias, Arm.CANDIDATE)).events["errors"] == 1


async def test_the_engine_with_the_fewest_requests_is_taken(
    own_router: Callable[..., Router], session: aiohttp.ClientSession, alias: str
) -> None:
    router = own_router()
    await asyncio.to_thread(router.start)
    async with engines.running() as slow, engines.running() as quick:
        slow.behaviours["base-model"] = Behaviour(delay=5.0)
        await router.push(route(alias, target("base", slow.url, quick.url)))
        asked: list[asyncio.Task[dict[str, str]]] = []
        while not slow.seen:
            asked.append(asyncio.create_task(arms_of(session, router, alias, [f"first{len(asked)}"])))
            await until(lambda: len(slow.seen) + len(quick.seen) == len(asked))
        await asyncio.gather(*asked[:-1])  # the quick engine has none under way now, the slow one has one
        for number in range(6):
            await arms_of(session, router, alias, [f"u{number}"])
        assert (len(slow.seen), len(quick.seen)) == (1, len(asked) - 1 + 6)
        asked[-1].cancel()

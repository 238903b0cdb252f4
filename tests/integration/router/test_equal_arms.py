"""Arms that fail alike are counted alike. A kind of failure that counts for the candidate only would roll it back."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from math import sqrt

import aiohttp
import pytest

from finetune_operator.api.routes import Arm, Signal, SignalEvent
from tests.integration.router.engines import Behaviour, Engine, event
from tests.integration.router.routers import CANDIDATE, CHAT, Router, ask, route, target

REQUESTS = 200
SHARE = 0.1  # of the answers of either arm
NO_EVENTS = {"Content-Type": "text/event-stream"}
ROLE = event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
SIGNALS = (
    Signal(name="errors", event=SignalEvent.ERROR),
    Signal(name="empty", event=SignalEvent.EMPTY),
)

WHOLE = {
    "500": Behaviour(status=500),
    "503": Behaviour(status=503),
    "400": Behaviour(status=400),
    "401": Behaviour(status=401),
    "403": Behaviour(status=403),
    "404": Behaviour(status=404, raw=b'{"detail": "Not Found"}'),
    "408": Behaviour(status=408),
    "413": Behaviour(status=413),
    "501": Behaviour(status=501),
    "redirect": Behaviour(status=302, raw=b"", headers={"Location": "/login"}),
    "reset": Behaviour(break_after=0),
    "slower than half of the time": Behaviour(delay=2.4),
    "error object": Behaviour(raw=b'{"object": "error", "message": "CUDA out of memory"}'),
    "half a document": Behaviour(raw=b'{"choices": [{"mess'),
}
STREAMS = {
    "error event": Behaviour(error_event=True),
    "no first byte": Behaviour(delay=1.3),
    "broken in the middle": Behaviour(break_after=2),
    "no bytes": Behaviour(raw=b"", headers=NO_EVENTS),
    "nothing but the end": Behaviour(chunks=(b"data: [DONE]\n\n",)),
    "nothing but a role": Behaviour(chunks=(ROLE, b"data: [DONE]\n\n")),
}
UNCOUNTED = {"429": Behaviour(status=429), "missing": Behaviour(status=404, raw=b"no such model")}


async def compare(
    router: Router,
    engine: Engine,
    session: aiohttp.ClientSession,
    alias: str,
    how: Behaviour,
    *,
    stream: bool,
) -> tuple[int, int]:
    """Errors of stable and of the candidate, where either fails so by chance."""
    stable, candidate = target("base", engine.url), target(CANDIDATE, engine.url)
    await router.push(route(alias, stable, candidate, weight=50, signals=SIGNALS))
    engine.behaviours |= dict.fromkeys(("base-model", f"bot--{CANDIDATE}"), replace(how, share=SHARE))
    at_once = asyncio.Semaphore(50)

    async def one(number: int) -> None:
        async with (
            at_once,
            session.post(router.url + CHAT, json=ask(alias, f"u{number}", stream=stream)) as response,
        ):
            try:
                await response.read()
            except aiohttp.ClientPayloadError:
                assert how.break_after

    await asyncio.gather(*(one(number) for number in range(REQUESTS)))
    async with asyncio.timeout(5):
        while engine.open:
            await asyncio.sleep(0.05)
    await asyncio.sleep(0.2)
    arms = [await router.arm(alias, arm) for arm in (Arm.STABLE, Arm.CANDIDATE)]
    assert not any(arm.events.get("empty") for arm in arms)
    return arms[0].events.get("errors", 0), arms[1].events.get("errors", 0)


@pytest.mark.parametrize(
    ("how", "stream"),
    [*((how, False) for how in WHOLE.values()), *((how, True) for how in STREAMS.values())],
    ids=[*WHOLE, *STREAMS],
)
async def test_each_kind_of_failure_counts_on_both_sides(
    router: Router, engine: Engine, session: aiohttp.ClientSession, alias: str, how: Behaviour, stream: bool
) -> None:
    stable, candidate = await compare(router, engine, session, alias, how, stream=stream)
    assert min(stable, candidate) > 0
    assert abs(stable - candidate) < 4 * sqrt(stable + candidate)


@pytest.mark.parametrize("how", UNCOUNTED.values(), ids=UNCOUNTED)
async def test_what_counts_on_neither_side(
    router: Router, engine: Engine, session: aiohttp.ClientSession, alias: str, how: Behaviour
) -> None:
    assert await compare(router, engine, session, alias, how, stream=False) == (0, 0)

"""Which arm answers, and what happens when one cannot."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
import pytest

from finetune_operator.api.routes import Arm, HeaderMatch, Pin
from finetune_router import assignment
from tests.integration.router import engines
from tests.integration.router.engines import Behaviour, Engine
from tests.integration.router.routers import Router, route, target
from tests.waiting import until

CANDIDATE = "ab12cd34"
CHAT = "/v1/chat/completions"
WHOLE_ERROR = b'{"object": "error", "message": "CUDA out of memory"}'
PACKED = gzip.compress(b'data: {"error": {"message": "CUDA out of memory"}}\n\n')


def ask(model: str, user: str | None = None, **more: object) -> dict[str, Any]:
    document: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "hi"}], **more}
    return document if user is None else {**document, "user": user}


async def arms_of(
    session: aiohttp.ClientSession, router: Router, alias: str, users: list[str]
) -> dict[str, str]:
    async def one(user: str) -> tuple[str, str]:
        async with session.post(router.url + CHAT, json=ask(alias, user)) as response:
            assert response.status == 200
            return user, response.headers["x-adapter-arm"]

    return dict(await asyncio.gather(*(one(user) for user in users)))


async def test_the_arm_is_the_formulas_on_every_worker_and_moves_one_way(
    router: Router, engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    users = [f"user-{n}" for n in range(150)]
    before: set[str] = set()
    for weight in (0.0, 10.0, 40.0, 100.0):
        await router.push(
            route(alias, target("base", engine.url), target(CANDIDATE, engine.url), weight=weight)
        )
        arms = await arms_of(session, router, alias, users)
        candidates = {user for user, arm in arms.items() if arm == "Candidate"}
        assert candidates == {
            user for user in users if assignment.is_candidate(assignment.draw(b"salt\0", user).place, weight)
        }
        assert before <= candidates
        before = candidates
    assert before == set(users)


async def test_pins_and_requests_without_key_and_their_counts(
    router: Router, engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    pin = Pin(headers=(HeaderMatch(name="X-Tenant", exact="acme"),), arm="Candidate")
    await router.push(
        route(alias, target("base", engine.url), target(CANDIDATE, engine.url), weight=50, pins=(pin,))
    )
    for _ in range(10):
        async with session.post(router.url + CHAT, json=ask(alias), headers={"x-tenant": "acme"}) as response:
            assert response.headers["x-adapter-arm"] == "Candidate"
    assert (await router.arm(alias, Arm.CANDIDATE)).requests == 0
    arms = [await arms_of(session, router, alias, [""]) for _ in range(60)]
    assert {arm for one in arms for arm in one.values()} == {"Stable", "Candidate"}
    counted = [(await router.arm(alias, arm)).requests for arm in (Arm.STABLE, Arm.CANDIDATE)]
    assert sum(counted) == 60


async def test_a_revision_that_is_not_served_any_more_is_no_error(
    router: Router, engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    await router.push(route(alias, target("base", engine.url)))
    headers = {"x-adapter-revision": CANDIDATE}
    async with session.post(router.url + CHAT, json=ask(alias, "u"), headers=headers) as response:
        assert response.status == 200
        assert response.headers["x-adapter-revision"] == "base"
        assert response.headers["x-adapter-fallback"] == "true"


async def test_a_header_is_the_key_before_the_body_and_the_api_key_last(
    router: Router, engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    await router.push(route(alias, target("base", engine.url), target(CANDIDATE, engine.url), weight=50))

    async def arm(headers: dict[str, str], user: str | None) -> str:
        found = set()
        for _ in range(8):
            async with session.post(router.url + CHAT, json=ask(alias, user), headers=headers) as response:
                found.add(response.headers["x-adapter-arm"])
        assert len(found) == 1, "the same key went to both arms"
        return found.pop()

    def expected(key: str) -> str:
        place = assignment.draw(b"salt\0", key).place
        return "Candidate" if assignment.is_candidate(place, 50) else "Stable"

    for key in ("a", "b", "c", "d"):
        assert await arm({"x-adapter-key": key}, "other") == expected(key)
        assert await arm({}, key) == expected(key)
        await arm({"authorization": f"Bearer sk-{key}"}, None)


@pytest.mark.parametrize(
    ("behaviour", "failed"),
    [
        (Behaviour(status=500), True),
        (Behaviour(status=503), True),
        (Behaviour(status=429), False),
        (Behaviour(break_after=0), True),
        (Behaviour(delay=30), True),
        (Behaviour(error_event=True), True),
        (Behaviour(chunks=(b"da", b'ta: {"err', b'or": {"message": "x"}}\n', b"\n"), chunk_delay=0.05), True),
        (
            Behaviour(
                chunks=(b": waiting\n\n", b'data: {"error": {}, "object": "error"}\n\n'), chunk_delay=0.05
            ),
            True,
        ),
        (Behaviour(chunks=(PACKED[:15], PACKED[15:]), headers={"Content-Encoding": "gzip"}), True),
        (Behaviour(chunks=(b'data: {"error": {"message": "x"}}',)), True),
        (Behaviour(chunks=(b"data: loading\n\n",)), True),
        (Behaviour(chunks=(b"data: {}\n\n",), headers={"Content-Encoding": "gzip"}), True),
        (Behaviour(chunks=(b": waiting\n\n",) * 100, chunk_delay=0.2), True),
        (Behaviour(status=302, raw=b"", headers={"Location": "/login"}), True),
        (Behaviour(status=204, raw=b""), True),
        (Behaviour(raw=b"<html>log in</html>", headers={"Content-Type": "Text/HTML; charset=utf-8"}), True),
        (Behaviour(raw=b"<html/>", headers={"Content-Type": "application/xhtml+xml"}), True),
        (Behaviour(raw=b"It works!", headers={"Content-Type": "application/json"}), True),
        (Behaviour(raw=b"{}", headers={"Content-Encoding": "gzip"}), True),
        (Behaviour(raw=WHOLE_ERROR), True),
        (Behaviour(raw=gzip.compress(WHOLE_ERROR), headers={"Content-Encoding": "gzip"}), True),
        (Behaviour(raw=b'{"choices": [{"mess'), True),
        (Behaviour(raw=b"{}"), True),
        (Behaviour(raw=b"[]"), True),
        (Behaviour(raw=gzip.compress(b'{"detail": "ok"}'), headers={"Content-Encoding": "gzip"}), True),
    ],
    ids=[
        "500",
        "503",
        "429",
        "reset",
        "silent",
        "error event",
        "error in pieces",
        "comment and error",
        "packed error",
        "error without an end",
        "no json",
        "not packed",
        "comments only",
        "redirect",
        "no content",
        "page",
        "xhtml",
        "text",
        "whole and not packed",
        "whole error",
        "packed whole error",
        "half a document",
        "empty object",
        "empty list",
        "packed without choices",
    ],
)
async def test_stable_answers_when_the_candidate_fails_before_the_first_byte(
    router: Router, session: aiohttp.ClientSession, alias: str, behaviour: Behaviour, failed: bool
) -> None:
    async with engines.running() as stable, engines.running() as broken:
        broken.behaviours[f"bot--{CANDIDATE}"] = behaviour
        await router.push(route(alias, target("base", stable.url), target(CANDIDATE, broken.url), weight=100))
        async with session.post(router.url + CHAT, json=ask(alias, "u", stream=True)) as response:
            assert response.status == 200
            assert "base-model" in await response.text()
            assert response.headers["x-adapter-fallback"] == "true"
            assert response.headers["x-adapter-arm"] == "Stable"
        candidate = await router.arm(alias, Arm.CANDIDATE)
        assert candidate.fallbacks == 1
        assert candidate.requests == int(failed)
        assert candidate.events.get("errors", 0) == int(failed)
        assert (await router.arm(alias, Arm.STABLE)).requests == 0


async def test_text_that_is_no_json_is_an_error_and_json_by_any_name_is_none(
    router: Router, engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    await router.push(route(alias, target("base", engine.url)))
    good = b'{"choices": [{"index": 0, "message": {"content": "{}"}, "finish_reason": "stop"}]}'
    for path, content_type, raw, expected in (
        (CHAT, "application/json; charset=utf-8", good, 0),
        (CHAT, "text/plain", good, 0),
        (CHAT, "application/octet-stream", good, 0),
        (CHAT, "text/plain", b"It works!", 1),
        (CHAT, "", b"It works!", 1),
        (CHAT, "audio/mpeg", b"\xff\xfb", 1),
        ("/v1/embeddings", "application/octet-stream", b"\xff\xfb", 0),
    ):
        before = (await router.arm(alias, Arm.STABLE)).events.get("errors", 0)
        engine.behaviours["base-model"] = Behaviour(raw=raw, headers={"Content-Type": content_type})
        async with session.post(router.url + path, json=ask(alias, "u")) as response:
            assert response.status == 200
            assert await response.read() == raw
        assert (await router.arm(alias, Arm.STABLE)).events.get("errors", 0) == before + expected, (
            content_type
        )


async def test_a_candidate_that_nobody_listens_for_falls_back_too(
    router: Router, engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        await router.push(route(alias, target("base", engine.url), target(CANDIDATE, url), weight=100))
        async with session.post(router.url + CHAT, json=ask(alias, "u")) as response:
            assert (response.status, response.headers["x-adapter-fallback"]) == (200, "true")
    assert (await router.arm(alias, Arm.CANDIDATE)).events == {"errors": 1}


async def test_a_candidate_that_refuses_what_stable_takes_fails(
    router: Router, engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    """For example because its chat template wants no system message."""
    await router.push(route(alias, target("base", engine.url), target(CANDIDATE, engine.url), weight=100))
    for stream, status in ((False, 400), (True, 501)):
        engine.behaviours[f"bot--{CANDIDATE}"] = Behaviour(status=status)
        async with session.post(router.url + CHAT, json=ask(alias, "u", stream=stream)) as response:
            assert response.status == 200
            assert "base-model" in await response.text()
            assert response.headers["x-adapter-arm"] == "Stable"
            assert response.headers["x-adapter-fallback"] == "true"
    candidate = await router.arm(alias, Arm.CANDIDATE)
    assert (candidate.requests, candidate.events["errors"], candidate.fallbacks) == (2, 2, 2)
    assert (await router.arm(alias, Arm.STABLE)).requests == 0


@pytest.mark.parametrize("stable", [Behaviour(status=422), Behaviour(status=500), Behaviour(delay=30)])
async def test_a_request_that_nobody_takes_is_the_clients_mistake(
    router: Router, engine: Engine, session: aiohttp.ClientSession, alias: str, stable: Behaviour
) -> None:
    engine.behaviours |= {f"bot--{CANDIDATE}": Behaviour(status=400), "base-model": stable}
    await router.push(route(alias, target("base", engine.url), target(CANDIDATE, engine.url), weight=100))
    async with session.post(router.url + CHAT, json=ask(alias, "u", stream=True)) as response:
        assert (response.status, response.headers["x-adapter-arm"]) == (400, "Candidate")
        assert "x-adapter-fallback" not in response.headers
    candidate = await router.arm(alias, Arm.CANDIDATE)
    assert (candidate.requests, candidate.events, candidate.fallbacks) == (0, {}, 0)
    assert engine.served("base-model") == 1


@pytest.mark.parametrize("weight", [0, 100])
async def test_an_api_that_the_model_does_not_have_is_the_clients_mistake(
    router: Router, engine: Engine, session: aiohttp.ClientSession, alias: str, weight: int
) -> None:
    """One client that asks a chat model for embeddings would have rolled its candidate back."""
    refusal = Behaviour(status=501)
    engine.behaviours |= {f"bot--{CANDIDATE}": refusal, "base-model": refusal}
    await router.push(route(alias, target("base", engine.url), target(CANDIDATE, engine.url), weight=weight))
    async with session.post(router.url + "/v1/embeddings", json=ask(alias, "u")) as response:
        assert response.status == 501
    for arm in (Arm.STABLE, Arm.CANDIDATE):
        counted = await router.arm(alias, arm)
        assert (counted.requests, counted.events, counted.fallbacks) == (0, {}, 0)


@pytest.mark.parametrize("status", [401, 403, 408, 413])
async def test_some_refusals_are_no_revisions_fault(
    router: Router, engine: Engine, session: aiohttp.ClientSession, alias: str, status: int
) -> None:
    engine.behaviours[f"bot--{CANDIDATE}"] = Behaviour(status=status)
    await router.push(route(alias, target("base", engine.url), target(CANDIDATE, engine.url), weight=100))
    async with session.post(router.url + CHAT, json=ask(alias, "u")) as response:
        assert response.status == status
    assert engine.served("base-model") == 0
    assert (await router.arm(alias, Arm.CANDIDATE)).requests == 0


async def test_without_retry_the_candidates_refusal_is_shown(
    router: Router, engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    engine.behaviours[f"bot--{CANDIDATE}"] = Behaviour(status=400)
    stable, candidate = target("base", engine.url), target(CANDIDATE, engine.url)
    await router.push(route(alias, stable, candidate, weight=100, retry_stable=False))
    async with session.post(router.url + CHAT, json=ask(alias, "u")) as response:
        assert (response.status, response.headers["x-adapter-arm"]) == (400, "Candidate")
    assert engine.served("base-model") == 0


async def test_a_shadow_that_refuses_what_stable_takes_fails_too(
    router: Router, engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    engine.behaviours[f"bot--{CANDIDATE}"] = Behaviour(status=400)
    await router.push(
        route(alias, target("base", engine.url), target(CANDIDATE, engine.url), weight=0, mirror=100)
    )
    await arms_of(session, router, alias, ["a", "b", "c"])
    async with asyncio.timeout(10):
        while (shadow := await router.arm(alias, Arm.SHADOW)).requests < 3:
            await asyncio.sleep(0.05)
    assert shadow.events == {"errors": 3}
    engine.behaviours["base-model"] = Behaviour(status=400)
    async with session.post(router.url + CHAT, json=ask(alias, "d")) as response:
        assert response.status == 400
    await asyncio.sleep(0.2)
    assert (await router.arm(alias, Arm.SHADOW)).requests == 3


async def test_a_candidate_that_hangs_leaves_stable_half_of_the_time_and_is_counted_meanwhile(
    router: Router, engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    engine.behaviours |= {f"bot--{CANDIDATE}": Behaviour(delay=30), "base-model": Behaviour(delay=0.5)}
    await router.push(route(alias, target("base", engine.url), target(CANDIDATE, engine.url), weight=100))

    async def post() -> tuple[int, str | None]:
        async with session.post(router.url + CHAT, json=ask(alias, "u")) as response:
            return response.status, response.headers.get("x-adapter-fallback")

    asking = asyncio.create_task(post())
    await asyncio.sleep(1.0)
    candidate = await router.arm(alias, Arm.CANDIDATE)
    assert not asking.done()
    assert (candidate.requests, candidate.events) == (1, {"slow": 1, "long": 1})
    assert await asking == (200, "true")
    candidate = await router.arm(alias, Arm.CANDIDATE)
    assert (candidate.requests, candidate.events) == (1, {"slow": 1, "long": 1, "errors": 1})


async def test_users_who_left_a_slow_candidate_are_counted(
    router: Router, engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    engine.behaviours[f"bot--{CANDIDATE}"] = Behaviour(delay=30)
    await router.push(route(alias, target("base", engine.url), target(CANDIDATE, engine.url), weight=100))
    for stream, seconds in ((False, 0.6), (True, 0.6), (False, 0.1)):
        with pytest.raises(TimeoutError):
            await session.post(
                router.url + CHAT,
                json=ask(alias, "u", stream=stream),
                timeout=aiohttp.ClientTimeout(total=seconds),
            )
    await asyncio.sleep(0.2)
    candidate = await router.arm(alias, Arm.CANDIDATE)
    assert (candidate.requests, candidate.events) == (2, {"slow": 2, "long": 2})


async def test_without_retry_the_candidates_failure_is_shown(
    router: Router, engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    engine.behaviours[f"bot--{CANDIDATE}"] = Behaviour(status=500)
    await router.push(
        route(
            alias, target("base", engine.url), target(CANDIDATE, engine.url), weight=100, retry_stable=False
        )
    )
    async with session.post(router.url + CHAT, json=ask(alias, "u")) as response:
        assert response.status == 500
    candidate = await router.arm(alias, Arm.CANDIDATE)
    assert (candidate.requests, candidate.events["errors"], candidate.fallbacks) == (1, 1, 0)


async def test_a_candidate_that_was_just_unloaded_is_no_error_of_its(
    router: Router, session: aiohttp.ClientSession, alias: str
) -> None:
    async with engines.running("base-model") as engine:
        await router.push(
            route(
                alias,
                target("base", engine.url),
                target(CANDIDATE, engine.url),
                weight=100,
                retry_stable=False,
            )
        )
        async with session.post(router.url + CHAT, json=ask(alias, "u")) as response:
            assert (response.status, response.headers["x-adapter-fallback"]) == (200, "true")
        candidate = await router.arm(alias, Arm.CANDIDATE)
        assert (candidate.requests, candidate.fallbacks) == (0, 1)


async def test_never_in_the_middle_of_a_stream(
    router: Router, engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    engine.behaviours[f"bot--{CANDIDATE}"] = Behaviour(text="one two three four five", break_after=3)
    await router.push(route(alias, target("base", engine.url), target(CANDIDATE, engine.url), weight=100))
    async with session.post(router.url + CHAT, json=ask(alias, "u", stream=True)) as response:
        assert response.status == 200
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()
    assert engine.served("base-model") == 0
    candidate = await router.arm(alias, Arm.CANDIDATE)
    assert (candidate.requests, candidate.events["errors"]) == (1, 1)


async def test_a_stream_has_its_time_however_the_client_asked_for_it(
    router: Router, engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    """Engines take 1 for true; the stream takes more than a candidate's half of the four seconds."""
    engine.behaviours[f"bot--{CANDIDATE}"] = Behaviour(text="one two three four five six", chunk_delay=0.35)
    await router.push(route(alias, target("base", engine.url), target(CANDIDATE, engine.url), weight=100))
    async with session.post(router.url + CHAT, json=ask(alias, "u", stream=1)) as response:
        assert response.headers["x-adapter-arm"] == "Candidate"
        assert (await response.read()).endswith(b"data: [DONE]\n\n")


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


async def test_a_route_without_stable_and_one_whose_engines_lack_the_model(
    router: Router, session: aiohttp.ClientSession, alias: str
) -> None:
    async with engines.running("something-else") as engine:
        for stable in (None, target("base", engine.url), target("base")):
            await router.push(route(alias, stable))
            async with session.post(router.url + CHAT, json=ask(alias, "u")) as response:
                assert response.status == 503
                assert int(response.headers["retry-after"]) > 0
                assert (await response.json())["error"]["code"] == "model_not_ready"


async def test_nothing_fails_while_the_routes_move(
    router: Router, session: aiohttp.ClientSession, alias: str
) -> None:
    """Weights go up and down, the candidate is loaded, promoted and unloaded under load; streams run on."""
    async with engines.running("base-model") as engine:
        assert engine.models is not None
        stop = asyncio.Event()
        statuses: list[int] = []

        async def client(number: int) -> None:
            while not stop.is_set():
                body = ask(alias, f"user-{number}-{len(statuses)}", stream=number % 2 == 0)
                async with session.post(router.url + CHAT, json=body) as response:
                    statuses.append(response.status)
                    assert (await response.read()).rstrip().endswith((b"}", b"[DONE]"))

        engine.behaviours["base-model"] = Behaviour(chunk_delay=0.005)
        base, revision = target("base", engine.url), target(CANDIDATE, engine.url)
        await router.push(route(alias, base))
        clients = [asyncio.create_task(client(number)) for number in range(12)]
        for _ in range(4):
            engine.models.add(revision.served_name)
            for weight in (5.0, 50.0, 100.0):
                await router.push(route(alias, base, revision, weight=weight))
                await asyncio.sleep(0.03)
            engine.models.discard(revision.served_name)  # before the routes know: the worst order
            await asyncio.sleep(0.05)
            await router.push(route(alias, base))
            await asyncio.sleep(0.03)
        stop.set()
        await asyncio.gather(*clients)
        assert len(statuses) > 100
        assert set(statuses) == {200}


async def test_large_bodies_are_not_kept_for_a_mirror_that_hangs(
    own_router: Callable[..., Router], session: aiohttp.ClientSession, alias: str
) -> None:
    """Their own requests are over, so that --max-buffered-bytes knows nothing of them."""
    router = own_router("--max-buffered-bytes", "4000000")
    await asyncio.to_thread(router.start)
    async with engines.running() as stable, engines.running() as shadow:
        name = f"bot--{CANDIDATE}"
        shadow.behaviours[name] = Behaviour(delay=1.0)
        await router.push(
            route(alias, target("base", stable.url), target(CANDIDATE, shadow.url), weight=0, mirror=100)
        )

        async def send(size: int) -> None:
            async with session.post(router.url + CHAT, json=ask(alias, "u", pad="x" * size)) as response:
                assert response.status == 200

        for size in (600_000, 600_000, 10, 600_000):
            await send(size)
        await asyncio.sleep(1.5)
        await send(600_000)
        await asyncio.sleep(1.5)
        metrics = await router.metrics()
        for outcome, count in (("answered", 3), ("dropped", 2)):
            line = f'adapter_router_mirror_total{{alias="{alias}",outcome="{outcome}"}} {count:.1f}'
            assert line in metrics


async def test_mirrored_requests_are_counted_and_slow_nobody(
    router: Router, session: aiohttp.ClientSession, alias: str
) -> None:
    async with engines.running() as stable, engines.running() as shadow:
        name = f"bot--{CANDIDATE}"
        shadow.behaviours[name] = Behaviour(text="I'm sorry, but I can't help with that.", delay=0.6)
        await router.push(
            route(alias, target("base", stable.url), target(CANDIDATE, shadow.url), weight=0, mirror=100)
        )
        started = asyncio.get_running_loop().time()
        arms = await arms_of(session, router, alias, [f"u{n}" for n in range(10)])
        assert asyncio.get_running_loop().time() - started < 0.5
        assert set(arms.values()) == {"Stable"}
        await asyncio.sleep(1.0)
        assert shadow.served(name) == 10
        counted = await router.arm(alias, Arm.SHADOW)
        assert (counted.requests, counted.events["refused"], counted.events["slow"]) == (10, 10, 10)
        assert (await router.arm(alias, Arm.STABLE)).requests == 10
        assert (await router.arm(alias, Arm.CANDIDATE)).requests == 0
        shadow.behaviours[name] = Behaviour(break_after=0)
        await arms_of(session, router, alias, ["one-more"])
        await asyncio.sleep(0.2)
        assert (await router.arm(alias, Arm.SHADOW)).events["errors"] == 1
        assert (
            f'adapter_router_mirror_total{{alias="{alias}",outcome="failed"}} 1.0' in await router.metrics()
        )


async def test_the_model_is_all_that_changes_in_the_body(
    router: Router, engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    await router.push(route(alias, target("base", engine.url)))
    text = '{ "messages" : [{"content":"the \\"model\\": \\u00fc \\\\"}],\n"temperature":1.50,"model" :"NAME" , "n":1 }'
    for padding in ("", " " * 40_000):  # parsed whole, and scanned
        body = text.replace("NAME", alias) + padding
        async with session.post(router.url + CHAT, data=body.encode()) as response:
            assert response.status == 200
        assert engine.seen[-1].body.decode() == text.replace("NAME", "base-model") + padding
    twice = json.dumps({"model": "nobody"})[:-1] + f', "mo\\u0064el": "{alias}"}}'
    async with session.post(router.url + CHAT, data=twice) as response:
        assert response.status == 200
    assert engine.seen[-1].body.decode() == '{"model": "base-model", "mo\\u0064el": "base-model"}'

"""What happens when the candidate fails: stable answers in its place, and it is counted."""

from __future__ import annotations

import asyncio
import gzip
import socket
from collections.abc import Callable

import aiohttp
import pytest

from finetune_operator.api.routes import Arm
from tests.integration.router import engines
from tests.integration.router.engines import Behaviour, Engine
from tests.integration.router.routers import CANDIDATE, CHAT, Router, arms_of, ask, route, target

WHOLE_ERROR = b'{"object": "error", "message": "CUDA out of memory"}'
PACKED = gzip.compress(b'data: {"error": {"message": "CUDA out of memory"}}\n\n')


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
        (Behaviour(raw=b"", headers={"Content-Type": "text/event-stream"}), True),
        (Behaviour(chunks=(b"data: [DONE]\n\n",)), True),
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
        "no bytes",
        "nothing but the end",
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
        (CHAT, "application/octet-stream", b'{"choices": [{"mess', 1),
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
async def test_no_refusal_is_left_to_the_candidate_alone(
    router: Router, engine: Engine, session: aiohttp.ClientSession, alias: str, status: int
) -> None:
    """Its engines may have a wrong key, or a lower limit; where stable refuses too, it says nothing of either."""
    engine.behaviours[f"bot--{CANDIDATE}"] = Behaviour(status=status)
    await router.push(route(alias, target("base", engine.url), target(CANDIDATE, engine.url), weight=100))
    async with session.post(router.url + CHAT, json=ask(alias, "u")) as response:
        assert (response.status, response.headers["x-adapter-fallback"]) == (200, "true")
    engine.behaviours["base-model"] = Behaviour(status=status)
    async with session.post(router.url + CHAT, json=ask(alias, "u")) as response:
        assert response.status == status
    candidate = await router.arm(alias, Arm.CANDIDATE)
    assert (candidate.requests, candidate.events) == (1, {"errors": 1})


@pytest.mark.parametrize(
    ("more", "candidate", "errors"),
    [
        ({"weight": 1}, Behaviour(), 1),
        ({"weight": 0, "mirror": 1e-9}, Behaviour(), 1),
        ({"weight": 1}, Behaviour(status=422), 0),
        ({"weight": 1}, Behaviour(status=500), 0),
    ],
    ids=["weight", "mirror", "neither takes it", "candidate fails"],
)
async def test_stable_that_refuses_what_the_candidate_takes_fails_too(
    router: Router,
    engine: Engine,
    session: aiohttp.ClientSession,
    alias: str,
    more: dict[str, float],
    candidate: Behaviour,
    errors: int,
) -> None:
    engine.behaviours |= {f"bot--{CANDIDATE}": candidate, "base-model": Behaviour(status=400)}
    await router.push(route(alias, target("base", engine.url), target(CANDIDATE, engine.url), **more))
    async with session.post(router.url + CHAT, json=ask(alias, "u")) as response:
        assert (response.status, response.headers["x-adapter-arm"]) == (400, "Stable")
    async with asyncio.timeout(10):
        while not engine.served(f"bot--{CANDIDATE}") or engine.open:
            await asyncio.sleep(0.05)
    await asyncio.sleep(0.2)
    stable = await router.arm(alias, Arm.STABLE)
    assert (stable.requests, stable.events.get("errors", 0)) == (errors, errors)
    for arm in (Arm.CANDIDATE, Arm.SHADOW):
        assert (await router.arm(alias, arm)).requests == 0
    assert f'alias="{alias}",arm="Stable",code="400",revision="base"}} 1.0' in await router.metrics()


@pytest.mark.parametrize(
    "more", [{"weight": 0}, {"weight": 1, "retry_stable": False}], ids=["no comparison", "no retry"]
)
async def test_stables_refusal_is_its_own_where_the_candidates_is(
    router: Router, engine: Engine, session: aiohttp.ClientSession, alias: str, more: dict[str, float]
) -> None:
    engine.behaviours["base-model"] = Behaviour(status=400)
    await router.push(route(alias, target("base", engine.url), target(CANDIDATE, engine.url), **more))
    async with session.post(router.url + CHAT, json=ask(alias, "u")) as response:
        assert response.status == 400
    await asyncio.sleep(0.2)
    assert engine.served(f"bot--{CANDIDATE}") == 0
    assert (await router.arm(alias, Arm.STABLE)).requests == 0


async def test_without_room_for_copies_nothing_is_asked_beside_an_answer(
    own_router: Callable[..., Router], engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    router = own_router("--max-mirrors", "0")
    await asyncio.to_thread(router.start)
    engine.behaviours["base-model"] = Behaviour(status=400)
    await router.push(route(alias, target("base", engine.url), target(CANDIDATE, engine.url), weight=1))
    async with session.post(router.url + CHAT, json=ask(alias, "u")) as response:
        assert response.status == 400
    await asyncio.sleep(0.2)
    assert engine.served(f"bot--{CANDIDATE}") == 0
    assert (await router.arm(alias, Arm.STABLE)).requests == 0
    assert f'alias="{alias}",arm="Stable",code="400",revision="base"}} 1.0' in await router.metrics()


async def test_the_rest_of_a_second_opinion_is_not_waited_for(
    router: Router, engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    name = f"bot--{CANDIDATE}"
    engine.behaviours |= {
        name: Behaviour(text="word " * 100, chunk_delay=0.1),
        "base-model": Behaviour(status=400),
    }
    await router.push(route(alias, target("base", engine.url), target(CANDIDATE, engine.url), weight=1))
    async with session.post(router.url + CHAT, json=ask(alias, "u", stream=True)) as response:
        assert response.status == 400
    async with asyncio.timeout(3):
        while not engine.cancelled:
            await asyncio.sleep(0.05)
    assert (await router.arm(alias, Arm.STABLE)).events["errors"] == 1


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

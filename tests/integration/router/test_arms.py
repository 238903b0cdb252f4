"""Which arm answers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import aiohttp

from finetune_operator.api.routes import Arm, HeaderMatch, Pin
from finetune_router import assignment
from tests.integration.router import engines
from tests.integration.router.engines import Behaviour, Engine
from tests.integration.router.routers import CANDIDATE, CHAT, Router, arms_of, ask, route, target


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

"""Several router processes: every user has one side at all of them, and one that is added serves before it counts."""

from __future__ import annotations

import asyncio
import itertools
import re
import socket
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest

from finetune_operator.adapters import fetching
from finetune_operator.adapters.addresses import Resolver
from finetune_operator.adapters.fetching import TokenFile
from finetune_operator.adapters.routers import Routers
from finetune_operator.api.routes import Snapshot
from finetune_operator.manifests.routes import to_text
from finetune_operator.reconcile.fleet import LAG_SECONDS, Fleet
from finetune_router import assignment
from tests.integration.router import engines
from tests.integration.router.routers import ADMIN_TOKEN, Router, route, target
from tests.waiting import until

CANDIDATE = "ab12cd34"
USERS = 10_000
CONNECTIONS = 16
ANSWER = (
    b'{"id":"c","object":"text_completion","created":1,"model":"m",'
    b'"choices":[{"index":0,"text":"a cup","finish_reason":"stop"}]}'
)
ARM = re.compile(rb"\r\nx-adapter-arm: (\w+)\r\n", re.IGNORECASE)


class TrivialEngine(asyncio.Protocol):
    """Answers each request alike, at the least cost."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport, self._buffer = transport, b""

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[:end].lower()
            found = re.search(rb"content-length: (\d+)", head)
            whole = end + 4 + (int(found[1]) if found else 0)
            if len(self._buffer) < whole:
                return
            self._buffer = self._buffer[whole:]
            self._transport.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
                % (len(ANSWER), ANSWER)
            )


@asynccontextmanager
async def trivial_engine() -> AsyncIterator[str]:
    server = await asyncio.get_running_loop().create_server(TrivialEngine, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()


async def ask_all(router: Router, users: range) -> dict[int, str]:
    """The side of each user at one router: plain keep-alive requests over a few connections."""

    async def some(part: range) -> dict[int, str]:
        reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
        sides = {}
        for user in part:
            body = b'{"model":"bot","prompt":"a cup","user":"user %d"}' % user
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: r\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200"), head
            length = re.search(rb"content-length: (\d+)", head.lower())
            assert length is not None
            await reader.readexactly(int(length[1]))
            arm = ARM.search(head)
            assert arm is not None, head
            sides[user] = arm[1].decode()
        writer.close()
        return sides

    parts = [users[index::CONNECTIONS] for index in range(CONNECTIONS)]
    return {user: side for sides in await asyncio.gather(*map(some, parts)) for user, side in sides.items()}


@pytest.fixture
def three_routers(tmp_path: Path) -> Iterator[list[Router]]:
    routers = [Router(tmp_path / f"router-{number}") for number in range(3)]
    for router in routers:
        router.start()
    yield routers
    for router in routers:
        router.kill()


async def test_ten_thousand_users_have_one_side_at_every_replica_and_move_one_way(
    three_routers: list[Router],
) -> None:
    async with trivial_engine() as url:

        async def weigh(weight: float) -> None:
            for router in three_routers:
                await router.push(route("bot", target("base", url), target(CANDIDATE, url), weight=weight))

        everybody = range(USERS)
        await weigh(20)
        first, second, third = await asyncio.gather(*(ask_all(r, everybody) for r in three_routers))
        assert first == second == third
        before = {user for user, side in first.items() if side == "Candidate"}
        formula = {
            user
            for user in everybody
            if assignment.is_candidate(assignment.draw(b"salt\0", f"user {user}").place, 20)
        }
        assert before == formula
        assert abs(len(before) - 0.2 * USERS) < 4 * (USERS * 0.2 * 0.8) ** 0.5

        await weigh(60)
        thirds = [range(number, USERS, 3) for number in range(3)]
        parts = await asyncio.gather(*(ask_all(r, t) for r, t in zip(three_routers, thirds, strict=True)))
        after = {user for sides in parts for user, side in sides.items() if side == "Candidate"}
        assert before < after, "raising the weight moves users to the candidate and nobody back"

        await weigh(20)
        again = await ask_all(three_routers[1], everybody)
        assert {user for user, side in again.items() if side == "Candidate"} == before
        counted = Counter(first.values())
        print(f"{USERS} users at 3 routers: {dict(counted)} at 20%, {len(after)} at 60%")


async def test_a_replica_that_is_added_gets_the_route_before_it_counts(tmp_path: Path) -> None:
    """Behind one name, as a headless Service has it: the same port at a second address."""
    first = Router(tmp_path / "first", "--admin-host", "127.0.0.1")
    first.start(wait_ready=False)
    second = Router(tmp_path / "second", "--admin-host", "127.0.0.2", "--admin-port", str(first.admin_port))
    addresses = ["127.0.0.1"]

    async def lookup(host: str, port: int) -> list[tuple[int, str]]:
        return [(socket.AF_INET, address) for address in addresses]

    token = tmp_path / "token"
    token.write_text(ADMIN_TOKEN)
    async with engines.running() as engine, fetching.open_session() as session:
        bot = route("bot", target("base", engine.url), target(CANDIDATE, engine.url), weight=50)
        name = f"http://localhost:{first.admin_port}"
        fleet = Fleet(Routers(session, Resolver(lookup), [name], TokenFile(token)))
        fleet.hurry = True
        polling = asyncio.create_task(fleet.run())
        try:
            snapshot = Snapshot(version=7, routes=(bot,))
            fleet.offer(7, to_text(snapshot).encode())
            await until(lambda: fleet.count_applying(7) == 1 and len(fleet.replicas) == 1, seconds=60)
            await asyncio.sleep(LAG_SECONDS)  # before, a replica may still apply what was before these routes
            await asyncio.to_thread(second.start, wait_ready=False)
            addresses.append("127.0.0.2")
            moments: list[tuple[int, int, int]] = []

            def whole() -> bool:
                known, heard = len(fleet.replicas), len(fleet.counters())
                moment = known, fleet.count_applying(7), heard
                if moment not in moments[-1:]:
                    moments.append(moment)
                return (known, heard) == (2, 2)

            await until(whole, seconds=60)
            # Nobody's counters are taken before the replica applies the routes. One that is late with an answer still
            # counts by what it told before.
            most = itertools.accumulate((applied for _, applied, _ in moments), max)
            pairs = zip(moments, most, strict=True)
            assert all(heard <= max(applied, 1) for (_, _, heard), applied in pairs), moments
            assert {told.version for told in fleet.counters()} == {7}
            async with (
                aiohttp.ClientSession() as client,
                client.post(
                    f"http://127.0.0.1:{second.port}/v1/completions", json={"model": "bot", "prompt": "x"}
                ) as answer,
            ):
                assert answer.status == 200
                assert answer.headers["x-adapter-arm"] in ("Stable", "Candidate")
        finally:
            polling.cancel()
            await asyncio.gather(polling, return_exceptions=True)
            first.kill()
            second.kill()

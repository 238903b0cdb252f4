"""A load generator for the router's benchmark: raw sockets, keep-alive, one process; prints one JSON object.

Closed loop: each connection sends its next request when it has the answer. Open loop: requests are sent at fixed times
whatever comes back, and times count from when a request was due, so that a stall is seen by all that wait behind it.

    python -m benchmarks.router_load --port 8080 --mode closed --connections 32 --seconds 5
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import deque
from dataclasses import dataclass, field
from typing import cast

import httptools
import uvloop


@dataclass
class Tally:
    """What came back. Times in seconds."""

    latencies: list[float] = field(default_factory=list)
    first_bytes: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    errors: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Load:
    """What is sent, and how."""

    request: tuple[bytes, ...]
    """Bodies with heads; taken in turn."""
    port: int
    connections: int
    seconds: float
    rate: float
    """Requests a second; 0 for a closed loop."""


class Client(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._done: asyncio.Future[None] | None = None
        self._due = 0.0
        self._last = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._finish(ok=False)

    @property
    def is_open(self) -> bool:
        return self._transport is not None

    async def request(self, data: bytes, due: float) -> None:
        assert self._transport is not None
        self._parser = httptools.HttpResponseParser(self)
        self._done = asyncio.get_running_loop().create_future()
        self._due = due
        self._last = 0.0
        self._transport.write(data)
        await self._done

    def data_received(self, data: bytes) -> None:
        self._tally.bytes += len(data)
        if self._parser is not None:
            self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        now = time.perf_counter()
        if self._last:
            self._tally.gaps.append(now - self._last)
        else:
            self._tally.first_bytes.append(now - self._due)
        self._last = now

    def on_message_complete(self) -> None:
        parser = self._parser
        self._finish(ok=parser is not None and parser.get_status_code() == 200)

    def _finish(self, *, ok: bool) -> None:
        if self._done is None or self._done.done():
            return
        if ok:
            self._tally.latencies.append(time.perf_counter() - self._due)
        else:
            self._tally.errors += 1
        self._done.set_result(None)


async def connect(port: int, tally: Tally) -> Client:
    _, client = await asyncio.get_running_loop().create_connection(lambda: Client(tally), "127.0.0.1", port)
    return client


async def run_closed(load: Load, tally: Tally) -> None:
    end = time.perf_counter() + load.seconds

    async def one(number: int) -> None:
        client = await connect(load.port, tally)
        turn = number
        while (now := time.perf_counter()) < end:
            if not client.is_open:
                client = await connect(load.port, tally)
            await client.request(load.request[turn % len(load.request)], now)
            turn += load.connections

    await asyncio.gather(*(one(number) for number in range(load.connections)))


async def run_open(load: Load, tally: Tally) -> None:
    """At most `connections` requests are under way; beyond that they wait, and their time runs."""
    idle = deque([await connect(load.port, tally) for _ in range(min(load.connections, 64))])
    opened = len(idle)
    waiting: set[asyncio.Task[None]] = set()
    places = asyncio.Semaphore(load.connections)

    async def one(data: bytes, due: float) -> None:
        nonlocal opened
        async with places:
            client = None
            while idle and client is None:
                client = idle.pop()
                if not client.is_open:
                    client = None
            if client is None:
                client = await connect(load.port, tally)
                opened += 1
            await client.request(data, due)
            idle.append(client)

    start = time.perf_counter()
    for number in range(int(load.rate * load.seconds)):
        due = start + number / load.rate
        pause = due - time.perf_counter()
        if pause > 0:
            await asyncio.sleep(pause)
        task = asyncio.create_task(one(load.request[number % len(load.request)], due))
        waiting.add(task)
        task.add_done_callback(waiting.discard)
    if waiting:
        await asyncio.wait(waiting, timeout=60)


def build_requests(
    *, model: str, aliases: int, users: int, size: int, stream: bool, port: int
) -> tuple[bytes, ...]:
    """Whole requests with bodies of about `size` bytes, one of each user; with several aliases, for each in turn."""
    requests = []
    for number in range(users):
        name = model if aliases <= 1 else f"{model}-{number % aliases}"
        document = {
            "model": name,
            "user": f"user-{number}",
            "stream": stream,
            "messages": [{"role": "user", "content": ""}],
        }
        padding = max(0, size - len(json.dumps(document)))
        document["messages"] = [
            {"role": "user", "content": ("some words of a prompt " * (padding // 23 + 1))[:padding]}
        ]
        body = json.dumps(document).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer sk-bench\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        requests.append(head.encode() + body)
    return tuple(requests)


def quantile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))] if values else float("nan")


def report(tally: Tally, seconds: float) -> dict[str, float]:
    return {
        "requests": len(tally.latencies),
        "errors": tally.errors,
        "per_second": len(tally.latencies) / seconds,
        "p50": quantile(tally.latencies, 0.5),
        "p99": quantile(tally.latencies, 0.99),
        "ttft_p50": quantile(tally.first_bytes, 0.5),
        "ttft_p99": quantile(tally.first_bytes, 0.99),
        "gap_p99": quantile(tally.gaps, 0.99),
        "chunks": len(tally.first_bytes) + len(tally.gaps),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rate", type=float, default=0.0, help="requests a second; 0: closed loop")
    parser.add_argument("--size", type=int, default=1024, help="bytes of a body")
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--model", default="support-bot")
    parser.add_argument("--aliases", type=int, default=1)
    parser.add_argument("--users", type=int, default=1)
    options = parser.parse_args()
    load = Load(
        request=build_requests(
            model=options.model,
            aliases=options.aliases,
            users=options.users,
            size=options.size,
            stream=options.stream,
            port=options.port,
        ),
        port=options.port,
        connections=options.connections,
        seconds=options.seconds,
        rate=options.rate,
    )
    tally = Tally()
    started = time.perf_counter()
    uvloop.run(run_open(load, tally) if load.rate else run_closed(load, tally))
    print(json.dumps(report(tally, time.perf_counter() - started)))


if __name__ == "__main__":
    main()

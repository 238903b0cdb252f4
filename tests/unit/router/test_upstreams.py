"""Connections to engines: their timer, which all exchanges share, and what they make of odd answers."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from unittest import mock

import pytest

from finetune_router.connections import ConnectFailedError, Connection, UpstreamTimeoutError
from finetune_router.upstreams import Upstream, parse_address

HEAD = b"POST / HTTP/1.1\r\nhost: e\r\ncontent-length: 0\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


@asynccontextmanager
async def engine(*delays: float) -> AsyncIterator[Upstream]:
    """Answers its requests after these times, in turn."""
    waits = iter(delays)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readuntil(b"\r\n\r\n"):
            await asyncio.sleep(next(waits))
            writer.write(ANSWER)

    def quietly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(serve(reader, writer))
        task.add_done_callback(lambda done: writer.close() if done.cancelled() or done.exception() else None)

    server = await asyncio.start_server(quietly, "127.0.0.1", 0)
    try:
        yield Upstream(parse_address(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
    finally:
        server.close()


async def exchange(connection: Connection, *, timeout: float) -> float:  # noqa: ASYNC109 - it is what is tested
    """Seconds until the whole answer."""
    began = time.perf_counter()
    connection.send(HEAD, b"", timeout=timeout)
    assert await connection.wait_complete(1000) == b"ok"
    assert connection.finish()
    return time.perf_counter() - began


async def test_the_timer_of_one_exchange_does_not_end_the_next_one() -> None:
    async with engine(0.0, 0.0, 0.5) as upstream:
        connection = await upstream.connect(within=5)
        await exchange(connection, timeout=0.2)
        await asyncio.sleep(0.3)  # it fires between two exchanges
        assert not connection.closed
        await exchange(connection, timeout=0.3)
        assert await exchange(connection, timeout=30) >= 0.5
        connection.abort()


async def test_a_shorter_time_counts_after_a_longer_one() -> None:
    async with engine(0.0, 5.0) as upstream:
        connection = await upstream.connect(within=5)
        await exchange(connection, timeout=900)
        began = time.perf_counter()
        with pytest.raises(UpstreamTimeoutError):
            await exchange(connection, timeout=0.1)
        assert time.perf_counter() - began < 2
        assert connection.closed


async def test_a_longer_time_counts_after_a_shorter_one_and_is_kept() -> None:
    async with engine(0.0, 5.0) as upstream:
        connection = await upstream.connect(within=5)
        await exchange(connection, timeout=0.2)
        began = time.perf_counter()
        with pytest.raises(UpstreamTimeoutError):
            await exchange(connection, timeout=0.6)
        assert 0.55 < time.perf_counter() - began < 3


async def answered(*pieces: bytes, then_closed: bool = False) -> Connection:
    """A connection over which these bytes came as an answer."""
    connection = Connection(asyncio.get_running_loop())
    connection.connection_made(mock.create_autospec(asyncio.Transport))
    connection.send(HEAD, b"", timeout=5.0)
    for piece in pieces:
        connection.data_received(piece)
    if then_closed:
        connection.connection_lost(None)
    await connection.wait_body()
    return connection


async def test_a_trailer_is_no_header() -> None:
    connection = await answered(
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-type: text/plain\r\n\r\n2\r\nok\r\n",
        b"0\r\ncontent-encoding: gzip\r\nset-cookie: a=b\r\n\r\n",
    )
    assert await connection.wait_complete(1000) == b"ok"
    assert connection.headers == [(b"transfer-encoding", b"chunked"), (b"content-type", b"text/plain")]
    assert connection.finish()


async def test_an_answer_without_a_body_has_an_end_all_the_same() -> None:
    began = time.perf_counter()
    connection = await answered(b"HTTP/1.1 200 OK\r\n\r\n", then_closed=True)
    assert await connection.wait_complete(1000) == b""
    assert connection.last_body_at >= began
    assert not connection.started


async def test_a_host_name_that_can_be_none_is_not_reached() -> None:
    with pytest.raises(ConnectFailedError):
        await Upstream(parse_address("http://a..b:8000")).connect(within=5)


async def test_a_name_is_looked_up_once_for_all_who_wait_and_anew_for_those_who_come_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    answer = threading.Event()

    def look_up(host: str, *_: object) -> list[object]:
        asked.append(host)
        answer.wait(10)
        raise socket.gaierror(socket.EAI_AGAIN, "no name server answers")

    upstream = Upstream(parse_address("http://silent.test"))

    async def give_up() -> None:
        with pytest.raises(ConnectFailedError):
            await upstream.connect(within=0.02)

    with monkeypatch.context() as names:
        names.setattr(socket, "getaddrinfo", look_up)
        for _ in range(3):
            await asyncio.gather(give_up(), give_up())
        assert asked == ["silent.test"]
        answer.set()
        with pytest.raises(ConnectFailedError, match="no name server answers"):
            await upstream.connect(within=5)
        with pytest.raises(ConnectFailedError, match="no name server answers"):
            await upstream.connect(within=5)
    assert asked == ["silent.test"] * 2


async def test_the_next_address_of_a_name_is_tried_while_the_first_one_is_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.socket() as dead, contextlib.ExitStack() as stack:
        dead.bind(("127.0.0.1", 0))
        dead.listen(0)
        for _ in range(3):  # its queue is full: the kernel drops what else comes
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(dead.getsockname())
        port = dead.getsockname()[1]
        server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.2", port)
        found = [
            (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (host, port))
            for host in ("127.0.0.1", "127.0.0.2")
        ]
        with monkeypatch.context() as names:
            names.setattr(socket, "getaddrinfo", lambda *_: found)
            connection = await Upstream(parse_address(f"http://engines.test:{port}")).connect(within=3)
        connection.abort()
        server.close()

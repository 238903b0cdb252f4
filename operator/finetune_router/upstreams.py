"""Connections to the engines: HTTP/1.1 on asyncio protocols with httptools, kept alive and reused.

aiohttp's client costs about four fifths of the time of a proxied request (docs/router.md has the numbers), so the
upstream side is written directly on the parser. It sends whole bodies with a Content-Length and reads answers of any
framing; a full read buffer pauses the socket, so that a slow reader costs a bounded amount of memory.
"""

from __future__ import annotations

import asyncio
import functools
import math
import ssl
import time
from collections import deque
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import httptools

HIGH_WATER = 256 * 1024  # bytes kept for a slow reader before the engine's socket is paused
LOW_WATER = 64 * 1024
DOWN_SECONDS = 2.0  # an engine that could not be reached is left out for so long, where there are others
IDLE_SECONDS = 4.0  # engines on uvicorn close an idle connection after 5 s
_JOIN_BELOW = 16 * 1024  # bytes; copying a shorter body costs less than a second buffer
_HEAD_LIMIT = 64 * 1024  # bytes of response headers


class UpstreamError(Exception):
    """The engine gave no whole answer."""


class ConnectFailedError(UpstreamError):
    """Nothing listens there, or not within the time; nothing was sent."""


class ResetError(UpstreamError):
    """The connection ended, or spoke no HTTP, before the answer was complete."""


class UpstreamTimeoutError(UpstreamError):
    """A deadline passed."""


@dataclass(frozen=True, slots=True)
class Address:
    """A base URL, taken apart."""

    url: str
    host: str
    port: int
    secure: bool
    prefix: str
    """Path before the API's own, without a trailing slash."""

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"


def parse_address(url: str) -> Address:
    """Raises ValueError for anything but http(s)://host[:port][/prefix]."""
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError(f"{url!r} is no http:// or https:// URL")
    secure = parts.scheme == "https"
    return Address(
        url=url,
        host=parts.hostname,
        port=parts.port or (443 if secure else 80),
        secure=secure,
        prefix=parts.path.rstrip("/"),
    )


class Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._error: UpstreamError | None = None
        self._chunks: deque[bytes] = deque()
        self._buffered = 0
        self.paused = False
        self._until_close = False
        self._deadline = 0.0
        self._silence = math.inf
        self.closed = False
        self.used = False
        self.idle_since = 0.0
        self._reset()

    def _reset(self) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.head_complete = False
        self.complete = False
        self.started = False
        self.first_body_at = 0.0
        self.last_body_at = 0.0
        self._head_bytes = 0
        self._keep_alive = False

    # Exchange

    def send(self, head: bytes, body: bytes, *, timeout: float) -> None:
        """Write a request; the first byte of the answer's body must come within `timeout` seconds."""
        if self._transport is None or self.closed:
            raise ResetError("the connection is closed")
        self._reset()
        self._parser = httptools.HttpResponseParser(self)
        self._error = None
        self.set_timeout(timeout)
        if len(body) < _JOIN_BELOW:
            self._transport.write(head + body)
        else:
            self._transport.writelines((head, body))

    def set_timeout(self, seconds: float, *, silence: float = math.inf) -> None:
        """Fail the exchange when it is not over in `seconds`, or when the engine is silent for `silence` seconds."""
        if self._timer is not None:
            self._timer.cancel()
        self._deadline = time.perf_counter() + seconds
        self._silence = silence
        self._timer = self._loop.call_later(max(0.0, min(seconds, silence)), self._expire)

    async def wait_body(self) -> None:
        """Until the head and the first byte of the body are there, or the answer is complete.

        Raises UpstreamError.
        """
        while not (self._chunks or self.complete):
            await self._wait()

    async def wait_complete(self, limit: int) -> bytes | None:
        """The whole body, or None as soon as it is longer than `limit` bytes (then `read` has it).

        Raises UpstreamError.
        """
        while not self.complete:
            if self._buffered > limit:
                return None
            await self._wait()
        return self.take()

    async def read(self) -> bytes:
        """What came since the last call, waiting for at least a byte; b"" at the end. Raises UpstreamError."""
        while not self._chunks:
            if self.complete:
                return b""
            await self._wait()
        return self.take()

    def take(self) -> bytes:
        """What came since the last call, without waiting."""
        chunks = self._chunks
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        self._buffered = 0
        if self.paused and self._transport is not None:
            self.paused = False
            self._transport.resume_reading()
        return data

    def finish(self) -> bool:
        """End the exchange; whether the connection may carry another one. One that may not is closed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        reusable = self.complete and self._keep_alive and not self.closed and not self._chunks
        self._parser = None
        self.used = True
        if not reusable:
            self.abort()
        return reusable

    def abort(self) -> None:
        if self._transport is not None and not self.closed:
            self._transport.abort()
        self.closed = True

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, error: UpstreamError) -> None:
        if self._error is None:
            self._error = error
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(self._error)
        self.abort()

    def _expire(self) -> None:
        """One timer serves both limits: it looks how much is left and sleeps again, rather than being set anew with
        every chunk."""
        now = time.perf_counter()
        silent = 0.0 if self.paused else now - self.last_body_at
        left = min(self._deadline - now, self._silence - silent)
        if left > 0.001:
            self._timer = self._loop.call_later(left, self._expire)
        else:
            self._timer = None
            self._fail(UpstreamTimeoutError("no answer in time"))

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        if self._parser is None:  # between exchanges nothing may come: whatever it is, it answers no request
            self.abort()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._keep_alive = False
            if not self.complete:
                self._fail(ResetError(f"no valid HTTP: {error}"))
            return
        if self._buffered > HIGH_WATER and not self.paused and self._transport is not None:
            self.paused = True
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        self._keep_alive = False
        if self._parser is None or self.complete:
            return
        if self._until_close and self.head_complete and error is None:
            self.complete = True
            self._wake()
        else:
            self._fail(ResetError("the engine closed the connection"))

    # httptools

    def on_message_begin(self) -> None:
        if self.complete:  # a second answer to one request: the connection is out of step
            raise ResetError("the engine sent more than one answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > _HEAD_LIMIT:
            self._fail(ResetError("the answer's headers are too long"))
            return
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        parser = self._parser
        if parser is None:
            return
        status = parser.get_status_code()
        if 100 <= status < 200:  # 100 Continue, 103 Early Hints: the answer is still to come
            self.headers.clear()
            return
        self.status = status
        self.head_complete = True
        self._keep_alive = parser.should_keep_alive()
        names = {name for name, _ in self.headers}
        self._until_close = b"content-length" not in names and b"transfer-encoding" not in names

    def on_body(self, body: bytes) -> None:
        now = time.perf_counter()
        if not self.started:
            self.started = True
            self.first_body_at = now
        self.last_body_at = now
        self._chunks.append(body)
        self._buffered += len(body)
        self._wake()

    def on_message_complete(self) -> None:
        if not self.head_complete:  # the end of a 1xx
            return
        self.complete = True
        self.last_body_at = time.perf_counter()
        self._wake()


class Upstream:
    """One engine, as this worker knows it."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._context = _client_context() if address.secure else None
        self._idle: deque[Connection] = deque()
        self.outstanding = 0
        self.down_until = 0.0
        self.is_suspect = False
        """Whether the last connection could not be made."""

    def note_unreachable(self) -> None:
        """Leave it out for a while, where there are others."""
        self.is_suspect = True
        self.down_until = time.perf_counter() + DOWN_SECONDS

    def note_chosen(self) -> None:
        """Of an engine that could not be reached, one request at a time finds out whether it can: a dead machine
        takes each of them the whole time to connect."""
        if self.is_suspect:
            self.down_until = time.perf_counter() + DOWN_SECONDS

    def take_idle(self) -> Connection | None:
        """A kept connection, the one used last first. Younger than what engines keep open, see IDLE_SECONDS."""
        oldest = time.perf_counter() - IDLE_SECONDS
        while self._idle:
            connection = self._idle.pop()
            if connection.closed:
                continue
            if connection.idle_since < oldest:
                connection.abort()
                continue
            return connection
        return None

    async def connect(self, *, within: float) -> Connection:
        """A new connection. Raises ConnectFailedError, also when there is none within that many seconds."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(within):
                _, connection = await loop.create_connection(
                    lambda: Connection(loop), self.address.host, self.address.port, ssl=self._context
                )
        except TimeoutError:
            raise ConnectFailedError("no connection in time") from None
        except OSError as error:
            raise ConnectFailedError(f"cannot connect: {error}") from None
        self.is_suspect = False
        self.down_until = 0.0
        return connection

    def give_back(self, connection: Connection) -> None:
        """End an exchange; the connection is kept when it is whole."""
        if connection.finish():
            connection.idle_since = time.perf_counter()
            self._idle.append(connection)

    def close_idle(self, *, older_than: float = 0.0) -> None:
        """Close connections that were idle for that many seconds."""
        latest = time.perf_counter() - older_than
        while self._idle and (self._idle[0].closed or self._idle[0].idle_since <= latest):
            self._idle.popleft().abort()


@functools.cache
def _client_context() -> ssl.SSLContext:
    """Certificates are checked against those of the system, or SSL_CERT_FILE; reading them takes a while."""
    return ssl.create_default_context()


class Upstreams:
    """All engines of a worker, by base URL. They outlive snapshots, so that connections do."""

    def __init__(self) -> None:
        self._by_url: dict[str, Upstream] = {}

    def get(self, url: str) -> Upstream:
        """Raises ValueError for a URL that is none."""
        upstream = self._by_url.get(url)
        if upstream is None:
            upstream = self._by_url[url] = Upstream(parse_address(url))
        return upstream

    def tend(self, wanted: frozenset[str]) -> None:
        """Close connections that idled too long, and forget engines that no route names and no request uses."""
        for url, upstream in list(self._by_url.items()):
            gone = url not in wanted and upstream.outstanding == 0
            upstream.close_idle(older_than=0.0 if gone else IDLE_SECONDS)
            if gone:
                del self._by_url[url]

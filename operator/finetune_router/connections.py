"""One connection to an engine: HTTP/1.1 on an asyncio protocol with httptools.

aiohttp's client costs about four fifths of the time of a proxied request (docs/router.md has the numbers), so the
upstream side is written directly on the parser. It sends whole bodies with a Content-Length and reads answers of any
framing; a full read buffer pauses the socket, so that a slow reader costs a bounded amount of memory.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from typing import cast

import httptools

HIGH_WATER = 256 * 1024  # bytes kept for a slow reader before the engine's socket is paused
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


class Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
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
        now = time.perf_counter()
        self._deadline = now + seconds
        self._silence = silence
        due = now + max(0.0, min(seconds, silence))
        if self._timer is None or due < self._timer_at:
            self._set_timer(due, now)

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
        reusable = self.complete and self._keep_alive and not self.closed and not self._chunks
        self._parser = None
        self.used = True
        if not reusable:
            self.abort()
        return reusable

    def abort(self) -> None:
        if self._transport is not None and not self.closed:
            self._transport.abort()
        self._close()

    def _close(self) -> None:
        self.closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

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
        """One timer serves both limits, and one exchange after the other: it looks how much is left and sleeps again,
        rather than being set anew with every chunk and every request."""
        self._timer = None
        if self._parser is None:  # between exchanges
            return
        now = time.perf_counter()
        silent = 0.0 if self.paused else now - self.last_body_at
        left = min(self._deadline - now, self._silence - silent)
        if left > 0.001:
            self._set_timer(now + left, now)
        else:
            self._fail(UpstreamTimeoutError("no answer in time"))

    def _set_timer(self, due: float, now: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = due
        self._timer = self._loop.call_later(due - now, self._expire)

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
        self._close()
        self._keep_alive = False
        if self._parser is None or self.complete:
            return
        if self._until_close and self.head_complete and error is None:
            self.complete = True
            self.last_body_at = time.perf_counter()
            self._wake()
        else:
            self._fail(ResetError("the engine closed the connection"))

    # httptools

    def on_message_begin(self) -> None:
        if self.complete:  # a second answer to one request: the connection is out of step
            raise ResetError("the engine sent more than one answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        if self.head_complete:  # a trailer, which must not pass for a header (RFC 9110, section 6.5.1)
            return
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

"""From an arm to an answer: picks engines, sends, and tries again as long as the user has seen nothing.

A request is tried on another engine of the same revision when an engine cannot be reached, breaks off, or does not
have the model (it was just unloaded, or is not loaded yet), and on the stable revision when the candidate fails.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from finetune_router import outputs, paths
from finetune_router.connections import (
    HIGH_WATER,
    ConnectFailedError,
    Connection,
    ResetError,
    UpstreamError,
    UpstreamTimeoutError,
)
from finetune_router.tables import Leg
from finetune_router.upstreams import Upstream

MOST_ENGINES = 3  # tried for one revision
# Bytes; an answer up to this size is complete before the user gets its first byte. Not above the mark where a
# connection stops reading: it would wait for ever.
BUFFERED_ANSWER = HIGH_WATER
# Bytes of a stream that are kept back at most, to see whether it begins with an error.
FIRST_EVENT = 16 * 1024
SHORT_ANSWER = 16 * 1024  # bytes; whether it is an error is seen before the user gets it
_EVENT_STREAM = b"text/event-stream"
# What says to be text, or nothing at all, should be JSON as well; a file of `--extra-paths`, say of sound, says so.
_JSON = (b"application/json", b"text/")
_PAGES = (b"text/html", b"application/xhtml+xml")
_NOT_IMPLEMENTED = 501
_NO_CONTENT = frozenset((204, 205))


class Failure(StrEnum):
    """Why a revision gave no answer."""

    UNREACHABLE = "Unreachable"
    BROKEN = "Broken"  # the connection ended before the answer did
    TIMEOUT = "Timeout"
    MISSING = "Missing"  # the engine does not have the model
    ERROR = "Error"  # the engine answered 5xx, or with what is no answer
    BUSY = "Busy"  # 429 or 503


_ELSEWHERE = frozenset((Failure.UNREACHABLE, Failure.BROKEN, Failure.MISSING, Failure.BUSY))


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds."""

    connect: float
    first_byte: float
    silence: float
    total: float


class Outgoing(NamedTuple):
    """A request as the engines get it, but for its line and Host."""

    path: str
    """With the query."""
    headers: bytes
    body: bytes
    stream: bool
    deadline: float
    """On the clock of time.perf_counter: until then all of the answer must be there."""
    patience: float
    """On the same clock, not later: until then the user must have something to get; otherwise somebody else is asked.
    """


@dataclass(slots=True)
class Reply:
    """An engine's answer: whole (`body`), or its beginning (`first`) with the rest still to be read."""

    upstream: Upstream
    connection: Connection
    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes | None = None
    first: bytes = b""
    is_events: bool = False
    is_json: bool = True
    is_page: bool = False
    """HTML, which no engine answers with: it is of something else at its address."""
    begins_with_error: bool = False
    """Of a stream."""
    encoding: str = ""
    length: int | None = None
    open: bool = True

    def close(self) -> None:
        """End the exchange: keep the connection when the answer was read to its end, else cut it."""
        if self.open:
            self.open = False
            self.upstream.outstanding -= 1
            self.upstream.give_back(self.connection)


@dataclass(slots=True)
class Attempt:
    """What came of asking one revision."""

    reply: Reply | None = None
    """The answer; also one that is a failure, for the case that there is nothing better to show."""
    failure: Failure | None = None
    sent_at: float = 0.0
    connection: Connection | None = None
    """Of the exchange under way, or of the last one."""
    tried: list[Upstream] = field(default_factory=list)

    @property
    def first_byte_at(self) -> float:
        """When the answer's body began; 0.0 as long as it has not."""
        connection = self.connection
        return connection.first_body_at if connection is not None and connection.started else 0.0

    @property
    def is_held_up(self) -> bool:
        """Whether the engine is kept waiting, by a client that does not read."""
        return self.connection is not None and self.connection.paused

    def discard(self) -> None:
        if self.reply is not None:
            self.reply.close()
            self.reply = None


class Forwarder:
    """Sends requests to engines."""

    def __init__(self, limits: Limits, *, upstream_key: str = "") -> None:
        self.limits = limits
        self._credentials = f"authorization: Bearer {upstream_key}\r\n".encode() if upstream_key else b""

    async def ask(self, leg: Leg, outgoing: Outgoing, attempt: Attempt) -> None:
        """Ask a revision, on up to three engines. Never raises for what engines do; closes all but the last reply."""
        while len(attempt.tried) < MOST_ENGINES:
            upstream = leg.pick(attempt.tried)
            if upstream is None:
                break
            attempt.discard()
            attempt.tried.append(upstream)
            await self._once(upstream, leg, outgoing, attempt)
            if attempt.failure not in _ELSEWHERE or time.perf_counter() >= outgoing.patience:
                break

    async def _once(self, upstream: Upstream, leg: Leg, outgoing: Outgoing, attempt: Attempt) -> None:
        upstream.outstanding += 1
        upstream.note_chosen()
        attempt.connection = None
        reply: Reply | None = None
        try:
            reply = await self._exchange(upstream, outgoing, attempt)
            attempt.failure = _judge(reply, leg, outgoing)
        except ConnectFailedError:
            # Cut short because the request has no more time, it says nothing of the engine.
            if time.perf_counter() < outgoing.patience:
                upstream.note_unreachable()
                attempt.failure = Failure.UNREACHABLE
            else:
                attempt.failure = Failure.TIMEOUT
        except UpstreamTimeoutError:
            attempt.failure = Failure.TIMEOUT
        except UpstreamError:
            attempt.failure = Failure.BROKEN
        finally:
            if reply is None:
                upstream.outstanding -= 1
        attempt.reply = reply

    async def _exchange(self, upstream: Upstream, outgoing: Outgoing, attempt: Attempt) -> Reply:
        """Send on a kept connection; when that one turns out closed before a byte of an answer came, on a new one."""
        head = self._head(upstream, outgoing)
        connection = upstream.take_idle()
        if connection is not None:
            try:
                return await self._converse(upstream, connection, head, outgoing, attempt)
            except ResetError:
                if connection.head_complete:
                    raise
        left = outgoing.patience - time.perf_counter()
        connection = await upstream.connect(within=max(0.001, min(self.limits.connect, left)))
        return await self._converse(upstream, connection, head, outgoing, attempt)

    def _head(self, upstream: Upstream, outgoing: Outgoing) -> bytes:
        address = upstream.address
        start = f"POST {address.prefix}{outgoing.path} HTTP/1.1\r\nhost: {address.host_header}\r\n"
        return b"".join(
            (
                start.encode(),
                outgoing.headers,
                self._credentials,
                b"content-length: %d\r\n\r\n" % len(outgoing.body),
            )
        )

    async def _converse(
        self, upstream: Upstream, connection: Connection, head: bytes, outgoing: Outgoing, attempt: Attempt
    ) -> Reply:
        """The answer so far: whole when it is short, else its first bytes. The connection is cut when this fails."""
        try:
            attempt.sent_at = time.perf_counter()
            left = outgoing.patience - attempt.sent_at
            connection.send(
                head, outgoing.body, timeout=min(left, self.limits.first_byte) if outgoing.stream else left
            )
            attempt.connection = connection
            await connection.wait_body()
            reply = Reply(upstream, connection, connection.status, connection.headers)
            _read_framing(reply)
            if reply.is_events and reply.status < 400:
                await self._begin_stream(reply, outgoing)
            # Engines also take 1 and "true" for `stream`: what they send counts.
            if (outgoing.stream or reply.is_events) and not connection.complete:
                left = outgoing.deadline - time.perf_counter()
                connection.set_timeout(left, silence=self.limits.silence)
            if not reply.is_events or reply.status >= 400:
                reply.body = await connection.wait_complete(BUFFERED_ANSWER)
                if reply.body is None:
                    reply.first = connection.take()
                    if not outgoing.stream:
                        connection.set_timeout(outgoing.deadline - time.perf_counter())
        except BaseException:
            connection.abort()
            connection.finish()
            raise
        return reply

    async def _begin_stream(self, reply: Reply, outgoing: Outgoing) -> None:
        """Its first bytes; its whole first event as long as somebody else could still be asked: it may be an error."""
        connection = reply.connection
        reply.first = connection.take()
        verdict = _begins_with_error(reply)
        while verdict is None and outgoing.patience < outgoing.deadline and not connection.complete:
            left = outgoing.patience - time.perf_counter()
            connection.set_timeout(left, silence=self.limits.silence)
            await connection.wait_body()
            reply.first += connection.take()
            verdict = _begins_with_error(reply)
        reply.begins_with_error = bool(verdict)


def _read_framing(reply: Reply) -> None:
    for name, value in reply.headers:
        if name == b"content-type":
            reply.is_events = value[: len(_EVENT_STREAM)].lower() == _EVENT_STREAM
            reply.is_json = not value or value.lower().startswith(_JSON)
            reply.is_page = value.lower().startswith(_PAGES)
        elif name == b"content-encoding":
            reply.encoding = value.decode("latin-1").strip().lower()
        elif name == b"content-length" and value.isdigit():
            reply.length = int(value)
    if reply.encoding == "identity":
        reply.encoding = ""


def _judge(reply: Reply, leg: Leg, outgoing: Outgoing) -> Failure | None:
    """Whether the answer is one. 4xx other than 404 and 429 is the client's own business, and so is 501: vLLM says it
    where the model has no such API, for example no embeddings."""
    status = reply.status
    if status < 400:
        is_none = not 200 <= status < 300 or status in _NO_CONTENT or _says_nothing(reply, outgoing)
        return Failure.ERROR if is_none else None
    if status == 404:
        body = reply.body or b""
        names_model = leg.served_name.encode() in body or b"model" in body.lower()
        return Failure.MISSING if names_model else None
    if status in {429, 503}:
        return Failure.BUSY
    return Failure.ERROR if status >= 500 and status != _NOT_IMPLEMENTED else None


def _says_nothing(reply: Reply, outgoing: Outgoing) -> bool:
    """Whether it is nothing that an engine answers."""
    if reply.is_events or reply.is_page:
        return reply.is_page or reply.begins_with_error
    data = reply.first if reply.body is None else reply.body
    can_ask_another = outgoing.patience < outgoing.deadline
    if can_ask_another and reply.body is not None and len(data) <= SHORT_ANSWER:
        if not paths.always_in_json(outgoing.path):
            return False
        return not outputs.is_answer(data, reply.encoding, outgoing.path)
    if data.startswith(b"{") and not reply.encoding:  # nearly all of them
        return False
    return paths.always_in_json(outgoing.path) and not outputs.begins_as_json(data, reply.encoding)


def _begins_with_error(reply: Reply) -> bool | None:
    is_whole = reply.connection.complete
    return outputs.begins_with_error(reply.first, reply.encoding, FIRST_EVENT, is_whole=is_whole)

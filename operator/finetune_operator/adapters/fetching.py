"""HTTP requests to what stands around the operator: routers, agents, Prometheus, webhooks.

None of these is ours to trust: every request has a time limit, every answer a size limit, and no redirect is
followed, because it would carry the bearer token along. What answers at addresses that users name may hang, or be
something that the users cannot ask themselves: it gets connections of its own, and its words are quoted only where it
is known.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import aiohttp
from pydantic import BaseModel, ValidationError

ANSWER_BYTES = 4 << 20
CONNECTIONS = 1000  # at once per session; above it, requests wait
PER_HOST = 64
MayQuote: TypeAlias = Callable[[str], bool]
"""Whether the body of an answer from this URL may be shown to users."""
Answer = TypeVar("Answer", bound=BaseModel)
Problem = TypeVar("Problem")


class UnreachableError(Exception):
    """There was no whole answer: no connection, a timeout, or too many bytes. `str()` says which."""


@dataclass(frozen=True)
class Reply:
    status: int
    data: bytes

    @property
    def ok(self) -> bool:
        return 200 <= self.status <= 299

    def json(self) -> Any:
        """The parsed body. Raises ValueError, also for NaN and Infinity, which JSON does not have."""
        try:
            return json.loads(self.data, parse_constant=_refuse_constant)
        except RecursionError:
            raise ValueError("nested too deeply") from None

    def summary(self, *, quote: bool = True) -> str:
        """The answer in one line for people. `quote`: with the beginning of its body."""
        text = " ".join(self.data[:300].decode(errors="replace").split()) if quote else ""
        return f"HTTP {self.status}" + (f": {text}" if text else "")


def parse(model: type[Answer], reply: Reply, problem: Callable[[str], Problem]) -> Answer | Problem:
    """The document of an answer; the problem for an error status, and for what is no such document."""
    if not reply.ok:
        return problem(reply.summary())
    try:
        return model.model_validate_json(reply.data)
    except ValidationError as error:
        first = error.errors()[0]
        place = [".".join(str(part) for part in first["loc"])] if first["loc"] else []
        return problem(": ".join(["the answer cannot be read", *place, first["msg"]]))


class TokenFile:
    """A bearer token in a file, which may be renewed while we run. No file: no token."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._last: str | None = None

    def read(self) -> str | None:
        """The token; the last one that could be read where the file is being replaced."""
        if self._path is None:
            return None
        try:
            self._last = self._path.read_text().strip() or self._last
        except (OSError, UnicodeDecodeError):
            return self._last
        return self._last


def open_session(*, may_send: Callable[[], bool] = lambda: True) -> aiohttp.ClientSession:
    """A session with connections of its own: who hangs in one holds up nobody in another. Each request first asks
    `may_send`. Close it at the end."""

    async def ask(*_: Any) -> None:
        if not may_send():
            raise aiohttp.ClientError("not sent, as this process leads no more")

    fence = aiohttp.TraceConfig()
    fence.on_request_start.append(ask)
    connector = aiohttp.TCPConnector(limit=CONNECTIONS, limit_per_host=PER_HOST)
    return aiohttp.ClientSession(connector=connector, trace_configs=[fence])


def may_always_quote(_: str) -> bool:
    """For addresses that no user chooses."""
    return True


async def fetch(
    session: aiohttp.ClientSession,
    method: str,
    url: str,
    *,
    seconds: float,
    body: Any = None,
    token: str | None = None,
    limit: int = ANSWER_BYTES,
) -> Reply:
    """One request; `body` is JSON, or bytes that already are. Raises UnreachableError; any status is an answer."""
    headers = {"Accept": "application/json"}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    data: bytes | None = None
    if body is not None:
        headers["Content-Type"] = "application/json"
        data = body if isinstance(body, bytes) else json.dumps(body, allow_nan=False).encode()
    try:
        async with (
            asyncio.timeout(seconds),
            session.request(method, url, data=data, headers=headers, allow_redirects=False) as answer,
        ):
            return Reply(answer.status, await _read(answer, limit))
    except TimeoutError:
        raise UnreachableError(f"no answer within {seconds:g} s") from None
    except aiohttp.ClientResponseError:  # its text has the bytes that came instead
        raise UnreachableError("what answers does not speak HTTP") from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise UnreachableError(str(error) or type(error).__name__) from error


async def _read(answer: aiohttp.ClientResponse, limit: int) -> bytes:
    pieces = bytearray()
    async for piece in answer.content.iter_chunked(1 << 16):
        pieces += piece
        if len(pieces) > limit:
            raise UnreachableError(f"the answer is longer than {limit >> 20} MiB")
    return bytes(pieces)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")

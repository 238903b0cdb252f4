"""The data port: paths, limits, keys; hands what carries a model to the proxy."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from aiohttp import HttpVersion11, web
from aiohttp.web_protocol import RequestPayloadError

from finetune_router import bodies, choices, credentials, errors
from finetune_router.bodies import Body
from finetune_router.config import RouterConfig
from finetune_router.counters import Book
from finetune_router.credentials import ApiKeys
from finetune_router.errors import ApiError
from finetune_router.feedback import FeedbackDesk
from finetune_router.flights import REQUEST_ID_HEADER, SERVER, Arrival
from finetune_router.paths import FEEDBACK_PATH, HEALTH_PATH, MODEL_PATHS, MODELS_PATH
from finetune_router.proxy import Proxy
from finetune_router.scanner import BrokenBodyError
from finetune_router.tables import Table

logger = logging.getLogger(__name__)

_FEEDBACK_LIMIT = 64 * 1024  # bytes
_JSON = "application/json"
LOG_LINES = 10.0  # about failed requests, in a second


@dataclass(slots=True)
class Room:
    """What one request has of the memory for bodies."""

    held: int = 0
    """Bytes."""


@dataclass
class Service:
    """Answers every request of the data port; one per worker."""

    config: RouterConfig
    proxy: Proxy
    book: Book
    desk: FeedbackDesk
    api_keys: ApiKeys | None
    table: Table = field(default_factory=Table)
    in_flight: int = 0
    buffered: int = 0
    """Bytes of request bodies in memory, and of those that are still coming."""
    draining: bool = False

    def __post_init__(self) -> None:
        further = (path.strip() for path in self.config.extra_paths.split(","))
        self._paths = MODEL_PATHS | {path for path in further if path}
        self._outside = self.book.metrics("", "", "")
        self._lines, self._line_at = LOG_LINES, 0.0

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """The border: whatever happens, the client gets an answer in OpenAI's shape."""
        try:
            response = await self._dispatch(request)
        except ApiError as error:
            response = self._refusal(error)
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception:
            logger.exception("a request failed in the router itself")
            response = self._refusal(ApiError(500, "the router failed", "api_error", "internal_error"))
        if not response.prepared:
            response.headers["Server"] = SERVER
            if REQUEST_ID_HEADER not in response.headers:
                response.headers[REQUEST_ID_HEADER] = _own_id()
        if self.draining:
            response.force_close()
        return response

    def refuse_unread(self, reason: str) -> web.Response:
        """The answer to a request that cannot be read; the connection ends with it."""
        error = errors.bad_request(f"the request cannot be read: {reason}", code="invalid_request")
        response = self._refusal(self._outside_error(error))
        response.headers["Server"] = SERVER
        response.force_close()
        return response

    async def _dispatch(self, request: web.BaseRequest) -> web.StreamResponse:
        target = request.raw_path
        if target.startswith(("http://", "https://")):  # a whole URL is as good (RFC 9112, section 3.2.2)
            target = request.rel_url.raw_path_qs
        path, _, query = target.partition("?")
        method = request.method
        if path in self._paths:
            if method == "POST":
                return await self._serve(request, path if not query else f"{path}?{query}")
            return self._options(method, path, "POST")
        if path == MODELS_PATH or path.startswith(MODELS_PATH + "/"):
            if method in {"GET", "HEAD"}:
                return self._models(request, path)
            return self._options(method, path, "GET, HEAD")
        if path == FEEDBACK_PATH:
            if method == "POST":
                return await self._feedback(request)
            return self._options(method, path, "POST")
        if path == HEALTH_PATH and method in {"GET", "HEAD"}:
            return web.Response(text="ok\n")
        raise self._outside_error(errors.unknown_path(path))

    async def _serve(self, request: web.BaseRequest, path: str) -> web.StreamResponse:
        arrived = time.perf_counter()
        api_key = self._authenticate(request)
        if self.in_flight >= self.config.max_concurrency:
            raise self._outside_error(errors.too_busy("too many requests are under way"))
        self.in_flight += 1
        room = Room()
        try:
            data = await self._read(request, self.config.max_body_bytes, room)
            table = self.table
            body = await self._parse(data, table)
            if body.model is None:
                raise self._outside_error(
                    errors.bad_request(
                        "`model` is missing, or is no string", param="model", code="missing_model"
                    )
                )
            route = table.find(body.model)
            if route is None:
                raise self._outside_error(
                    errors.no_routes() if table.by_model is None else errors.model_not_found(body.model)
                )
            try:
                choice = choices.choose(route, request.headers, body.texts, api_key)
            except ApiError as error:
                raise self._outside_error(error) from None
            return await self.proxy.serve(Arrival(request, route, body, path, arrived), choice)
        finally:
            self.in_flight -= 1
            self.buffered -= room.held

    async def _parse(self, data: bytes, table: Table) -> Body:
        try:
            if len(data) <= bodies.PARSE_UP_TO:
                return bodies.parse_body(data, table.body_keys)
            return await bodies.scan_body(data, table.body_keys)
        except BrokenBodyError as error:
            raise self._outside_error(errors.bad_request(str(error))) from None

    async def _read(self, request: web.BaseRequest, limit: int, room: Room) -> bytes:
        """The body, unpacked where it was packed. Raises ApiError 400, 408, 413, 417, 429.

        The caller gives back the room, also when this raises.
        """
        data = await self._receive(request, limit, room)
        encoding = request.headers.get("Content-Encoding", "").strip().lower()
        if encoding not in bodies.PACKINGS:  # clients name their charset there too
            return data
        self._reserve(room, -len(data), limit)
        pieces = []
        try:
            for piece in bodies.unpack(data, encoding):
                self._reserve(room, len(piece), limit)
                pieces.append(piece)
                await asyncio.sleep(0)
        except BrokenBodyError as error:
            raise self._outside_error(errors.bad_request(str(error))) from None
        return b"".join(pieces)

    async def _receive(self, request: web.BaseRequest, limit: int, room: Room) -> bytes:
        """The body as it comes. Raises what `_read` raises."""
        length = request.content_length
        if length is not None and length > limit:
            raise self._outside_error(errors.too_large(limit))
        expectation = request.headers.get("Expect")
        if expectation is not None and request.version >= HttpVersion11:  # before, nobody knew a 100
            await self._meet(request, expectation)
        content = request.content
        try:
            if content.is_eof():
                data = content.read_nowait()
                self._reserve(room, len(data), limit)
                return data
            async with asyncio.timeout(self.config.body_timeout):
                pieces = []
                while piece := await content.readany():
                    self._reserve(room, len(piece), limit)
                    pieces.append(piece)
                return b"".join(pieces)
        except TimeoutError:
            raise self._outside_error(errors.body_too_slow(self.config.body_timeout)) from None
        except RequestPayloadError:
            raise self._outside_error(errors.bad_request("the body is broken in transfer")) from None

    def _reserve(self, room: Room, size: int, limit: int) -> None:
        """Take room for a piece as it comes: many large bodies may be on their way, and none be complete."""
        room.held += size
        self.buffered += size
        if room.held > limit:
            raise self._outside_error(errors.too_large(limit))
        if self.buffered > self.config.max_buffered_bytes:
            raise self._outside_error(errors.too_busy("too many large requests are under way"))

    async def _meet(self, request: web.BaseRequest, expectation: str) -> None:
        """Expect: 100-continue (RFC 9110, section 10.1.1)."""
        if expectation.lower() != "100-continue":
            raise self._outside_error(
                ApiError(
                    417, "only `Expect: 100-continue` is known", "invalid_request_error", "bad_expectation"
                )
            )
        if request.transport is not None and not request.content.is_eof():
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _authenticate(self, request: web.BaseRequest) -> str:
        """Hash of the client's key, which is also what `apiKey` hashing uses. Raises ApiError 401."""
        headers = request.headers
        token = credentials.bearer_token(headers.get("Authorization")) or headers.get("x-api-key", "")
        hashed = credentials.hash_key(token) if token else ""
        if self.api_keys is not None and not self.api_keys.admits(hashed):
            raise self._outside_error(errors.unauthorized())
        return hashed

    def _models(self, request: web.BaseRequest, path: str) -> web.Response:
        self._authenticate(request)
        table = self.table
        if table.model_entries is None:
            raise self._outside_error(errors.no_routes())
        if path == MODELS_PATH:
            return web.Response(body=table.models, content_type=_JSON)
        name = unquote(path[len(MODELS_PATH) + 1 :])
        entry = table.model_entries.get(name)
        if entry is None:
            raise self._outside_error(errors.model_not_found(name))
        return web.Response(body=entry, content_type=_JSON)

    async def _feedback(self, request: web.BaseRequest) -> web.Response:
        self._authenticate(request)
        room = Room()
        try:
            data = await self._read(request, _FEEDBACK_LIMIT, room)
        finally:
            self.buffered -= room.held
        try:
            outcome = await self.desk.take(data, self.table)
        except ApiError as error:
            raise self._outside_error(error) from None
        return web.Response(body=outcome.body, status=201 if outcome.is_new else 200, content_type=_JSON)

    def _complain(self, error: ApiError, request_id: str) -> None:
        """A line for whoever looks up an id that a user reports; ten a second at most."""
        now = time.monotonic()
        self._lines = min(LOG_LINES, self._lines + (now - self._line_at) * LOG_LINES)
        self._line_at = now
        if self._lines >= 1:
            self._lines -= 1
            logger.warning("answered %d %s, request %s", error.status, error.code, request_id)

    def _options(self, method: str, path: str, allowed: str) -> web.Response:
        allowed += ", OPTIONS"
        if method == "OPTIONS":
            return web.Response(status=204, headers={"Allow": allowed})
        raise self._outside_error(errors.method_not_allowed(method, path, allowed))

    def _outside_error(self, error: ApiError) -> ApiError:
        """Count an answer that has to do with no arm."""
        self._outside.add_code(error.status)
        self.book.changed_metrics.add(self._outside)
        return error

    def _refusal(self, error: ApiError) -> web.Response:
        headers: dict[str, Any] = {}
        if error.retry_after is not None:
            headers["Retry-After"] = str(error.retry_after)
        if error.allow:
            headers["Allow"] = error.allow
        headers[REQUEST_ID_HEADER] = error.request_id or _own_id()
        if error.status >= 500:
            self._complain(error, headers[REQUEST_ID_HEADER])
        response = web.Response(body=error.body(), status=error.status, content_type=_JSON, headers=headers)
        if error.status in {408, 413, 417}:  # the rest of the body is not wanted
            response.force_close()
        return response


def _own_id() -> str:
    """An id for an answer that no engine had a part in."""
    return secrets.token_urlsafe(12)

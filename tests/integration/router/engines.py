"""A stand-in for an engine: it answers as vLLM does, and fails in all the ways that a test asks for."""

from __future__ import annotations

import asyncio
import json
import random
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

MISSING = "The model `{}` does not exist."


@dataclass
class Behaviour:
    """How the engine answers for one model."""

    text: str = "Hello from {model}."
    status: int = 200
    finish_reason: str = "stop"
    delay: float = 0.0
    """Seconds before anything is sent."""
    chunk_delay: float = 0.0
    chunks: tuple[bytes, ...] | None = None
    """Raw body of a stream, sent in these pieces."""
    raw: bytes | None = None
    """Raw body of an answer of any kind."""
    break_after: int | None = None
    """Cut the connection after so many chunks; 0: before the head."""
    error_event: bool = False
    """A stream whose first event is an error."""
    usage: bool = True
    headers: dict[str, str] = field(default_factory=dict)
    share: float = 1.0
    """Of the requests that are answered so, by a draw that depends on the body alone; the others go well."""


@dataclass
class Seen:
    """A request as it arrived."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.body)
        return document


class Engine:
    """Knows its models, and what came in."""

    def __init__(self, *models: str) -> None:
        self.models: set[str] | None = set(models) or None
        self.behaviours: dict[str, Behaviour] = {}
        self.seen: list[Seen] = []
        self.open = 0
        self.cancelled = 0
        self.url = ""

    def served(self, model: str) -> int:
        return sum(seen.json.get("model") == model for seen in self.seen)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.open += 1
        try:
            return await self._answer(request)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.open -= 1

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.seen.append(Seen(request.path_qs, {k.lower(): v for k, v in request.headers.items()}, body))
        document = json.loads(body)
        model = document["model"]
        if self.models is not None and model not in self.models:
            return web.json_response(_error(MISSING.format(model), 404), status=404)
        how = self.behaviours.get(model, Behaviour())
        if random.Random(body).random() >= how.share:
            how = Behaviour()
        await asyncio.sleep(how.delay)
        if how.break_after == 0:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if how.raw is not None:
            return web.Response(body=how.raw, status=how.status, headers=how.headers)
        if how.status != 200:
            return web.json_response(_error("no luck", how.status), status=how.status, headers=how.headers)
        reply_id = "chatcmpl-" + request.headers.get("x-request-id", "none")
        if request.path.endswith("/embeddings"):
            return web.json_response(
                {"object": "list", "data": [{"embedding": [0.5, 0.25], "index": 0}], "model": model}
            )
        if document.get("stream"):
            return await self._stream(request, how, reply_id, model)
        return web.json_response(_whole(request.path, how, reply_id, model), headers=how.headers)

    async def _stream(
        self, request: web.Request, how: Behaviour, reply_id: str, model: str
    ) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"Content-Type": "text/event-stream; charset=utf-8", **how.headers}
        )
        await response.prepare(request)
        for number, chunk in enumerate(how.chunks or _events(how, reply_id, model), start=1):
            await response.write(chunk)
            if number == how.break_after:
                await asyncio.sleep(0.05)
                assert request.transport is not None
                request.transport.abort()
                return response
            await asyncio.sleep(how.chunk_delay)
        return response


@asynccontextmanager
async def running(*models: str, context: ssl.SSLContext | None = None) -> AsyncIterator[Engine]:
    """An engine on a free port, behind TLS if there is a context; without models it has all of them."""
    engine = Engine(*models)
    application = web.Application(client_max_size=64 * 1024 * 1024)
    application.router.add_post("/{path:.*}", engine.handle)
    runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
    await site.start()
    engine.url = f"http{'s' if context else ''}://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield engine
    finally:
        await runner.cleanup()


def event(document: object) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


def _error(message: str, code: int) -> dict[str, Any]:
    return {"error": {"message": message, "type": "NotFoundError", "param": "model", "code": code}}


def _whole(path: str, how: Behaviour, reply_id: str, model: str) -> dict[str, Any]:
    text = how.text.format(model=model) if "{model}" in how.text else how.text
    choice: dict[str, Any] = {"index": 0, "finish_reason": how.finish_reason, "logprobs": None}
    if path.endswith("/chat/completions"):
        choice["message"] = {"role": "assistant", "content": text}
        kind = "chat.completion"
    else:
        choice["text"] = text
        kind = "text_completion"
    document = {"id": reply_id, "object": kind, "created": 1, "model": model, "choices": [choice]}
    if how.usage:
        words = len(text.split())
        document["usage"] = {"prompt_tokens": 5, "completion_tokens": words, "total_tokens": 5 + words}
    return document


def _events(how: Behaviour, reply_id: str, model: str) -> list[bytes]:
    if how.error_event:
        return [event(_error("CUDA out of memory", 500)), b"data: [DONE]\n\n"]
    text = how.text.format(model=model) if "{model}" in how.text else how.text
    base = {"id": reply_id, "object": "chat.completion.chunk", "created": 1, "model": model}
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    deltas += [{"content": word + " "} for word in text.split()]
    events = [
        event({**base, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}) for delta in deltas
    ]
    events.append(event({**base, "choices": [{"index": 0, "delta": {}, "finish_reason": how.finish_reason}]}))
    if how.usage:
        tokens = len(deltas) - 1
        usage = {"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": 5 + tokens}
        events.append(event({**base, "choices": [], "usage": usage}))
    return [*events, b"data: [DONE]\n\n"]

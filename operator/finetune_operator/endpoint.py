"""Listening for trainers' reports: who answers, and how long and how much anybody may talk.

Whoever reaches the port may send anything, so every connection serves one request, lives for `CONNECTION_SECONDS` at
most, and there are at most `CONNECTIONS` of them. A trainer opens one connection per report anyway.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeAlias

from aiohttp import web
from aiohttp.web_protocol import RequestHandler, RequestPayloadError

from finetune_operator.adapters.api_errors import ApiError
from finetune_operator.adapters.telemetry import Telemetry
from finetune_operator.manifests import naming

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 * 1024
BODY_SECONDS = 10.0  # a report has a few kB
HANDSHAKE_SECONDS = 10.0
CONNECTION_SECONDS = 40.0  # handshake, body, and the wait for a result to be stored
CONNECTIONS = 2000
SWEEP_SECONDS = 5.0

Answer: TypeAlias = Callable[[web.Request], Awaitable[web.Response]]


class ReportEndpoint:
    """Who answers reports at the moment: the leader itself, or the way to it."""

    def __init__(self, *, answer: Answer, telemetry: Telemetry) -> None:
        self.answer = answer
        self._telemetry = telemetry

    def application(self) -> web.Application:
        application = web.Application(client_max_size=MAX_BODY_BYTES)
        application.router.add_post(
            naming.status_path("{namespace}", "{name}", r"{attempt:\d+}"), self._serve
        )
        return application

    async def _serve(self, request: web.Request) -> web.Response:
        try:
            response = await self.answer(request)
        except web.HTTPException as error:
            headers = {name: error.headers[name] for name in ("Retry-After",) if name in error.headers}
            response = web.json_response(
                {"error": error.text or error.reason}, status=error.status, headers=headers
            )
        except ApiError as error:
            logger.warning("a report has to wait: %s", error)
            response = web.json_response(
                {"error": "the Kubernetes API does not answer"}, status=503, headers=retry_after(2.0)
            )
        response.force_close()
        self._telemetry.reports.labels(str(response.status)).inc()
        return response


def retry_after(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


async def read_body(request: web.Request) -> bytes:
    """The body of a report.

    Raises HTTPRequestEntityTooLarge, HTTPUnsupportedMediaType, HTTPRequestTimeout and HTTPBadRequest.
    """
    if "Content-Encoding" in request.headers:
        raise web.HTTPUnsupportedMediaType(text="send the report as it is, without Content-Encoding")
    if (request.content_length or 0) > MAX_BODY_BYTES:
        raise web.HTTPRequestEntityTooLarge(max_size=MAX_BODY_BYTES, actual_size=request.content_length or 0)
    try:
        async with asyncio.timeout(BODY_SECONDS):
            return await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout(text=f"the body did not arrive within {BODY_SECONDS:g} s") from None
    except (ConnectionError, RequestPayloadError):  # a trainer that was killed, or chunks that are none
        raise web.HTTPBadRequest(text="the body did not arrive whole") from None


@contextlib.asynccontextmanager
async def listening(
    application: web.Application, *, host: str, port: int, tls: ssl.SSLContext | None
) -> AsyncIterator[None]:
    """Serve the application with limits per connection until the block ends."""
    runner = web.AppRunner(
        application, auto_decompress=False, keepalive_timeout=CONNECTION_SECONDS, shutdown_timeout=2.0
    )
    await runner.setup()
    if runner.server is None:
        raise RuntimeError("an application runner that was set up has a server")
    connections = _Connections(runner.server)
    server = await asyncio.get_running_loop().create_server(
        connections.accept,
        host,
        port,
        ssl=tls,
        ssl_handshake_timeout=HANDSHAKE_SECONDS if tls else None,
        backlog=1024,
    )
    sweeping = asyncio.create_task(connections.sweep(), name="connections")
    try:
        yield
    finally:
        sweeping.cancel()
        server.close()
        await runner.cleanup()


class _Connections:
    """The open connections, and since when each was seen to be open."""

    def __init__(self, server: web.Server) -> None:
        self._server = server
        self._since: dict[RequestHandler, float] = {}

    def accept(self) -> asyncio.Protocol:
        if len(self._server.connections) >= CONNECTIONS:
            return _Refusal()
        return self._server()

    async def sweep(self) -> None:
        """Cut off, again and again, what is open for too long."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            now = asyncio.get_running_loop().time()
            self._since = {open_: self._since.get(open_, now) for open_ in self._server.connections}
            for connection, since in self._since.items():
                if now - since >= CONNECTION_SECONDS and connection.transport is not None:
                    connection.transport.abort()


class _Refusal(asyncio.Protocol):
    """Closes what comes above the limit."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()

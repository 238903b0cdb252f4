"""aiohttp's server for the data port. A request that it cannot read never comes to the service, and its own answer is
plain text: OpenAI clients show nothing of that but the status."""

from __future__ import annotations

import asyncio

from aiohttp import web

from finetune_router.service import Service

_KEEP_ALIVE = 75.0  # seconds that an idle client connection is kept, as in nginx
_HEAD_LIMIT = 16 * 1024  # bytes of one header line
_LONGEST_REASON = 200  # characters; the parser repeats what it read


class DataServer(web.Server):
    """Makes a protocol for each connection."""

    def __init__(self, service: Service) -> None:
        super().__init__(service.handle, handler_cancellation=True)
        self._service = service

    def __call__(self) -> web.RequestHandler:
        return DataProtocol(
            self._service,
            self,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=_KEEP_ALIVE,
            access_log=None,
            # It would unpack without end, and without a pause, also what belongs to a request that was refused already.
            auto_decompress=False,
            max_line_size=_HEAD_LIMIT,
            max_field_size=_HEAD_LIMIT,
            lingering_time=2.0,
        )


class DataProtocol(web.RequestHandler):
    """One client connection."""

    def __init__(self, service: Service, server: web.Server, **settings: object) -> None:
        super().__init__(server, **settings)  # type: ignore[arg-type]
        self._service = service

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        plain = super().handle_error(request, status, exc, message)
        if message is None:  # not of the parser
            return plain
        reason = message.partition("\n")[0].rstrip(":")[:_LONGEST_REASON]
        return self._service.refuse_unread(reason)

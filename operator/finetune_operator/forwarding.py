"""What a replica that does not lead does with a trainer's report: it hands it to the one that does.

So a plain Service with all replicas behind it works, and every replica is ready. Only the leader looks into a report
and at the token; a report that is handed on a second time, while the leadership moves, is sent back instead.
"""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web

from finetune_operator import endpoint

logger = logging.getLogger(__name__)

FORWARDED = "X-Finetune-Forwarded"
FORWARD_SECONDS = 20.0  # the leader answers a result when it is stored, within 8 s
CONNECTIONS = 100
HEADERS = ("Authorization", "Content-Type")


class Forwarder:
    """`leader` names the base URL of the leader's endpoint. Where it speaks TLS, its certificate is for the name in
    `status_url`, not for the address of a pod."""

    def __init__(self, *, leader: Callable[[], str | None], status_url: str, authority: Path | None) -> None:
        self._leader = leader
        self._authority = authority
        self._server_name = urlsplit(status_url).hostname
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Forwarder:
        timeout = aiohttp.ClientTimeout(total=FORWARD_SECONDS, connect=3.0)
        self._session = aiohttp.ClientSession(
            timeout=timeout, connector=aiohttp.TCPConnector(limit=CONNECTIONS)
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def answer(self, request: web.Request) -> web.Response:
        """The leader's answer. Raises HTTPServiceUnavailable where no leader can be reached."""
        address = self._leader()
        if address is None or self._session is None or FORWARDED in request.headers:
            raise web.HTTPServiceUnavailable(
                text="no operator leads at the moment: send it again", headers=endpoint.retry_after(2.0)
            )
        headers = {name: request.headers[name] for name in HEADERS if name in request.headers}
        body = await endpoint.read_body(request)
        try:
            async with self._session.post(
                address + request.path,
                data=body,
                headers={**headers, FORWARDED: "1"},
                allow_redirects=False,
                ssl=self._tls(address),
                server_hostname=self._server_name if address.startswith("https:") else None,
            ) as answer:
                passed = {n: answer.headers[n] for n in ("Retry-After",) if n in answer.headers}
                return web.Response(
                    status=answer.status,
                    body=await answer.read(),
                    content_type="application/json",
                    headers=passed,
                )
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            logger.warning("a report could not be handed to the leader at %s: %s", address, error)
            raise web.HTTPServiceUnavailable(
                text="the leading operator does not answer: send it again", headers=endpoint.retry_after(2.0)
            ) from error

    def _tls(self, address: str) -> ssl.SSLContext | bool:
        if not address.startswith("https:"):
            return True
        own = self._authority if self._authority and self._authority.stat().st_size else None
        return ssl.create_default_context(cafile=own)

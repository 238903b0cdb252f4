"""A small asynchronous client of the API server for the gateway: dicts in and out, watches as async iterators."""

from __future__ import annotations

import json
import ssl
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from finetune_local.kubeapi import ApiError, error_message

Object = dict[str, Any]
STRATEGIC = "application/strategic-merge-patch+json"


class AsyncApi:
    """Use as an async context manager."""

    def __init__(self, server: str, context: ssl.SSLContext) -> None:
        self._server = server
        self._context = context
        self._opened: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> AsyncApi:
        self._opened = aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=self._context))
        return self

    async def __aexit__(self, *exception: object) -> None:
        if self._opened is not None:
            await self._opened.close()

    @property
    def _session(self) -> aiohttp.ClientSession:
        if self._opened is None:
            raise RuntimeError("use AsyncApi as an async context manager")
        return self._opened

    async def call(
        self, method: str, path: str, body: Object | None = None, *, content_type: str = "application/json"
    ) -> Any:
        """Parsed JSON. Raises ApiError (status 0: no answer)."""
        data = None if body is None else json.dumps(body)
        try:
            async with self._session.request(
                method,
                self._server + path,
                data=data,
                headers={"Content-Type": content_type},
                timeout=aiohttp.ClientTimeout(total=15),
            ) as answer:
                text = await answer.text()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ApiError(0, f"the API server does not answer: {error}") from error
        if answer.status >= 400:
            raise ApiError(answer.status, error_message(text))
        return json.loads(text)

    async def get(self, path: str) -> Any | None:
        """The object, or None when there is none."""
        try:
            return await self.call("GET", path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def watch(self, path: str, *, version: str, seconds: int = 240) -> AsyncIterator[Object]:
        """Events from a resourceVersion on, until the server ends the watch. Raises ApiError."""
        separator = "&" if "?" in path else "?"
        url = f"{self._server}{path}{separator}watch=1&resourceVersion={version}&timeoutSeconds={seconds}"
        # A broken connection that nobody closes must not blind us: the server ends a watch in time.
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=seconds + 30)
        try:
            async with self._session.get(url, timeout=timeout) as answer:
                if answer.status >= 400:
                    raise ApiError(answer.status, error_message(await answer.text()))
                buffer = b""
                async for chunk in answer.content.iter_any():
                    *lines, buffer = (buffer + chunk).split(b"\n")
                    for line in lines:
                        yield json.loads(line)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ApiError(0, f"the watch broke off: {error}") from error

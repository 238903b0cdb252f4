"""One request to the Kubernetes API: its connection, its fence, its patience with a busy server, its errors.

Typed models of the client validate what the server answers and break on objects that are newer than they are, so
everything here is the parsed JSON.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Self

import aiohttp
import pydantic_core
from kubernetes import aio

from finetune_operator.adapters import api_errors, kubeconfig
from finetune_operator.adapters.api_errors import FencedError, UnavailableError
from finetune_operator.adapters.kubeconfig import KubeconfigError

REQUEST_SECONDS = 30
CONNECTIONS = 128  # at once, of about 100 kB each; further requests wait for their turn
BUSY_TRIES = 4  # of a request that the server was too busy to begin with (429)
BUSY_SECONDS = 5.0  # the longest that one is held back, whatever Retry-After says


def _always() -> bool:
    return True


_fence: ContextVar[Callable[[], bool]] = ContextVar("fence", default=_always)
"""Whether the request that this task is about to send may still be sent."""


class ApiClient:
    """Sends requests. Each write first asks `may_write`, the last moment at which a process that was stopped for a
    while can learn that it leads no more."""

    def __init__(
        self,
        client: aio.client.ApiClient,
        *,
        may_write: Callable[[], bool] = _always,
        on_answer: Callable[[str, int], None] = lambda method, status: None,
    ) -> None:
        self._client = client
        self._may_write = may_write
        self._on_answer = on_answer

    @classmethod
    async def connect(
        cls,
        *,
        may_write: Callable[[], bool] = _always,
        on_answer: Callable[[str, int], None] = lambda method, status: None,
    ) -> Self:
        """A client by the pod's service account or the kubeconfig, without a request yet. `on_answer` is told the
        method and the HTTP status of each request, 0 where there was no answer. Raises KubeconfigError."""
        configuration = await kubeconfig.find(connections=CONNECTIONS)
        configuration.client_session_kwargs = {"trust_env": False, "trace_configs": [_trace()]}
        try:
            client = aio.client.ApiClient(configuration)
        except OSError as error:  # of TLS
            raise KubeconfigError(
                f"the certificates for {configuration.host} cannot be used: {error}"
            ) from error
        return cls(client, may_write=may_write, on_answer=on_answer)

    @property
    def server(self) -> str:
        """URL of the API server."""
        return str(self._client.configuration.host)

    async def close(self) -> None:
        await self._client.close()

    async def _request(
        self,
        method: str,
        path: str,
        *,
        body: dict[str, Any] | list[dict[str, Any]] | None = None,
        content_type: str = "application/json",
        query: list[tuple[str, str]] | None = None,
        accept: str = "application/json",
        missing_ok: bool = False,
    ) -> dict[str, Any] | None:
        """Send it, and again where the server was too busy to begin with it, as every client of Kubernetes does."""
        for number in range(1, BUSY_TRIES + 1):
            status, data, retry_after = await self._send(
                method, path, body=body, content_type=content_type, query=query, accept=accept
            )
            if status != 429 or number == BUSY_TRIES:
                break
            pause = min(BUSY_SECONDS, retry_after * number)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - spreads load
        if status == 404 and missing_ok:
            return None
        if not 200 <= status <= 299:
            raise api_errors.from_answer(status, data, f"{method} {path}")
        parsed: dict[str, Any] = pydantic_core.from_json(data)
        return parsed

    async def _send(
        self,
        method: str,
        path: str,
        *,
        body: dict[str, Any] | list[dict[str, Any]] | None,
        content_type: str,
        query: list[tuple[str, str]] | None,
        accept: str,
    ) -> tuple[int, bytes, float]:
        """Status, body and Retry-After in seconds. Raises UnavailableError where there is no answer."""
        may_send = _always if method == "GET" else self._may_write
        if not may_send():
            raise FencedError(f"{method} {path}: not sent, as this process leads no more")
        token = _fence.set(may_send)
        try:
            method, url, headers, *_ = await self._client.param_serialize(
                method,
                path,
                query_params=query,
                header_params={"Accept": accept, "Content-Type": content_type},
                auth_settings=["BearerToken"],
            )
            # The body goes by as it is: it is plain JSON, of which the client would make a copy for its typed models.
            answer = await self._client.call_api(method, url, headers, body, _request_timeout=REQUEST_SECONDS)
            data = await answer.read()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            self._on_answer(method, 0)
            raise UnavailableError(f"{method} {path}: {type(error).__name__} {error}") from error
        finally:
            _fence.reset(token)
        self._on_answer(method, answer.status)
        return answer.status, data, _seconds(answer.headers.get("Retry-After"))


def _trace() -> aiohttp.TraceConfig:
    """Asks the fence once more when a request has got its connection, for which it may have waited."""

    async def look(*_: object) -> None:
        if not _fence.get()():
            raise FencedError("a request was not sent, as this process leads no more")

    trace = aiohttp.TraceConfig()
    trace.on_connection_create_end.append(look)
    trace.on_connection_reuseconn.append(look)
    return trace


def _seconds(retry_after: str | None) -> float:
    return float(retry_after) if retry_after is not None and retry_after.isdecimal() else 1.0

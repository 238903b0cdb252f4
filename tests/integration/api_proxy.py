"""An API server that misbehaves on demand: a proxy between the operator and the real one.

The operator talks plain HTTP to it; it uses the operator's own certificate, so RBAC stays what it is. Every request
passes the faults in the order in which they were added; the first one that wants it decides.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from aiohttp import web

from finetune_local import kubeapi
from finetune_local.cluster import Cluster
from finetune_local.ports import choose
from tests.integration.rollout_lab import Loop

Json = dict[str, Any]
SEED = int(os.environ.get("FINETUNE_TEST_SEED", "20261121"))
WRITES = ("POST", "PUT", "PATCH", "DELETE")
GONE = {
    "type": "ERROR",
    "object": {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "Expired", "code": 410},
}


class Kind(StrEnum):
    REFUSE = "Refuse"  # answer `status` without passing the request on
    DROP = "Drop"  # cut the connection before the server sees the request
    LOSE = "Lose"  # let the server do it, and cut the connection instead of answering
    DELAY = "Delay"  # pass it on after `seconds`
    CALL_BEFORE = "CallBefore"  # call `then`, and cut the connection before the server sees the request
    CALL_AFTER = "CallAfter"  # let the server do it, call `then`, and cut the connection
    HOLD = "Hold"  # tell the news of a watch `seconds` late


@dataclass
class Fault:
    """`pattern` is searched in "METHOD /path?query"; `chance` of the matches are hit, after the first `skip` ones, and
    at most `times` of them, until time.monotonic() is `until`. HOLD concerns watches that are open already, too: it
    knows no chance."""

    kind: Kind
    pattern: str = ""
    status: int = 503
    seconds: float = 0.0
    chance: float = 1.0
    skip: int = 0
    times: int | None = None
    until: float | None = None
    then: Callable[[], None] | None = None
    hits: int = 0
    _matches: int = 0

    def wants(self, request: str, dice: random.Random) -> bool:
        if self.kind is Kind.HOLD or self._is_over() or not re.search(self.pattern, request):
            return False
        self._matches += 1
        if self._matches <= self.skip or dice.random() >= self.chance:
            return False
        self.hits += 1
        return True

    def delay(self, watch: str) -> float:
        """By how many seconds news of a watch come late."""
        if self.kind is not Kind.HOLD or self._is_over() or not re.search(self.pattern, watch):
            return 0.0
        self.hits += 1
        return self.seconds

    def _is_over(self) -> bool:
        late = self.until is not None and time.monotonic() >= self.until
        return late or (self.times is not None and self.hits >= self.times)


@dataclass(frozen=True)
class Request:
    """One that the server saw or was kept from."""

    at: float
    text: str
    fault: Kind | None


@dataclass
class ApiProxy:
    """Between `cluster`'s API server and whoever uses `kubeconfig`. `seed` decides where chances fall."""

    cluster: Cluster
    folder: Path
    seed: int = 0
    user: str = "operator"
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._loop = Loop()
        self._dice = random.Random(self.seed)
        self._streams: set[asyncio.Task[Any]] = set()
        self._gone: set[asyncio.Task[Any]] = set()
        self.away = threading.Event()
        self._away_until = float("-inf")
        self.port = choose(("proxy",), known={}, in_use_by_us=[])["proxy"]
        self._loop.run(self._start())

    @property
    def kubeconfig(self) -> Path:
        """A kubeconfig that leads here."""
        path = self.folder / "proxy.kubeconfig"
        document = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "proxy",
            "clusters": [{"name": "proxy", "cluster": {"server": f"http://127.0.0.1:{self.port}"}}],
            "contexts": [{"name": "proxy", "context": {"cluster": "proxy", "user": "proxy"}}],
            "users": [{"name": "proxy", "user": {}}],
        }
        path.write_text(yaml.safe_dump(document))
        return path

    def close(self) -> None:
        self._loop.run(self._stop())
        self._loop.close()

    def add(self, fault: Fault) -> Fault:
        self.faults.append(fault)
        return fault

    def cut_watches(self, *, gone: bool = False) -> int:
        """End every stream, with 410 Gone where asked for; returns how many there were."""
        return self._loop.run(self._cut(gone))

    def stay_away(self, seconds: float) -> None:
        """No connection for a while; open watches end."""
        self._away_until = time.monotonic() + seconds
        self.cut_watches()

    def heal(self) -> None:
        """Nothing goes wrong any more."""
        self.faults.clear()
        self.away.clear()
        self._away_until = float("-inf")

    def count(self, pattern: str, *, since: float = 0.0) -> int:
        return sum(1 for r in self.requests if r.at >= since and re.search(pattern, r.text))

    async def _start(self) -> None:
        ports = self.cluster.ports
        self._server = f"https://127.0.0.1:{ports['kube-apiserver']}"
        tls = kubeapi.client_context(self.cluster.layout.pki, self.user)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=tls, limit=0), auto_decompress=False
        )
        application = web.Application(client_max_size=1 << 24)
        application.router.add_route("*", "/{tail:.*}", self._serve)
        self._runner = web.AppRunner(application, shutdown_timeout=0.1, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()

    async def _stop(self) -> None:
        await self._cut(False)
        await self._runner.cleanup()
        await self._session.close()

    async def _cut(self, gone: bool) -> int:
        streams = list(self._streams)
        if gone:
            self._gone.update(streams)
        for stream in streams:
            stream.cancel()
        return len(streams)

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        text = f"{request.method} {request.path_qs}"
        if self.away.is_set() or time.monotonic() < self._away_until:
            return _cut_off(request)
        fault = next((f for f in self.faults if f.wants(text, self._dice)), None)
        self.requests.append(Request(time.time(), text, fault.kind if fault else None))
        match fault.kind if fault else None:
            case Kind.REFUSE if fault:
                return _refusal(fault.status)
            case Kind.DROP:
                return _cut_off(request)
            case Kind.CALL_BEFORE if fault and fault.then:
                fault.then()
                return _cut_off(request)
            case Kind.DELAY if fault:
                await asyncio.sleep(fault.seconds)
        if "watch=true" in request.query_string or "watch=1" in request.query_string:
            return await self._stream(request)
        answer = await self._pass_on(request)
        if fault and fault.kind is Kind.CALL_AFTER and fault.then:
            fault.then()
        if fault and fault.kind in (Kind.LOSE, Kind.CALL_AFTER):
            return _cut_off(request)
        return answer

    async def _pass_on(self, request: web.Request) -> web.Response:
        try:
            async with self._session.request(
                request.method,
                self._server + request.path_qs,
                data=await request.read() or None,
                headers=_headers(request),
                skip_auto_headers=("Content-Type",),
            ) as answer:
                kept = {n: answer.headers[n] for n in ("Content-Encoding",) if n in answer.headers}
                return web.Response(
                    status=answer.status,
                    body=await answer.read(),
                    headers={**kept, "Content-Type": answer.headers.get("Content-Type", "application/json")},
                )
        except aiohttp.ClientError:
            return _cut_off(request)

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        """A watch, until it ends or is cut."""
        task = asyncio.create_task(self._copy(request))
        self._streams.add(task)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if not task.cancelled():
                task.cancel()
                raise
            return _cut_off(request)
        finally:
            self._streams.discard(task)
            self._gone.discard(task)

    async def _copy(self, request: web.Request) -> web.StreamResponse:
        headers = {**_headers(request), "Accept-Encoding": "identity"}
        timeout = aiohttp.ClientTimeout(total=None)
        async with self._session.get(
            self._server + request.path_qs, headers=headers, timeout=timeout, read_bufsize=1 << 24
        ) as answer:
            response = web.StreamResponse(status=answer.status, headers={"Content-Type": "application/json"})
            await response.prepare(request)
            lines: asyncio.Queue[tuple[float, bytes] | None] = asyncio.Queue()
            reading = asyncio.create_task(self._read(answer, f"GET {request.path_qs}", lines))
            try:
                while (due := await lines.get()) is not None:
                    await asyncio.sleep(due[0] - time.monotonic())
                    await response.write(due[1])
                await reading
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task not in self._gone:
                    raise
                with contextlib.suppress(ConnectionError):
                    await response.write(json.dumps(GONE).encode() + b"\n")
            finally:
                reading.cancel()
            return response

    async def _read(
        self,
        answer: aiohttp.ClientResponse,
        watch: str,
        lines: asyncio.Queue[tuple[float, bytes] | None],
    ) -> None:
        """Each line of a watch, with the time at which it is due; None at the end."""
        try:
            async for line in answer.content:  # whole lines: what follows a cut must be readable
                late = max((fault.delay(watch) for fault in self.faults), default=0.0)
                lines.put_nowait((time.monotonic() + late, line))
        finally:
            lines.put_nowait(None)


def _headers(request: web.Request) -> dict[str, str]:
    names = ("Accept", "Content-Type", "Accept-Encoding")
    return {name: request.headers[name] for name in names if name in request.headers}


def _cut_off(request: web.Request) -> web.Response:
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=502)


def _refusal(status: int) -> web.Response:
    body = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "message": "made up", "code": status}
    headers = {"Retry-After": "1"} if status == 429 else {}
    return web.json_response(body, status=status, headers=headers)

"""Engines and routers as the operator sees them, simulated in this process: they keep the contract until told not to.

A simulated engine is its agent (agent/v1); a simulated router is its admin port (routes/v1, counters/v1) and a method
that serves one request. With them a rollout takes seconds, and a test can make any of them lie or die.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from aiohttp import web

from finetune_local.ports import is_free
from finetune_operator.api.routes import (
    COUNTERS_PATH,
    ROUTES_PATH,
    Arm,
    ArmCounters,
    EpochCounters,
    KeySample,
    Route,
    RouterCounters,
    Snapshot,
)

Json = dict[str, Any]
Result = TypeVar("Result")
ROUTER_TOKEN, AGENT_TOKEN = "router-secret", "agent-secret"


class Loop:
    """An event loop in a thread of its own, so that tests may block."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=20)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()


class Server:
    """An HTTP server that can be stopped and started again on its port."""

    def __init__(self, loop: Loop, token: str) -> None:
        self._loop = loop
        self._token = token
        self.asked = 0
        """Requests so far, whatever their token."""
        self._runner: web.AppRunner | None = None
        self.port = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def routes(self) -> list[web.RouteDef]:
        raise NotImplementedError

    def start(self) -> None:
        async def start() -> None:
            application = web.Application(middlewares=[self._guard], client_max_size=64 << 20)
            application.router.add_routes(self.routes())
            self._runner = web.AppRunner(application, shutdown_timeout=0.1)
            await self._runner.setup()
            site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
            await site.start()
            self.port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]

        self._loop.run(start())

    def stop(self) -> None:
        """As if the process had been killed."""
        if self._runner is not None:
            self._loop.run(self._runner.cleanup())
            self._runner = None
            assert is_free(self.port)

    @web.middleware
    async def _guard(self, request: web.Request, handler: Any) -> web.StreamResponse:
        self.asked += 1
        if request.headers.get("Authorization") != f"Bearer {self._token}":
            return web.json_response({"error": "no token"}, status=401)
        answer: web.StreamResponse = await handler(request)
        return answer


class Engine(Server):
    """An engine with its agent. `refuse` names served names that fail to load, with the reason."""

    def __init__(self, loop: Loop, base: str = "base-model") -> None:
        super().__init__(loop, AGENT_TOKEN)
        self.base = base
        self.instance = uuid.uuid4().hex
        self.adapters: dict[str, Json] = {}
        self.loads: list[str] = []
        self.unloads: list[str] = []
        self.refuse: dict[str, str] = {}
        self.load_seconds = 0.0
        self.max_loras = 8
        self.scores: dict[str, float] = {}
        self.evaluating = "Done"
        """State of every evaluation."""
        self._evaluations: dict[str, Json] = {}

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/agent/v1/status", self._status),
            web.put("/agent/v1/adapters/{name}", self._load),
            web.delete("/agent/v1/adapters/{name}", self._unload),
            web.post("/agent/v1/evaluations", self._evaluate),
            web.get("/agent/v1/evaluations/{id}", self._evaluation),
        ]

    def restart(self, *, seconds: float = 0.0) -> None:
        """A new engine process: the agent loads again what was loaded."""
        self.instance = uuid.uuid4().hex
        for adapter in self.adapters.values():
            adapter.update(state="Loading", ready_at=time.monotonic() + seconds)

    def has(self, name: str) -> bool:
        self._settle()
        return self.adapters.get(name, {}).get("state") == "Loaded"

    def _settle(self) -> None:
        for adapter in self.adapters.values():
            if adapter["state"] == "Loading" and time.monotonic() >= adapter["ready_at"]:
                adapter["state"] = "Loaded"

    async def _status(self, _: web.Request) -> web.Response:
        self._settle()
        shown = ("name", "digest", "uri", "state", "reason", "message")
        return web.json_response(
            {
                "apiVersion": "agent/v1",
                "engine": {
                    "ready": True,
                    "instance": self.instance,
                    "baseModel": self.base,
                    "baseModels": [self.base],
                    "message": "",
                },
                "capacity": {
                    "maxLoras": self.max_loras,
                    "loadedLoras": len(self.adapters),
                    "maxLoraRank": 64,
                },
                "adapters": [
                    {name: adapter[name] for name in shown if adapter.get(name) is not None}
                    for adapter in self.adapters.values()
                ],
            }
        )

    async def _load(self, request: web.Request) -> web.Response:
        name, body = request.match_info["name"], await request.json()
        known = self.adapters.get(name)
        if known and known["state"] != "Failed":
            return web.json_response({}, status=200 if known["digest"] == body["digest"] else 409)
        self.loads.append(name)
        reason = self.refuse.get(name)
        self.adapters[name] = {
            "name": name,
            **body,
            "state": "Failed" if reason else "Loading",
            "reason": reason,
            "message": "told to fail" if reason else "",
            "ready_at": time.monotonic() + self.load_seconds,
        }
        return web.json_response({}, status=202)

    async def _unload(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        known = self.adapters.pop(name, None)
        if known is not None:
            self.unloads.append(name)
        return web.json_response({}, status=202 if known else 200)

    async def _evaluate(self, request: web.Request) -> web.Response:
        body = await request.json()
        scores = {name: {"score": self.scores.get(name, 0.5), "rows": 10} for name in body["models"]}
        self._evaluations[body["id"]] = {"id": body["id"], "state": "Done", "message": "", "scores": scores}
        return web.json_response({}, status=202)

    async def _evaluation(self, request: web.Request) -> web.Response:
        found = self._evaluations.get(request.match_info["id"])
        if found is not None:
            found = {**found, "state": self.evaluating}
        return web.json_response(found or {}, status=200 if found else 404)


@dataclass
class Tally:
    requests: int = 0
    events: dict[str, int] = field(default_factory=dict)
    watched: dict[str, int] = field(default_factory=dict)


class Router(Server):
    """A router replica. It remembers its snapshot over `stop` and `start`, and forgets it with `forget`."""

    def __init__(self, loop: Loop) -> None:
        super().__init__(loop, ROUTER_TOKEN)
        self.instance = uuid.uuid4().hex
        self.snapshot: Snapshot | None = None
        self.applied: list[tuple[float, Snapshot]] = []
        """When each snapshot was applied (time.monotonic), newest last."""
        self.claims: int | None = None
        """Version that it lies about."""
        self.garbage: bytes | None = None
        """What it answers in place of its counters."""
        self.deaf = False
        """Whether it keeps the routes that it has."""
        self._lock = threading.Lock()
        self._begin()

    def _begin(self) -> None:
        self._epoch = uuid.uuid4().hex
        self._tallies: dict[tuple[str, Arm, str], Tally] = {}
        self._keys: dict[tuple[str, str], tuple[set[int], set[int]]] = {}

    def forget(self) -> None:
        """A new process without a disk."""
        self.snapshot = None
        self._begin()

    def restart(self) -> None:
        """A new process that finds its snapshot on disk."""
        self._begin()

    def routes(self) -> list[web.RouteDef]:
        return [
            web.put(ROUTES_PATH, self._put),
            web.get(ROUTES_PATH, self._get),
            web.get(COUNTERS_PATH, self._counters),
        ]

    def route(self, alias: str) -> Route | None:
        snapshot = self.snapshot
        return next((r for r in snapshot.routes if r.alias == alias), None) if snapshot else None

    def weight(self, alias: str) -> float | None:
        route = self.route(alias)
        return route.weight if route else None

    def serve(
        self, alias: str, key: str, fails: Callable[[str], bool] = lambda revision: False
    ) -> str | None:
        """One request; returns the revision that answered, None for 503. Never an engine that has not loaded it."""
        route = self.route(alias)
        if route is None or route.stable is None or not route.stable.upstreams:
            return None
        digest = hashlib.sha256(route.salt.encode() + b"\0" + key.encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2.0**64
        arm, target = Arm.STABLE, route.stable
        if route.candidate is not None and place >= 1 - route.weight / 100:
            arm, target = Arm.CANDIDATE, route.candidate
        with self._lock:
            tally = self._tallies.setdefault((alias, arm, target.revision), Tally())
            tally.requests += 1
            for signal in route.signals:
                tally.watched[signal.name] = tally.watched.get(signal.name, 0) + 1
            if fails(target.revision):
                for signal in route.signals:
                    if signal.event == "error":
                        tally.events[signal.name] = tally.events.get(signal.name, 0) + 1
            sample = self._keys.setdefault((alias, route.comparison), (set(), set()))
            hashed = int.from_bytes(hashlib.sha256(f"sample {key}".encode()).digest()[:8], "big") >> 11
            sample[arm is Arm.CANDIDATE].add(hashed)
        return target.revision

    @property
    def version(self) -> int:
        if self.claims is not None:
            return self.claims
        return self.snapshot.version if self.snapshot else 0

    async def _put(self, request: web.Request) -> web.Response:
        if self.deaf:
            return await self._get(request)
        snapshot = Snapshot.model_validate_json(await request.read())
        if self.snapshot is not None and snapshot.version < self.snapshot.version:
            return web.json_response({"error": "older"}, status=409)
        if self.snapshot is None or snapshot.version > self.snapshot.version:
            self.snapshot = snapshot
            self.applied.append((time.monotonic(), snapshot))
        return await self._get(request)

    async def _get(self, _: web.Request) -> web.Response:
        return web.json_response({"instance": self.instance, "version": self.version})

    async def _counters(self, _: web.Request) -> web.Response:
        if self.garbage is not None:
            return web.Response(body=self.garbage, content_type="application/json")
        with self._lock:
            arms = tuple(
                ArmCounters(
                    alias=alias,
                    arm=arm,
                    revision=revision,
                    requests=t.requests,
                    events=dict(t.events),
                    watched=dict(t.watched),
                )
                for (alias, arm, revision), t in self._tallies.items()
            )
            samples = tuple(
                KeySample(
                    alias=alias,
                    comparison=comparison,
                    stable=tuple(sorted(stable)[:1024]),
                    candidate=tuple(sorted(candidate)[:1024]),
                )
                for (alias, comparison), (stable, candidate) in self._keys.items()
            )
            told = RouterCounters(
                instance=self.instance,
                version=self.version,
                epochs=(EpochCounters(epoch=self._epoch, arms=arms, samples=samples),),
            )
        return web.Response(body=told.model_dump_json(by_alias=True), content_type="application/json")

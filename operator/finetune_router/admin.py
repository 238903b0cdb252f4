"""The admin port: routes in, counters and metrics out, probes. Wire contract: finetune_operator.api.routes."""

from __future__ import annotations

import asyncio
import hmac
import logging
import sqlite3
from collections.abc import Awaitable, Callable
from pathlib import Path

from aiohttp import web
from prometheus_client import CollectorRegistry, exposition
from pydantic import BaseModel, ValidationError

from finetune_operator.api.routes import COUNTERS_PATH, ROUTES_PATH, RoutesApplied, Snapshot
from finetune_router import credentials, fleet
from finetune_router.exposition import Gauges, MetricsBoard, RouterCollector
from finetune_router.feedback import FeedbackStore
from finetune_router.fleet import Fleet
from finetune_router.ledger import Ledger
from finetune_router.routing import RouteKeeper

logger = logging.getLogger(__name__)

_SNAPSHOT_LIMIT = 64 * 1024 * 1024  # bytes
_OPEN_PATHS = frozenset(("/metrics", "/healthz", "/readyz"))


class AdminPort:
    """Answers the operator, Prometheus and the kubelet."""

    def __init__(
        self,
        *,
        instance: str,
        token_file: str,
        keeper: RouteKeeper,
        workers: Fleet,
        ledger: Ledger,
        board: MetricsBoard,
        store: FeedbackStore,
    ) -> None:
        self._instance = instance
        self._token_file = Path(token_file) if token_file else None
        self._keeper = keeper
        self._workers = workers
        self._ledger = ledger
        self._board = board
        self._store = store
        self.draining = False

    def application(self) -> web.Application:
        application = web.Application(client_max_size=_SNAPSHOT_LIMIT, middlewares=[self._guard])
        application.router.add_put(ROUTES_PATH, self._put_routes)
        application.router.add_get(ROUTES_PATH, self._get_routes)
        application.router.add_get(COUNTERS_PATH, self._get_counters)
        application.router.add_get("/metrics", self._get_metrics)
        application.router.add_get("/healthz", self._get_health)
        application.router.add_get("/readyz", self._get_readiness)
        return application

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if self._token_file is not None and request.path not in _OPEN_PATHS:
            given = credentials.bearer_token(request.headers.get("Authorization"))
            # Read each time: a Secret may be rotated, and this port sees a few requests a second.
            expected = self._token_file.read_text(encoding="utf-8").strip()
            told = given.encode("utf-8", "surrogateescape")  # the bytes of the header, whatever they are
            if not expected or not hmac.compare_digest(told, expected.encode()):
                return web.json_response(
                    {"error": "send the admin token as Authorization: Bearer"}, status=401
                )
        return await handler(request)

    async def _put_routes(self, request: web.Request) -> web.Response:
        try:
            snapshot = Snapshot.model_validate_json(await request.read())
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "body"
            return web.json_response({"error": f"{where}: {first['msg']}"}, status=400)
        try:
            accepted = await self._keeper.offer(snapshot)
        except ValueError as error:
            return web.json_response({"error": str(error)}, status=400)
        if not accepted:
            refusal = f"version {snapshot.version} is older than {self._keeper.version}, which is in force"
            return web.json_response(
                {"error": refusal, "instance": self._instance, "version": self._workers.version()}, status=409
            )
        return self._applied()

    async def _get_routes(self, request: web.Request) -> web.Response:
        return self._applied()

    def _applied(self) -> web.Response:
        return _model(RoutesApplied(instance=self._instance, version=max(0, self._workers.version())))

    async def _get_counters(self, request: web.Request) -> web.Response:
        await self._workers.gather()
        try:
            feedback = await asyncio.to_thread(self._store.sums)
        except sqlite3.Error as error:  # what the workers counted is the evidence; guardrails need it at once
            logger.error("no feedback in the counters: %s", error)
            feedback = None
        version = max(0, self._workers.version())
        body = self._ledger.wire(instance=self._instance, version=version, feedback=feedback)
        return web.Response(body=body, content_type="application/json")

    async def _get_metrics(self, request: web.Request) -> web.Response:
        await self._workers.gather()
        lives = self._workers.lives
        gauges = Gauges(
            workers=sum(life.serving for life in lives),
            in_flight=sum(life.in_flight for life in lives),
            restarts=self._workers.restarts,
            version=self._workers.version(),
            unread=sum(life.unread for life in lives),
        )
        registry = CollectorRegistry(auto_describe=False)
        registry.register(RouterCollector(self._board, gauges))
        try:
            encode, content_type = exposition.choose_encoder(request.headers.get("Accept", ""))
        except (TypeError, ValueError):  # a version that is none, for example in quotes
            encode, content_type = exposition.choose_encoder("")
        return web.Response(body=encode(registry), headers={"Content-Type": content_type})

    async def _get_health(self, request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def _get_readiness(self, request: web.Request) -> web.Response:
        reasons = []
        if self.draining:
            reasons.append("the router is being stopped")
        if not self._workers.all_serving():
            reasons.append("not all workers serve yet")
        if not self._keeper.has_routes and self._keeper.expects_routes:
            reasons.append("no routes yet: neither the routes file nor the operator has given any")
        body = {
            "ready": not reasons,
            "reasons": reasons,
            "version": self._workers.version(),
            "workers": [fleet.describe(life) for life in self._workers.lives],
        }
        return web.json_response(body, status=503 if reasons else 200)


def _model(model: BaseModel) -> web.Response:
    return web.Response(body=model.model_dump_json(by_alias=True).encode(), content_type="application/json")

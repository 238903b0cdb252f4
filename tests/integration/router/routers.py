"""Starts the real router as a process, and speaks to its admin port."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp

from finetune_operator.api.routes import (
    COUNTERS_PATH,
    ROUTES_PATH,
    Arm,
    ArmCounters,
    BaseModelRoute,
    Route,
    RouterCounters,
    Signal,
    SignalEvent,
    Snapshot,
    Target,
)

ADMIN_TOKEN = "admin-token-of-the-tests"
START_SECONDS = 60.0
_PORTS = re.compile(r"data port \S+?:(\d+), admin port \S+?:(\d+)")
_versions = itertools.count(1)
_starts = itertools.count(1)

SIGNALS = (
    Signal(name="errors", event=SignalEvent.ERROR),
    Signal(name="slow", event=SignalEvent.TTFT_OVER, threshold=0.25),
    Signal(name="long", event=SignalEvent.LATENCY_OVER, threshold=0.4),
    Signal(name="invalid", event=SignalEvent.SCHEMA_INVALID),
    Signal(name="empty", event=SignalEvent.EMPTY),
    Signal(name="cut", event=SignalEvent.TRUNCATED),
    Signal(name="refused", event=SignalEvent.REFUSAL),
    Signal(name="loops", event=SignalEvent.REPETITION),
)

CANDIDATE = "ab12cd34"
CHAT = "/v1/chat/completions"


class Router:
    """One router process."""

    def __init__(self, folder: Path, *flags: str, workers: int = 1) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        token = folder / "admin.token"
        token.write_text(ADMIN_TOKEN + "\n")
        self.log = folder / f"router-{next(_starts)}.log"
        self._flags = [
            "--port", "0", "--admin-port", "0", "--state-dir", str(folder / "state"),
            "--admin-token-file", str(token), "--workers", str(workers), *flags,
        ]  # fmt: skip
        self.process: subprocess.Popen[bytes] | None = None
        self.port = 0
        self.admin_port = 0

    def start(self, *, wait_ready: bool = True) -> None:
        with self.log.open("ab") as log:
            beginning = log.tell()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "finetune_router", *self._flags],
                stdout=log,
                stderr=log,
                env=dict(os.environ),
            )
        end = time.monotonic() + START_SECONDS
        while (found := _PORTS.search(self.log.read_text()[beginning:])) is None:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.02)
        self.port, self.admin_port = int(found[1]), int(found[2])
        if wait_ready:
            asyncio.run(self._wait_ready(end))

    async def _wait_ready(self, end: float) -> None:
        while (await self.readiness())[0] != 200:
            assert time.monotonic() < end, self.log.read_text()
            await asyncio.sleep(0.02)

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def admin_url(self) -> str:
        return f"http://127.0.0.1:{self.admin_port}"

    async def admin(
        self, method: str, path: str, *, token: str = ADMIN_TOKEN, data: str | None = None
    ) -> tuple[int, str]:
        headers = {"Authorization": f"Bearer {token}"}
        async with (
            aiohttp.ClientSession() as session,
            session.request(method, self.admin_url + path, data=data, headers=headers) as response,
        ):
            return response.status, await response.text()

    async def push(self, *routes: Route, base_models: tuple[BaseModelRoute, ...] = ()) -> int:
        """Put routes in force; returns their version."""
        snapshot = Snapshot(version=next(_versions), routes=routes, base_models=base_models)
        status, text = await self.admin("PUT", ROUTES_PATH, data=snapshot.model_dump_json(by_alias=True))
        assert status == 200, text
        return snapshot.version

    async def readiness(self) -> tuple[int, str]:
        return await self.admin("GET", "/readyz")

    async def counters(self) -> RouterCounters:
        status, text = await self.admin("GET", COUNTERS_PATH)
        assert status == 200, text
        return RouterCounters.model_validate_json(text)

    async def arm(self, alias: str, arm: Arm) -> ArmCounters:
        """The arm's counts over all epochs and revisions; zeros when there are none."""
        found = [
            counted
            for epoch in (await self.counters()).epochs
            for counted in epoch.arms
            if counted.alias == alias and counted.arm == arm and not counted.scores
        ]
        total = ArmCounters(alias=alias, arm=arm, revision="")
        for counted in found:
            events = {
                name: total.events.get(name, 0) + counted.events.get(name, 0)
                for name in {*total.events, *counted.events}
            }
            total = total.model_copy(
                update={
                    "requests": total.requests + counted.requests,
                    "fallbacks": total.fallbacks + counted.fallbacks,
                    "events": events,
                }
            )
        return total

    async def metrics(self) -> str:
        return (await self.admin("GET", "/metrics"))[1]


def target(revision: str, *urls: str, alias: str = "bot") -> Target:
    name = "base-model" if revision == "base" else f"{alias}--{revision}"
    return Target(revision=revision, served_name=name, upstreams=urls)


def route(alias: str, stable: Target | None, candidate: Target | None = None, **more: Any) -> Route:
    """A route with all signals armed."""
    values: dict[str, Any] = {"salt": "salt", "signals": SIGNALS, "comparison": "c1", **more}
    return Route(alias=alias, owner="default/bot/uid", stable=stable, candidate=candidate, **values)


def ask(model: str, user: str | None = None, **more: object) -> dict[str, Any]:
    """The body of a chat."""
    document: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "hi"}], **more}
    return document if user is None else {**document, "user": user}


async def arms_of(
    session: aiohttp.ClientSession, router: Router, alias: str, users: list[str]
) -> dict[str, str]:
    """Which arm answers each user."""

    async def one(user: str) -> tuple[str, str]:
        async with session.post(router.url + CHAT, json=ask(alias, user)) as response:
            assert response.status == 200
            return user, response.headers["x-adapter-arm"]

    return dict(await asyncio.gather(*(one(user) for user in users)))

"""Real routers before an engine that answers without a model, an operator of their own, and users who ask all the time.

What the routers send, count and confirm is real; only the engine is played, so that a test can make a revision fail or
hang at a known moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import aiohttp
from aiohttp import web

from finetune_local.cluster import Cluster
from finetune_operator.api.routes import Snapshot
from tests.clients import Kubectl
from tests.integration.rollout_lab import AGENT_TOKEN
from tests.integration.rollout_lab import Engine as Agent
from tests.integration.rollout_operator import Lab
from tests.integration.router import engines
from tests.integration.router.engines import Behaviour
from tests.integration.router.routers import ADMIN_TOKEN, Router

BASE = "base-model"


class Answering(engines.Engine):
    """Answers for what its agent has loaded, and for the base model."""

    def __init__(self, agent: Agent) -> None:
        super().__init__()
        self._agent = agent

    async def handle(self, request: web.Request) -> web.StreamResponse:
        agent = self._agent
        self.models = {BASE, *(name for name in list(agent.adapters) if agent.has(name))}
        return await super().handle(request)


class RealLab(Lab):
    """`served` is the engine's data port, `engine` its agent, `fronts` are the routers."""

    def __init__(self, cluster: Cluster, kubectl: Kubectl, folder: Path, *, routers: int = 2) -> None:
        super().__init__(cluster, kubectl, folder, routers=0)
        (folder / "router-token").write_text(ADMIN_TOKEN)
        (folder / "agent-token").write_text(AGENT_TOKEN)
        self._runners: list[web.AppRunner] = []
        self.served = self.serve(self.engine)
        self.fronts = [Router(folder / f"router-{number}") for number in range(routers)]
        for front in self.fronts:
            front.start(wait_ready=False)

    def serve(self, agent: Agent) -> Answering:
        """A data port for the agent's engine; it is closed with the lab."""
        served = Answering(agent)
        self.loop.run(self._listen(served))
        return served

    async def _listen(self, served: Answering) -> None:
        application = web.Application(client_max_size=64 << 20)
        application.router.add_post("/{path:.*}", served.handle)
        runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        served.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._runners.append(runner)

    def operator_environment(self) -> dict[str, str]:
        return {
            **super().operator_environment(),
            "FINETUNE_ROUTER_ADMIN_URLS": ",".join(front.admin_url for front in self.fronts),
            "FINETUNE_ENGINE_URL": self.served.url,
        }

    def behave(self, revision: str, how: Behaviour, *, alias: str = "bot") -> None:
        """How the engine answers for a revision from now on."""
        self.served.behaviours[f"{alias}--{revision}"] = how

    def weights(self, *, alias: str = "bot") -> list[float | None]:
        """The candidate's weight in each router, by the router's own mirror of its routes."""
        return [weight_at(front, alias) for front in self.fronts]

    def close(self) -> None:
        for front in self.fronts:
            front.kill()
        for runner in self._runners:
            self.loop.run(runner.cleanup())
        super().close()


def weight_at(front: Router, alias: str) -> float | None:
    """None: it has no such alias, or no routes yet."""
    try:
        snapshot = Snapshot.model_validate_json((front.folder / "state" / "routes.json").read_text())
    except (OSError, ValueError):
        return None
    return next((route.weight for route in snapshot.routes if route.alias == alias), None)


@dataclass(frozen=True)
class Reply:
    """What a user got."""

    sent: float
    """Clock of time.monotonic."""
    user: str
    status: int
    """0: the connection broke."""
    revision: str
    front: int
    """Which router was asked."""


class Users:
    """They ask at a fixed rate, of whichever router is next. One that accepts no connection is passed over, as a
    Service does. Replies are kept."""

    def __init__(self, lab: RealLab, *, rate: float = 40, users: int = 211, alias: str = "bot") -> None:
        self._lab = lab
        self._rate, self._users, self._alias = rate, users, alias
        self.replies: list[Reply] = []
        self._asking: set[asyncio.Task[None]] = set()
        self._task = asyncio.run_coroutine_threadsafe(self._run(), lab.loop._loop)

    async def _run(self) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            number = 0
            try:
                while True:
                    number += 1
                    task = asyncio.create_task(self._ask(session, number))
                    self._asking.add(task)
                    task.add_done_callback(self._asking.discard)
                    await asyncio.sleep(1 / self._rate)
            finally:
                await asyncio.wait_for(asyncio.gather(*self._asking), 30)

    async def _ask(self, session: aiohttp.ClientSession, number: int) -> None:
        user, sent, fronts = f"user {number % self._users}", time.monotonic(), self._lab.fronts
        body = {"model": self._alias, "prompt": "a red cup", "max_tokens": 3, "user": user}
        for turn in range(len(fronts)):
            index = (number + turn) % len(fronts)
            try:
                async with session.post(f"{fronts[index].url}/v1/completions", json=body) as answer:
                    await answer.read()
                    revision = answer.headers.get("x-adapter-revision", "")
                    self.replies.append(Reply(sent, user, answer.status, revision, index))
                    return
            except aiohttp.ClientConnectorError:
                continue
            except (aiohttp.ClientError, OSError):
                self.replies.append(Reply(sent, user, 0, "", index))
                return
        self.replies.append(Reply(sent, user, 0, "", -1))

    def close(self) -> None:
        self._task.cancel()
        with contextlib.suppress(BaseException):
            self._task.result(timeout=40)
        deadline = time.monotonic() + 30
        while self._asking and time.monotonic() < deadline:
            time.sleep(0.05)

    @property
    def failures(self) -> list[Reply]:
        return [reply for reply in self.replies if reply.status != 200]

    def answered(self) -> Counter[str]:
        """Answers by revision."""
        return Counter(reply.revision for reply in self.replies if reply.status == 200)

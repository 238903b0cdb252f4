"""Adapters of deployments that are gone, taken out of the engines."""

from __future__ import annotations

import asyncio
import logging
import re

from finetune_operator.adapters.agents import Agents, Unheard
from finetune_operator.reconcile.routes import Publisher

logger = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
GIVE_UP_SECONDS = 3600.0  # an engine that is away for longer is gone itself
REVISION = re.compile(r"[0-9a-f]{8}")


class Orphans:
    """Unloads what is left of an alias that nobody owns: only names that we gave (`<alias>--<revision>`), only at
    agents that were asked to load something for that alias, and only `drain_seconds` after every router stopped
    sending requests there, so that answers under way end first."""

    def __init__(self, *, publisher: Publisher, agents: Agents, drain_seconds: float) -> None:
        self._publisher = publisher
        self._agents = agents
        self._drain_seconds = drain_seconds
        self._since: dict[str, float] = {}
        self._away: dict[tuple[str, str], float] = {}

    async def run(self) -> None:
        """Look again and again until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self.look()

    async def look(self) -> None:
        now = asyncio.get_running_loop().time()
        left = self._publisher.left_behind()
        self._since = {alias: self._since.get(alias, now) for alias in left}
        for alias, urls in left.items():
            if now - self._since[alias] >= self._drain_seconds:
                await asyncio.gather(*(self._clean(alias, url) for url in urls))

    async def _clean(self, alias: str, agent_url: str) -> None:
        now = asyncio.get_running_loop().time()
        status = await self._agents.status(agent_url)
        if isinstance(status, Unheard):
            if now - self._away.setdefault((alias, agent_url), now) > GIVE_UP_SECONDS:
                logger.warning("agent %s is away for good; adapters of %s are given up", agent_url, alias)
                self._publisher.cleaned(alias, agent_url)
            return
        self._away.pop((alias, agent_url), None)
        names = [adapter.name for adapter in status.adapters if is_of(adapter.name, alias)]
        if not names:
            self._publisher.cleaned(alias, agent_url)
        for name in names:
            logger.info("unloading %s from %s: its AdapterDeployment is gone", name, agent_url)
            await self._agents.unload(agent_url, name=name)


def is_of(served_name: str, alias: str) -> bool:
    """Whether an engine's adapter has a name that we gave to an adapter of the alias."""
    head, _, revision = served_name.rpartition("--")
    return head == alias and REVISION.fullmatch(revision) is not None

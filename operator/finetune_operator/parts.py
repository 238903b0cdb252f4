"""The operator's parts for AdapterDeployments, put together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from finetune_operator.adapters import fetching
from finetune_operator.adapters.addresses import Resolver
from finetune_operator.adapters.agents import Agents
from finetune_operator.adapters.api_errors import ApiError
from finetune_operator.adapters.fetching import TokenFile
from finetune_operator.adapters.kube import Kube
from finetune_operator.adapters.prometheus import Prometheus
from finetune_operator.adapters.routers import Routers
from finetune_operator.adapters.telemetry import Telemetry
from finetune_operator.adapters.webhooks import Alerts, Webhooks
from finetune_operator.api.adapterdeployment import KIND
from finetune_operator.config import OperatorConfig
from finetune_operator.reconcile.adapterdeployment import AdapterDeploymentReconciler
from finetune_operator.reconcile.announcements import Announcer
from finetune_operator.reconcile.emergencies import Emergencies
from finetune_operator.reconcile.engines import Engines
from finetune_operator.reconcile.errands import Errands
from finetune_operator.reconcile.evidence import EvidenceBook
from finetune_operator.reconcile.facts import UnreadableStatusError
from finetune_operator.reconcile.fleet import Fleet
from finetune_operator.reconcile.orphans import Orphans
from finetune_operator.reconcile.queue import Key, KeyedQueue
from finetune_operator.reconcile.routes import Publisher
from finetune_operator.reconcile.watchlist import Watchlist

logger = logging.getLogger(__name__)

CONCURRENCY = 16  # passes at once: they mostly wait for agents
# Failures of a pass whose messages say it all: a right that is missing, an object that is gone by now.
ORDINARY = (ApiError, UnreadableStatusError)


@dataclass(frozen=True)
class Rollouts:
    """What the rest of the operator needs of them."""

    queue: KeyedQueue
    watchlist: Watchlist
    publisher: Publisher
    fleet: Fleet
    orphans: Orphans

    async def run(self) -> None:
        """Serve until cancelled; a part that fails ends all."""
        async with asyncio.TaskGroup() as group:
            await self.publisher.start()
            group.create_task(self.queue.run(), name="deployments")
            group.create_task(self.fleet.run(), name="routers")
            group.create_task(self.orphans.run(), name="orphans")


@contextlib.asynccontextmanager
async def build_rollouts(
    settings: OperatorConfig, *, kube: Kube, telemetry: Telemetry, may_act: Callable[[], bool] = lambda: True
) -> AsyncIterator[Rollouts]:
    """The parts, with HTTP sessions that are closed at the end and send only what `may_act` allows."""
    if not settings.router_admin_urls:
        logger.warning("FINETUNE_ROUTER_ADMIN_URLS is not set: AdapterDeployments will wait for a router")
    async with (
        fetching.open_session(may_send=may_act) as to_routers,
        fetching.open_session(may_send=may_act) as to_agents,
        fetching.open_session(may_send=may_act) as to_others,
    ):
        resolver = Resolver()
        agents = Agents(to_agents, TokenFile(settings.agent_token_file))
        routers = Routers(
            to_routers, resolver, settings.router_admin_urls, TokenFile(settings.router_token_file)
        )
        may_quote = settings.engine_endpoints.is_known
        fleet = Fleet(routers)
        queues: list[KeyedQueue] = []

        def wake(key: Key) -> None:
            queues[0].add(key)

        watchlist = Watchlist(fleet=fleet, wake=wake)
        publisher = Publisher(
            kube=kube, fleet=fleet, namespace=settings.namespace, served=settings.namespaces, wake=wake
        )
        errands = Errands(
            prometheus=Prometheus(to_others, may_quote),
            webhooks=Webhooks(to_others, may_quote),
            alerts=Alerts(to_others, settings.alert_providers_file),
            wake=wake,
        )
        book = EvidenceBook(kube, fleet)
        emergencies = Emergencies(publisher, book)
        watchlist.is_harmed = emergencies.is_due
        reconciler = AdapterDeploymentReconciler(
            kube=kube,
            telemetry=telemetry,
            engines=Engines(
                kube,
                agents,
                resolver,
                settings.engine_endpoints,
                default_url=settings.engine_url,
                default_agent_url=settings.agent_url,
            ),
            agents=agents,
            publisher=publisher,
            book=book,
            errands=errands,
            watchlist=watchlist,
            announcer=Announcer(kube=kube, errands=errands),
            emergencies=emergencies,
        )
        queues.append(KeyedQueue(reconciler, concurrency=CONCURRENCY, ordinary=ORDINARY))
        telemetry.queue_depth.labels(KIND).set_function(queues[0].depth)
        orphans = Orphans(publisher=publisher, agents=agents, drain_seconds=settings.drain_seconds)
        yield Rollouts(queues[0], watchlist, publisher, fleet, orphans)

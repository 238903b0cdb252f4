"""The evidence of every rollout under way: folded from the routers' counters, stored before it decides anything."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from finetune_operator.adapters.api_errors import ConflictError
from finetune_operator.adapters.kube import Kube
from finetune_operator.api.adapterdeployment import AdapterDeploymentSpec
from finetune_operator.api.adapterdeployment_status import AdapterDeploymentStatus
from finetune_operator.api.adapterdeployment_traffic import StickinessType
from finetune_operator.api.routes import Route
from finetune_operator.core import rollout_checks, statistics
from finetune_operator.core.durations import parse_duration
from finetune_operator.core.rollout_facts import DeploymentFacts, EvidenceFacts
from finetune_operator.manifests import evidence as manifests
from finetune_operator.reconcile import facts
from finetune_operator.reconcile.fleet import Fleet
from finetune_operator.reconcile.queue import Key

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Page:
    """The evidence of one deployment, as it is stored."""

    uid: str
    evidence: statistics.Evidence | None
    resource_version: str | None
    polls: int = -1
    """The poll that was folded last."""
    stored: bool = True
    """Whether it is what the ConfigMap says: not so for what was folded while the API server was away."""


@dataclass(frozen=True)
class Comparison:
    """What is compared: two revisions in one rollout."""

    route: Route
    rollout: str
    """Start of the rollout: the same candidate may come twice."""
    is_settling: bool = False
    """Whether the weight was changed a short while ago."""

    @property
    def share(self) -> float:
        """Percent of the answers, copies included, that are meant to be the candidate's."""
        copies = self.route.mirror * (100.0 - self.route.weight) / 100.0
        return 100.0 * (self.route.weight + copies) / (100.0 + copies)

    def holds(self, evidence: statistics.Evidence) -> bool:
        """Whether the evidence is about this."""
        stable, candidate = self.route.stable, self.route.candidate
        return (
            evidence.alias == self.route.alias
            and evidence.rollout == self.rollout
            and stable is not None
            and evidence.stable_revision == stable.revision
            and candidate is not None
            and evidence.candidate_revision == candidate.revision
        )


class EvidenceBook:
    """Remembers what is stored, so that a pass without news costs no request."""

    def __init__(
        self, kube: Kube, fleet: Fleet, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._kube = kube
        self._fleet = fleet
        self._clock = clock
        self._pages: dict[Key, Page] = {}

    async def look(self, deployment: DeploymentFacts, route: Route | None) -> EvidenceFacts | None:
        """What the evidence says by now; None while nothing is compared. New evidence is stored first, with what
        `peek` has gathered.

        Raises ApiError; ConflictError when the stored evidence is not what we knew, so that the pass starts over.
        """
        if deployment.spec is None or route is None or not _is_exposed(deployment.status, route):
            return None
        page = await self._page(deployment)
        comparison = self._comparison(deployment.spec, deployment.status, route)
        if self._has_news(page, comparison):
            page = await self._fold(deployment, page, comparison)
        return self._assess(deployment, page, comparison)

    def peek(self, deployment: DeploymentFacts, route: Route | None) -> EvidenceFacts | None:
        """The same without the API server: what was known before it went away, and what the routers have told since."""
        if deployment.spec is None or route is None or not _is_exposed(deployment.status, route):
            return None
        page = self._pages.get((deployment.namespace, deployment.name))
        if page is None or page.uid != deployment.uid:
            return None
        comparison = self._comparison(deployment.spec, deployment.status, route)
        if page.evidence is not None and self._has_news(page, comparison):
            folded = self._folded(page.evidence, comparison, plan_of(deployment.spec))
            page = Page(page.uid, folded, page.resource_version, self._fleet.polls, stored=False)
            self._pages[deployment.namespace, deployment.name] = page
        return self._assess(deployment, page, comparison)

    def _comparison(
        self, spec: AdapterDeploymentSpec, status: AdapterDeploymentStatus, route: Route
    ) -> Comparison:
        interval = parse_duration(spec.analysis.interval)
        is_settling = rollout_checks.is_settling(status, interval=interval, now=self._clock())
        return Comparison(route, _rollout(status), is_settling)

    def _has_news(self, page: Page, comparison: Comparison) -> bool:
        """Whether there is something to fold or to store. Without a candidate in the route (no engine has it just now)
        what was counted before still stands."""
        if comparison.route.candidate is None:
            return not page.stored
        return page.polls != self._fleet.polls or page.evidence is None or not page.stored

    def _assess(
        self, deployment: DeploymentFacts, page: Page, comparison: Comparison
    ) -> EvidenceFacts | None:
        if deployment.spec is None or page.evidence is None or page.evidence.rollout != comparison.rollout:
            return None
        assessment = statistics.assess(
            page.evidence, plan_of(deployment.spec), weight=comparison.route.weight
        )
        return EvidenceFacts(checks=assessment.checks, last_heard=self._fleet.last_heard())

    async def begin(
        self, deployment: DeploymentFacts, status: AdapterDeploymentStatus, route: Route | None
    ) -> None:
        """Draw the starting line of a rollout, before the routers hear of it. Of one that is known, nothing changes."""
        if deployment.spec is None or route is None or route.stable is None or route.candidate is None:
            return
        page = await self._page(deployment)
        comparison = self._comparison(deployment.spec, status, route)
        if page.evidence is not None and comparison.holds(page.evidence):
            return
        await self._fleet.poll()
        await self._fold(deployment, page, comparison)

    def forget(self, key: Key) -> None:
        self._pages.pop(key, None)

    async def _page(self, deployment: DeploymentFacts) -> Page:
        key = (deployment.namespace, deployment.name)
        page = self._pages.get(key)
        if page is None or page.uid != deployment.uid:
            page = self._pages[key] = await self._read(deployment)
        return page

    async def _read(self, deployment: DeploymentFacts) -> Page:
        name = manifests.name_of(deployment.name)
        body = await self._kube.get("v1", "ConfigMap", deployment.namespace, name)
        if body is None:
            return Page(deployment.uid, None, None)
        version = body["metadata"]["resourceVersion"]
        if not manifests.is_owned_by(body, deployment.uid):  # of a deployment that had our name
            return Page(deployment.uid, None, version)
        try:
            evidence = statistics.from_json(body.get("data", {}).get(manifests.KEY, ""))
        except ValueError as error:
            logger.warning("ConfigMap %s/%s: %s; gathering anew", deployment.namespace, name, error)
            return Page(deployment.uid, None, version)
        return Page(deployment.uid, evidence, version)

    async def _fold(self, deployment: DeploymentFacts, page: Page, comparison: Comparison) -> Page:
        if deployment.spec is None:
            return page
        polls = self._fleet.polls
        evidence = self._folded(page.evidence, comparison, plan_of(deployment.spec))
        version = page.resource_version
        if evidence is not None and (evidence != page.evidence or not page.stored):
            version = await self._store(deployment, evidence, page)
        page = Page(deployment.uid, evidence, version, polls)
        self._pages[deployment.namespace, deployment.name] = page
        return page

    def _folded(
        self, evidence: statistics.Evidence | None, comparison: Comparison, plan: statistics.AnalysisPlan
    ) -> statistics.Evidence | None:
        """With what the routers have counted since; as it is where the route names no candidate to compare."""
        route = comparison.route
        if route.stable is None or route.candidate is None:
            return evidence
        return statistics.fold(
            evidence,
            self._fleet.counters(),
            alias=route.alias,
            stable_revision=route.stable.revision,
            candidate_revision=route.candidate.revision,
            plan=plan,
            weight=route.weight,
            comparison=route.comparison,
            rollout=comparison.rollout,
            share=comparison.share,
            is_settling=comparison.is_settling,
        )

    async def _store(self, deployment: DeploymentFacts, evidence: statistics.Evidence, page: Page) -> str:
        body = manifests.build_config_map(
            namespace=deployment.namespace,
            deployment=deployment.name,
            uid=deployment.uid,
            evidence=statistics.to_json(evidence),
            resource_version=page.resource_version,
        )
        write = self._kube.create if page.resource_version is None else self._kube.apply
        try:
            answer = await write(body)
        except ConflictError:
            self.forget((deployment.namespace, deployment.name))
            raise
        return str(answer["metadata"]["resourceVersion"])


def plan_of(spec: AdapterDeploymentSpec) -> statistics.AnalysisPlan:
    sticky = spec.traffic.stickiness.type is StickinessType.HASH
    return statistics.plan_analysis(spec.analysis, sticky=sticky)


def _is_exposed(status: AdapterDeploymentStatus, route: Route) -> bool:
    """Whether a candidate answers requests, or would if an engine had it."""
    weights = status.weights
    meant = weights is not None and (weights.candidate > 0 or weights.mirror > 0)
    return route.stable is not None and (route.candidate is not None or meant)


def _rollout(status: AdapterDeploymentStatus) -> str:
    return facts.timestamp(status.rollout_start_time) if status.rollout_start_time else ""

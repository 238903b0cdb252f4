"""One pass over an AdapterDeployment: observe, decide, write the status, publish the route, act, tell."""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import TypeVar

from finetune_operator.adapters.agents import Agents, Unheard
from finetune_operator.adapters.api_errors import ApiError, ConflictError, UnavailableError
from finetune_operator.adapters.kube import Json, Kube
from finetune_operator.adapters.telemetry import Telemetry
from finetune_operator.api import adapterdeployment, finetunejob
from finetune_operator.api.adapterdeployment import AdapterDeploymentSpec
from finetune_operator.api.adapterdeployment_status import AdapterDeploymentStatus, CheckPhase
from finetune_operator.api.adapterdeployment_strategy import WebhookType
from finetune_operator.api.base import ACTION_ANNOTATION, API_VERSION
from finetune_operator.api.routes import Route
from finetune_operator.core import rollouts
from finetune_operator.core.durations import parse_duration
from finetune_operator.core.rollout_facts import (
    MEASURE,
    Action,
    AskWebhooks,
    ClearAction,
    DeploymentFacts,
    EngineFacts,
    Evaluate,
    EvaluationFacts,
    Load,
    Observed,
    Plan,
    Unload,
    Wanted,
    question,
)
from finetune_operator.reconcile import deployment_facts, facts, messages, patches
from finetune_operator.reconcile.announcements import Announcer, Subject
from finetune_operator.reconcile.base_names import base_of
from finetune_operator.reconcile.emergencies import Emergencies
from finetune_operator.reconcile.engines import Engines, Sight
from finetune_operator.reconcile.errands import Errands
from finetune_operator.reconcile.evidence import EvidenceBook
from finetune_operator.reconcile.orphans import is_of
from finetune_operator.reconcile.queue import Key
from finetune_operator.reconcile.routes import Publisher, Share
from finetune_operator.reconcile.watchlist import Watchlist

logger = logging.getLogger(__name__)

KIND = adapterdeployment.KIND
CONFLICT_SECONDS = 0.05
ATTEMPTS = 5  # of a write that somebody else's write gets in the way of
UNAVAILABLE_SECONDS = (1.0, 3.0)  # between, at random: not all at once when the API server is back
LONGEST_SECONDS = 30.0  # engines tell nothing by themselves
WRITE_SECONDS = 1.0  # between two writes that only bring numbers up to date
# A candidate that does harm is withdrawn from memory when the API server takes longer than this.
READ_SECONDS = 4.0
OBSERVE_SECONDS = 12.0  # lookups, agents and the stored evidence, one after the other in the worst case
OUTBOX = "announcements"
NUMBERS = frozenset({"analysis", "sampleRatio", "message", "conditions", "evaluation", OUTBOX})
"""Fields of the status that may be written a little later."""
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class AdapterDeploymentReconciler:
    kube: Kube
    telemetry: Telemetry
    engines: Engines
    agents: Agents
    publisher: Publisher
    book: EvidenceBook
    errands: Errands
    watchlist: Watchlist
    announcer: Announcer
    emergencies: Emergencies
    clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    _written: dict[Key, float] = field(default_factory=dict)
    """When each status was last written, by the clock of the event loop."""
    _readable: dict[Key, tuple[str, AdapterDeploymentSpec]] = field(default_factory=dict)
    """The last spec of each deployment (by its uid) that could be read."""
    _cut_off: set[Key] = field(default_factory=set)
    """Those whose last pass found no API server."""

    async def __call__(self, key: Key) -> float | None:
        """One pass. Returns the seconds after which to look again, or None."""
        with self.telemetry.measured_pass(KIND):
            if key in self._cut_off:  # an API server that hangs takes seconds, in which harm goes on
                await self.emergencies.look(key)
            try:
                again = await self._pass(key)
                self._cut_off.discard(key)
                return again
            except ConflictError:  # the object moved on while we looked; what we saw is stale, but not harm
                await self.emergencies.look(key)
                return CONFLICT_SECONDS
            except UnavailableError as error:  # routers go on with what they have, unless it does harm
                if key not in self._cut_off:
                    logger.warning("%s/%s: %s", *key, error)
                self._cut_off.add(key)
                await self.emergencies.look(key)
                return random.uniform(*UNAVAILABLE_SECONDS)  # noqa: S311 - spreads load, protects nothing
            except ApiError:  # its status cannot be written either
                await self.emergencies.look(key)
                raise

    async def _pass(self, key: Key) -> float | None:
        body = await _within(READ_SECONDS, self.kube.get(API_VERSION, KIND, *key))
        if body is None or "deletionTimestamp" in body["metadata"]:
            await self._forget(key)
            return None
        seen = await _within(OBSERVE_SECONDS, self._observe(key, body))
        # Whole seconds, as the status stores them: what is decided on is what is stored.
        plan = rollouts.decide(seen, now=self.clock().replace(microsecond=0))
        later = await self._write(key, body, seen, plan)
        if later is not None:
            return later
        await self.book.begin(seen.deployment, plan.status, plan.route)
        await self._publish(body, seen, plan)
        await self._act(key, seen, plan)
        self.announcer.announce(Subject(key, body, seen.deployment, plan.status), plan.announcements)
        self.watchlist.collect(key, self._interval(seen) if plan.collect else None)
        wishes = [plan.requeue_after] if plan.requeue_after is not None else []
        return min([*wishes, LONGEST_SECONDS * random.uniform(0.8, 1.0)])  # noqa: S311 - spreads load

    async def _forget(self, key: Key) -> None:
        """The object is gone: its route goes, then its adapters (see orphans), then all that we knew of it."""
        await self.publisher.withdraw(key)
        self.errands.forget(key)
        self.book.forget(key)
        self.watchlist.forget(key)
        self.announcer.forget(key)
        self.emergencies.forget(key)
        self.telemetry.rollouts.forget(*key)
        self._written.pop(key, None)
        self._readable.pop(key, None)
        self._cut_off.discard(key)

    # -- observe

    async def _observe(self, key: Key, body: Json) -> Observed:
        """Everything that the decision needs. Engines and job at once: a rollback waits for the slowest of them."""
        deployment = self._deployment(key, body)
        claim = deployment_facts.claim(body)
        self.publisher.claim(claim)
        if deployment.spec is None:
            return Observed(
                deployment=deployment,
                engines_problem="spec cannot be read, so the engines are not known",
                routing=self.publisher.facts(claim),
                told=self.announcer.told(key),
            )
        wanted, sight = await asyncio.gather(
            self._wanted(key, deployment), self.engines.observe(deployment.namespace, deployment.spec.serving)
        )
        routing = self.publisher.facts(claim)
        asked = {question(deployment.status, kind) for kind in (MEASURE, *WebhookType)}
        return Observed(
            deployment=deployment,
            wanted=wanted,
            engines=sight.engines,
            engines_problem=sight.problem,
            refusal=sight.refusal,
            routing=routing,
            evidence=await self.book.look(deployment, routing.published),
            measurements=self.errands.measurements(key, asked),
            webhooks=self.errands.answers(key, asked),
            evaluation=await self._evaluation(deployment.status, sight),
            withdrawal=self.emergencies.withdrawal(key),
            told=self.announcer.told(key),
        )

    def _deployment(self, key: Key, body: Json) -> DeploymentFacts:
        uid = body["metadata"]["uid"]
        known_uid, known = self._readable.get(key, (uid, None))
        deployment = deployment_facts.deployment_facts(body, known=known if known_uid == uid else None)
        if deployment.spec is not None and deployment.problem is None:
            self._readable[key] = (uid, deployment.spec)
        return deployment

    async def _wanted(self, key: Key, deployment: DeploymentFacts) -> Wanted:
        adapter = deployment.spec.adapter if deployment.spec else None
        if adapter is None:
            return Wanted()
        reference = adapter.fine_tune_job_ref
        self.watchlist.refer(key, (deployment.namespace, reference.name) if reference else None)
        if reference is not None:
            job = await self.kube.get(API_VERSION, finetunejob.KIND, deployment.namespace, reference.name)
            return deployment_facts.wanted_by_job(reference.name, job)
        return deployment_facts.wanted_by_source(adapter.source) if adapter.source else Wanted()

    async def _evaluation(self, status: AdapterDeploymentStatus, sight: Sight) -> EvaluationFacts | None:
        evaluation = status.evaluation
        if evaluation is None or evaluation.phase is not CheckPhase.INCONCLUSIVE:
            return None
        return await self.engines.evaluation(evaluation.id, sight.engines)

    # -- write

    async def _write(self, key: Key, body: Json, seen: Observed, plan: Plan) -> float | None:
        """The only place that writes an AdapterDeployment's status. Returns the seconds to wait where a write that only
        brings numbers up to date comes too soon; nothing of the plan may then be carried out."""
        patch = patches.merge_diff(body.get("status", {}), facts.to_json(plan.status))
        now = asyncio.get_running_loop().time()
        if patch.keys() == {OUTBOX} and not plan.announcements:
            patch = {}  # what was told goes with the next write that there is a reason for
        if patch:
            wait = self._written.get(key, float("-inf")) + WRITE_SECONDS - now
            only_numbers = patch.keys() <= NUMBERS and not (plan.actions or plan.announcements)
            if wait > 0 and only_numbers and plan.route == seen.routing.published:
                return wait
            await _within(READ_SECONDS, self._store(key, body, seen.deployment, patch))
            self._written[key] = now
        stored = replace(seen.deployment, status=plan.status)
        self.emergencies.remember(key, stored, deployment_facts.claim(body))
        self.errands.settle(key, seen.measurements, seen.webhooks)
        self.telemetry.rollouts.show(*key, before=seen.deployment.status, status=plan.status)
        self.telemetry.rollouts.show_engines(*key, adapters=plan.status.adapters, engines=_loaded(seen))
        return None

    async def _store(self, key: Key, body: Json, decided_on: DeploymentFacts, patch: Json) -> None:
        """Write over what others wrote meanwhile, where nothing was decided on that (labels, other annotations): who
        writes as often as agents take to answer would hold up everything. Raises ConflictError where it matters."""
        for left in reversed(range(ATTEMPTS)):
            version = body["metadata"]["resourceVersion"]
            try:
                await self.kube.patch_status(KIND, *key, resource_version=version, patch=patch)
                return
            except ConflictError:
                found = await self.kube.get(API_VERSION, KIND, *key)
                if not left or found is None or self._deployment(key, found) != decided_on:
                    raise
                body = found

    # -- publish

    async def _publish(self, body: Json, seen: Observed, plan: Plan) -> None:
        spec, claim = seen.deployment.spec, deployment_facts.claim(body)
        base = self.publisher.base_of(claim.key)
        if spec is not None:
            base = base_of(spec.base_model_ref.name, seen.engines, self.publisher.snapshot)
        loads = [action.agent_url for action in plan.actions if isinstance(action, Load)]
        await self.publisher.publish(claim, Share(plan.route, base), agents=loads)

    # -- act

    async def _act(self, key: Key, seen: Observed, plan: Plan) -> None:
        """All orders at once; one that fails is given again by the next pass, which sees that nothing happened."""
        strays = self._strays(seen, plan)
        await asyncio.gather(
            *(self._carry_out(key, seen, plan, action) for action in (*plan.actions, *strays))
        )
        spec = seen.deployment.spec
        if plan.measure and spec is not None:
            values = {
                "alias": seen.deployment.alias,
                "stable": plan.status.stable_revision or "",
                "candidate": plan.status.candidate_revision or "",
            }
            self.errands.measure(key, spec.analysis.metrics, values, question=question(plan.status, MEASURE))

    async def _carry_out(self, key: Key, seen: Observed, plan: Plan, action: Action) -> None:
        problem: Unheard | None = None
        match action:
            case Load(agent_url=url, served_name=name, uri=uri, digest=digest):
                problem = await self.agents.load(url, name=name, uri=uri, digest=digest)
            case Unload(agent_url=url, served_name=name):
                problem = await self.agents.unload(url, name=name)
            case Evaluate(agent_url=url, id=identity, served_names=names, evaluation=evaluation):
                problem = await self.agents.evaluate(
                    url, identity=identity, models=names, evaluation=evaluation
                )
            case ClearAction(value=value):
                await self.kube.remove_annotation(KIND, *key, annotation=ACTION_ANNOTATION, value=value)
            case AskWebhooks(type=kind) if kind is not WebhookType.EVENT and seen.deployment.spec is not None:
                asked = [webhook for webhook in seen.deployment.spec.webhooks if webhook.type is kind]
                payload = messages.webhook_payload(seen.deployment, plan.status, kind)
                self.errands.ask(key, asked, payload, question=question(plan.status, kind))
        if problem is not None:
            logger.warning("%s/%s: %s: %s", *key, action, problem.reason)

    def _strays(self, seen: Observed, plan: Plan) -> list[Unload]:
        """Adapters under our alias that nobody knows of any more (a status that was lost, an order that overtook its
        own withdrawal), once no router sends requests to them."""
        if not seen.routing.verified or seen.routing.published is None or seen.deployment.spec is None:
            return []
        alias = seen.deployment.alias
        known = {adapter.served_name for adapter in plan.status.adapters}
        for route in (seen.routing.published, plan.route):
            known |= _served_names(route)
        return [
            Unload(engine.agent_url, name)
            for engine in seen.engines
            if engine.reachable
            for name in engine.adapters
            if is_of(name, alias) and name not in known
        ]

    def _interval(self, seen: Observed) -> float:
        spec = seen.deployment.spec
        return parse_duration(spec.analysis.interval) if spec is not None else LONGEST_SECONDS


async def _within(seconds: float, request: Awaitable[Answer]) -> Answer:
    """The answer, or UnavailableError: an API server that does not answer in time counts as away."""
    try:
        async with asyncio.timeout(seconds):
            return await request
    except TimeoutError:
        raise UnavailableError(f"the API server does not answer within {seconds:g} s") from None


def _served_names(route: Route | None) -> set[str]:
    targets = (route.stable, route.candidate) if route is not None else ()
    return {target.served_name for target in targets if target is not None}


def _loaded(seen: Observed) -> dict[str, set[str]]:
    """Served names that each engine says it has loaded."""
    return {engine.url: _names_loaded(engine) for engine in seen.engines}


def _names_loaded(engine: EngineFacts) -> set[str]:
    return {name for name, adapter in engine.adapters.items() if adapter.state == "Loaded"}

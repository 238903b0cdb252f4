"""A world in which the decisions of `core.rollouts` are carried out: engines, routers, evidence, time, and kills.

Nothing but the stored status is kept between two passes, and it is kept as JSON, as the API server does. Invariants are
checked at every pass.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_operator.api.adapterdeployment import AdapterDeploymentSpec
from finetune_operator.api.adapterdeployment_status import (
    AdapterDeploymentStatus,
    Announcement,
    Check,
    CheckKind,
    CheckPhase,
    PerArm,
    Stage,
)
from finetune_operator.api.adapterdeployment_strategy import WebhookType
from finetune_operator.core import rollouts
from finetune_operator.core.rollout_facts import (
    Action,
    ArtifactFacts,
    AskWebhooks,
    ClearAction,
    DeploymentFacts,
    Evaluate,
    EvaluationFacts,
    EvidenceFacts,
    Load,
    Measurement,
    Observed,
    Plan,
    RoutingFacts,
    Unload,
    Wanted,
    WebhookAnswer,
    Withdrawal,
)
from tests.unit.rollouts import invariants
from tests.unit.rollouts.engines import SimulatedEngine
from tests.unit.rollouts.routers import SimulatedRouting

START = datetime(2026, 1, 1, 12, 0, tzinfo=UTC)
UID = "0123abcd-1111"
POLL_SECONDS = 5.0  # between two looks at the routers
STEPS: list[dict[str, Any]] = [
    {"setWeight": 5},
    {"pause": {"duration": "1m"}},
    {"setWeight": 50},
    {"pause": {"duration": "1m"}},
]


def digest(letter: str) -> str:
    return "sha256:" + letter * 64


def revision(letter: str) -> str:
    return letter * 8


def artifact(letter: str, *, rank: int = 16) -> ArtifactFacts:
    return ArtifactFacts(
        digest=digest(letter), uri=f"file:///artifacts/{letter}", rank=rank, fine_tune_job=f"job-{letter}"
    )


@functools.lru_cache(maxsize=8)
def _read(stored: str) -> AdapterDeploymentStatus:
    """Each pass, and each question of a story, reads what is stored."""
    return AdapterDeploymentStatus.model_validate_json(stored)


def spec_of(letter: str, *, steps: list[dict[str, Any]] | None = None, **more: Any) -> AdapterDeploymentSpec:
    document: dict[str, Any] = {
        "baseModelRef": {"name": "tiny"},
        "adapter": {"fineTuneJobRef": {"name": f"job-{letter}"}},
        "strategy": {"canary": {"steps": STEPS if steps is None else steps, **more.pop("canary", {})}},
    }
    return AdapterDeploymentSpec.model_validate(document | more)


@dataclass
class Evidence:
    """What the routers' counters say, as a function of who really gets requests."""

    mode: str = "fine"
    """fine; missing: no router tells; late: they tell in every other minute; nan: objectives have no verdict."""
    bad: set[str] = field(default_factory=set)
    """Revisions that fail more often than others."""
    worse: set[str] = field(default_factory=set)
    """Revisions whose objectives are worse."""
    seconds_to_proof: float = 10.0
    skewed: bool = False
    drifting: bool = False
    quiet: bool = False
    """Whether no user asks anything."""
    unheard: bool = False
    """Whether users meet the stable revision and nobody meets the candidate."""
    heard: datetime | None = None
    silent: tuple[str, ...] = ()
    """Routers that do not tell, and why."""
    exposed_seconds: float = 0.0
    comparison: str = ""


@dataclass
class World:
    spec: AdapterDeploymentSpec | None
    wanted: Wanted = field(default_factory=Wanted)
    now: datetime = START
    engines: list[SimulatedEngine] = field(
        default_factory=lambda: [SimulatedEngine("http://e1:8000"), SimulatedEngine("http://e2:8000")]
    )
    engines_problem: str | None = None
    routing: SimulatedRouting = field(default_factory=SimulatedRouting)
    evidence: Evidence = field(default_factory=Evidence)
    stored: str = "{}"
    generation: int = 1
    annotation: str | None = None
    problem: str | None = None
    deleting: bool = False
    alias_taken_by: str | None = None
    alias_is_base_of: str | None = None
    base_answered_by: str | None = None
    answers: Callable[[str, WebhookType], bool] = lambda name, kind: True
    metric: Callable[[], tuple[float | None, str | None]] = lambda: (1.0, None)
    scores: dict[str, float] = field(default_factory=dict)
    evaluation_fails: int = 0
    """How many evaluations are going to fail."""
    killed: Callable[[str], bool] = lambda point: False
    """Whether the operator dies at this point of a pass."""
    # What happened.
    announced: list[Announcement] = field(default_factory=list)
    """What was told, by Events and alerts."""
    plans: list[Plan] = field(default_factory=list)
    asked: list[WebhookType] = field(default_factory=list)
    kills: int = 0
    withdrawal: Withdrawal | None = None
    refusal: str | None = None
    not_stored: str | None = None
    _posted: set[str] = field(default_factory=set)
    """Names of the Events."""
    _heard: set[str] = field(default_factory=set)
    """Those that this life of the operator knows of."""
    _told: dict[str, WebhookAnswer] = field(default_factory=dict)
    _measured: list[Measurement] = field(default_factory=list)
    _evaluations: dict[str, EvaluationFacts] = field(default_factory=dict)

    @property
    def status(self) -> AdapterDeploymentStatus:
        return _read(self.stored)

    # ---------------------------------------------------------------- a pass

    def step(self) -> Plan | None:
        """One pass of the operator; None when it was killed in it."""
        seen = self.observe()
        now = self.now.replace(microsecond=0)  # as the reconciler does: what is decided on is what is stored
        plan = rollouts.decide(seen, now=now)
        if len(self.plans) % 7 == 0:
            assert rollouts.decide(seen, now=now) == plan, "the same facts gave another plan"
        invariants.check(self, seen, plan)
        self._told, self._measured = {}, []
        done = self._carry_out(plan)
        return plan if done else None

    def _carry_out(self, plan: Plan) -> bool:
        self.stored = plan.status.model_dump_json(by_alias=True, exclude_none=True)
        assert self.status == plan.status
        if self._dies("status"):
            return False
        self.routing.publish(plan.route, now=self.now)
        if self._dies("route"):
            return False
        for number, action in enumerate(plan.actions):
            self._act(action)
            if self._dies(f"action {number} {type(action).__name__}"):
                return False
        self._unload_strays(plan)
        if plan.measure and self.spec is not None:
            value, error = self.metric()
            self._measured = [Measurement(m.name, value, error) for m in self.spec.analysis.metrics]
        self._announce(plan)
        self.plans.append(plan)
        return True

    def _announce(self, plan: Plan) -> None:
        """As the reconciler does: what has no Event yet is told."""
        for item in plan.status.announcements:
            if item.name not in self._posted:
                self.announced.append(item)
            self._posted.add(item.name)
            self._heard.add(item.name)

    def _unload_strays(self, plan: Plan) -> None:
        """As the reconciler does: what an engine kept while it was silent, and nobody knows of any more."""
        if self.routing.applied < len(self.routing.routers) or plan.route is None:
            return
        targets = (plan.route.stable, plan.route.candidate)
        known = {a.served_name for a in plan.status.adapters} | {t.served_name for t in targets if t}
        for engine in self.engines:
            for name in set(engine.held) - known if engine.reachable else ():
                engine.unload(name)

    def _dies(self, point: str) -> bool:
        died = self.killed(point)
        if died:
            # Whatever the operator only remembered is gone; routers tell anew within an interval.
            self.kills += 1
            self._told, self._measured, self.evidence.heard = {}, [], None
            self._heard = set()
        return died

    def _act(self, action: Action) -> None:
        engines = {engine.agent_url: engine for engine in self.engines}
        match action:
            case Load(agent_url, name, _, its_digest):
                engines[agent_url].load(name, its_digest, now=self.now)
            case Unload(agent_url, name):
                assert not self.routing.sends_to(name, engines[agent_url].url), (
                    f"{name} is unloaded under users"
                )
                engines[agent_url].unload(name)
            case ClearAction(value):
                self.annotation = None if self.annotation == value else self.annotation
            case AskWebhooks(kind):
                self.asked.append(kind)
                for hook in self.spec.webhooks if self.spec else []:
                    if hook.type is kind:
                        self._told[hook.key] = WebhookAnswer(self.answers(hook.key, kind), "because")
            case Evaluate(_, identity, names, evaluation):
                state = "Failed" if self.evaluation_fails else "Done"
                self.evaluation_fails = max(0, self.evaluation_fails - 1)
                scores = {name: self.scores.get(name, 0.9) for name in names}
                self._evaluations[identity] = EvaluationFacts(
                    identity, state, "by design", scores if state == "Done" else {}, evaluation.max_rows
                )

    # ---------------------------------------------------------------- time

    def run(self, seconds: float, *, until: Callable[[AdapterDeploymentStatus], bool] | None = None) -> World:
        """Let passes follow one another as the plans ask for; stop early when `until` holds."""
        end = self.now + timedelta(seconds=seconds)
        idle = 0
        while self.now < end:
            before = self.stored
            plan = self.step()
            if until is not None and until(self.status):
                return self
            wait = 0.0 if plan is None or plan.requeue_after is None else plan.requeue_after
            # A status that was just written brings the object back at once, as the watch does.
            changed = self.stored != before
            idle = 0 if not changed else idle + 1
            assert idle < 200, f"the status never rests: {self.status.message}"
            self.advance(0.1 if changed or plan is None else min(max(wait, 0.1), 5.0))
        return self

    def advance(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)
        for engine in self.engines:
            engine.tick(self.now)
        self.routing.tick(self.now)
        weight, mirror = self.routing.weight(), self.routing.mirror()
        comparison = self.routing.route.comparison if self.routing.route else ""
        comparison = comparison.rpartition(":")[0]  # evidence is gathered over all weights
        if comparison != self.evidence.comparison:
            self.evidence.comparison, self.evidence.exposed_seconds = comparison, 0.0
        if weight or mirror:
            self.evidence.exposed_seconds += seconds
        if self.evidence.mode in ("fine", "nan") or (
            self.evidence.mode == "late" and self.now.minute % 2 == 0
        ):
            self.evidence.heard = self.now

    # ---------------------------------------------------------------- observations

    def observe(self) -> Observed:
        status = self.status
        return Observed(
            deployment=DeploymentFacts(
                namespace="team",
                name="bot",
                uid=UID,
                generation=self.generation,
                spec=self.spec,
                problem=self.problem,
                status=status,
                action=self.annotation,
                deleting=self.deleting,
            ),
            wanted=self.wanted,
            engines=[engine.facts() for engine in self.engines],
            engines_problem=self.engines_problem,
            routing=RoutingFacts(
                published=self.routing.route,
                version=self.routing.version,
                replicas=len(self.routing.routers),
                applied=self.routing.applied,
                behind=self.routing.behind,
                silent=self.evidence.silent,
                alias_taken_by=self.alias_taken_by,
                alias_is_base_of=self.alias_is_base_of,
                base_answered_by=self.base_answered_by,
                not_stored=self.not_stored,
            ),
            evidence=self._evidence(status),
            measurements=tuple(self._measured),
            webhooks=dict(self._told),
            evaluation=self._evaluations.get(status.evaluation.id) if status.evaluation else None,
            refusal=self.refusal,
            withdrawal=self.withdrawal,
            told=frozenset(self._heard),
        )

    def _evidence(self, status: AdapterDeploymentStatus) -> EvidenceFacts | None:
        evidence, spec = self.evidence, self.spec
        route = self.routing.route
        if spec is None or route is None or route.stable is None or route.candidate is None:
            return None
        if status.candidate_revision is None:
            return None
        candidate = status.candidate_revision
        # Nothing is known of a comparison that no router counts yet, and a silent router adds nothing.
        known = evidence.exposed_seconds if evidence.comparison.startswith(candidate) else 0.0
        known = 0.0 if evidence.mode == "missing" else known - known % POLL_SECONDS
        known = 0.0 if evidence.quiet else known
        answers = PerArm(stable=int(known * 9), candidate=0 if evidence.unheard else int(known))
        proof = known >= evidence.seconds_to_proof
        checks = [
            Check(
                name=guardrail.name,
                kind=CheckKind.GUARDRAIL,
                phase=CheckPhase.FAILED if proof and candidate in evidence.bad else CheckPhase.SUCCESSFUL,
                n=answers,
                e_value=400.0 if proof and candidate in evidence.bad else 0.4,
                threshold=100.0,
                message="errors 3 times as often",
            )
            for guardrail in spec.analysis.guardrails
        ]
        for objective in spec.analysis.objectives:
            phase = CheckPhase.INCONCLUSIVE
            if proof and evidence.mode != "nan":
                phase = CheckPhase.FAILED if candidate in evidence.worse else CheckPhase.SUCCESSFUL
            checks.append(
                Check(
                    name=objective.name,
                    kind=CheckKind.OBJECTIVE,
                    phase=phase,
                    n=answers,
                    message="difference -0.1",
                )
            )
        for name, kind, alarm in (
            ("sample-ratio", CheckKind.SAMPLE_RATIO, evidence.skewed),
            ("drift", CheckKind.DRIFT, evidence.drifting),
        ):
            phase = CheckPhase.FAILED if alarm and proof else CheckPhase.SUCCESSFUL
            checks.append(
                Check(name=name, kind=kind, phase=phase, estimate=0.3, expected=0.1, message=f"{name} is off")
            )
        return EvidenceFacts(checks=checks, last_heard=evidence.heard)

    # ---------------------------------------------------------------- what people do

    def deploy(self, letter: str, *, rank: int = 16, **changes: Any) -> World:
        """spec names another job, whose artifact is there."""
        self.spec = spec_of(letter, **changes) if changes or self.spec is None else self._renamed(letter)
        self.wanted = Wanted(artifact=artifact(letter, rank=rank))
        self.generation += 1
        return self

    def _renamed(self, letter: str) -> AdapterDeploymentSpec:
        assert self.spec is not None
        document = self.spec.model_dump(by_alias=True, exclude_none=True, mode="json")
        document["adapter"] = {"fineTuneJobRef": {"name": f"job-{letter}"}}
        return AdapterDeploymentSpec.model_validate(document)

    def edit(self, change: Callable[[dict[str, Any]], None]) -> World:
        assert self.spec is not None
        document = self.spec.model_dump(by_alias=True, exclude_none=True, mode="json")
        change(document)
        self.spec = AdapterDeploymentSpec.model_validate(document)
        self.generation += 1
        return self

    def say(self, action: str) -> World:
        self.annotation = action
        return self

    # ---------------------------------------------------------------- for assertions

    def condition(self, kind: str) -> tuple[str, str]:
        found = next(c for c in self.status.conditions if c.type == kind)
        return found.status, found.reason

    def message(self, kind: str) -> str:
        """Of a condition."""
        return next(c.message for c in self.status.conditions if c.type == kind)

    def history(self) -> list[tuple[str, str]]:
        return [(entry.revision[0], str(entry.completion_status)) for entry in self.status.history]

    def everybody_gets(self) -> str | None:
        """The revision that every router gives every user, or None where they differ or nothing serves."""
        given: set[str] = set()
        for router in self.routing.routers:
            route = router.route
            if route is None or route.stable is None or not route.stable.upstreams:
                return None
            candidate = route.candidate.revision if route.candidate and route.weight > 0 else None
            given |= (
                {candidate}
                if candidate and route.weight == 100
                else {route.stable.revision} | ({candidate} if candidate else set())
            )
        return given.pop() if len(given) == 1 else None


def serving(letter: str = "a", *, world: World | None = None, **changes: Any) -> World:
    """A world in which a revision serves everybody already."""
    world = world or World(spec=None)
    world.deploy(letter, **changes)
    world.run(60, until=lambda status: status.stage is Stage.SUCCEEDED)
    assert world.status.stable_revision == revision(letter), world.status.message
    return world


def reached(stage: Stage, index: int | None = None) -> Callable[[AdapterDeploymentStatus], bool]:
    """Condition for `run`: the stage (and the step) is under way, and the routers have confirmed its weights."""

    def holds(status: AdapterDeploymentStatus) -> bool:
        right = status.stage is stage and (index is None or status.current_step_index == index)
        return right and (status.weights is None or status.weights.verified or index is None)

    return holds


def plain(observed: Observed) -> Observed:
    """Without what came since the last pass: what a restarted operator sees."""
    return replace(observed, webhooks={}, measurements=())

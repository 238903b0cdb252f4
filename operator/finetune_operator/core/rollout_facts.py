"""What is known of an AdapterDeployment, and what is planned for it: input and output of `core.rollouts.decide`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from finetune_operator.api.adapterdeployment import AdapterDeploymentSpec
from finetune_operator.api.adapterdeployment_status import (
    AbortReason,
    AdapterDeploymentStatus,
    Announcement,
    Check,
)
from finetune_operator.api.adapterdeployment_strategy import EvaluationSpec, WebhookType
from finetune_operator.api.routes import Route

BASE = "base"  # revision of the model without an adapter


@dataclass(frozen=True)
class DeploymentFacts:
    namespace: str
    name: str
    uid: str
    generation: int
    spec: AdapterDeploymentSpec | None
    """Where the stored one cannot be read (`problem` says why): what was readable last, or as much of it as says who
    serves whom; None where not even that is known."""
    problem: str | None
    status: AdapterDeploymentStatus
    action: str | None = None
    """Value of the annotation finetune.dev/action: a verb, or `verb/nonce`."""
    deleting: bool = False

    @property
    def alias(self) -> str:
        """The model that clients ask for."""
        return (self.spec.alias if self.spec else None) or self.name


@dataclass(frozen=True)
class ArtifactFacts:
    """A committed artifact that could be deployed."""

    digest: str
    uri: str
    base_model: str | None = None
    rank: int | None = None
    fine_tune_job: str | None = None

    @property
    def revision(self) -> str:
        return self.digest.removeprefix("sha256:")[:8]


@dataclass(frozen=True)
class Wanted:
    """What spec.adapter points at: an artifact, or the reason why there is none (yet)."""

    artifact: ArtifactFacts | None = None
    reason: str | None = None
    message: str | None = None


@dataclass(frozen=True)
class AdapterFacts:
    """What an agent says of one served name."""

    digest: str
    state: str
    """Loading, Loaded or Failed."""
    reason: str | None = None
    message: str = ""


@dataclass(frozen=True)
class EngineFacts:
    """One engine replica, as its agent tells."""

    url: str
    agent_url: str
    reachable: bool
    ready: bool = False
    message: str = ""
    instance: str = ""
    base_models: Sequence[str] = ()
    max_loras: int | None = None
    """None: the limit is not known, so none is assumed."""
    loaded_loras: int = 0
    max_rank: int | None = None
    """None: the same."""
    adapters: Mapping[str, AdapterFacts] = field(default_factory=dict)
    """By served name."""


@dataclass(frozen=True)
class RoutingFacts:
    """What the routers do about our alias."""

    published: Route | None = None
    """Our route in the newest snapshot."""
    version: int | None = None
    """Version of the newest snapshot."""
    replicas: int = 0
    """Routers that are known."""
    applied: int = 0
    """Routers that said that they apply that version."""
    behind: Sequence[str] = ()
    """URLs of the others, and what is wrong with each where that is known."""
    silent: Sequence[str] = ()
    """URLs of those that failed when they were asked last, and how."""
    alias_taken_by: str | None = None
    """`namespace/name` of the deployment that owns the alias, when it is not us."""
    alias_is_base_of: str | None = None
    """`namespace/name` of a deployment whose engines answer for a base model with the name of our alias."""
    base_answered_by: str | None = None
    """Whose engines answer for our base model's own name, when they are not ours."""
    not_stored: str | None = None
    """Why the newest snapshot is in the routers only and not in its ConfigMap, and what to do."""

    @property
    def verified(self) -> bool:
        return 0 < self.replicas == self.applied


@dataclass(frozen=True)
class EvidenceFacts:
    """What the evidence says by now. `checks` are guardrails, objectives, the sample ratio and drift."""

    checks: Sequence[Check] = ()
    last_heard: datetime | None = None
    """When every router last told its counters; None: not since the operator started."""


@dataclass(frozen=True)
class Measurement:
    """One measurement of spec.analysis.metrics."""

    name: str
    value: float | None
    """None: the query gave nothing."""
    error: str | None = None
    """Why there was no answer."""


@dataclass(frozen=True)
class WebhookAnswer:
    accepted: bool
    message: str


MEASURE = "measure"


def question(status: AdapterDeploymentStatus, kind: str) -> str:
    """What a webhook (or Prometheus: MEASURE) is asked now. An answer that took its time may be about another rollout,
    or about a step that is left, and then it is none."""
    asked = f"{kind} {status.candidate_revision} {status.rollout_start_time}"
    if kind in (MEASURE, WebhookType.ROLLBACK):  # of the candidate, in whichever step
        return asked
    return f"{asked} {status.current_step_hash} {status.current_step_index}"


@dataclass(frozen=True)
class EvaluationFacts:
    """What an agent says of an evaluation."""

    id: str
    state: str
    """Running, Done, Failed, or Missing (the agent restarted and knows nothing of it)."""
    message: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    """By served name."""
    rows: int = 0


@dataclass(frozen=True)
class Withdrawal:
    """A candidate that was taken out of the route before its abort could be stored."""

    revision: str
    rollout_start_time: datetime | None
    reason: AbortReason
    message: str


@dataclass(frozen=True)
class Observed:
    deployment: DeploymentFacts
    wanted: Wanted = Wanted()
    engines: Sequence[EngineFacts] = ()
    engines_problem: str | None = None
    """Why no engine is known, when none is."""
    refusal: str | None = None
    """Why the operator does not talk to the engines that spec names: field, value and remedy."""
    routing: RoutingFacts = RoutingFacts()
    evidence: EvidenceFacts | None = None
    """None: nothing is compared now."""
    measurements: Sequence[Measurement] = ()
    """Made since the last pass."""
    webhooks: Mapping[str, WebhookAnswer] = field(default_factory=dict)
    """Answers since the last pass, by name."""
    evaluation: EvaluationFacts | None = None
    withdrawal: Withdrawal | None = None
    """What was done to the route while the status could not be written."""
    told: frozenset[str] = frozenset()
    """Names of the announcements that were told."""

    @property
    def alias_problem(self) -> str | None:
        """Why our alias cannot be routed, and what to do."""
        taken, base = self.routing.alias_taken_by, self.routing.alias_is_base_of
        if taken is not None:
            return f"AdapterDeployment {taken} has this alias already, so nothing is routed; delete one of the two"
        # Whoever serves under a name had it before the base model.
        if base is not None and self.deployment.status.stable_revision is None:
            return (
                f"the alias is the name of a base model too, served by the engines of {base}, and a request could mean "
                "both, so nothing is routed; make it anew with another spec.alias"
            )
        return None


@dataclass(frozen=True)
class Load:
    agent_url: str
    served_name: str
    uri: str
    digest: str


@dataclass(frozen=True)
class Unload:
    agent_url: str
    served_name: str


@dataclass(frozen=True)
class Evaluate:
    """Start an evaluation; safe to do twice, its id is its identity."""

    agent_url: str
    id: str
    served_names: Sequence[str]
    evaluation: EvaluationSpec


@dataclass(frozen=True)
class AskWebhooks:
    """Ask all webhooks of a type; the answers are in the next observation."""

    type: WebhookType


@dataclass(frozen=True)
class ClearAction:
    """Remove the annotation if it still has this value."""

    value: str


Action = Load | Unload | Evaluate | AskWebhooks | ClearAction


@dataclass(frozen=True)
class Plan:
    """Carried out in this order: status, route, actions, announcements. So whatever is done was recorded first, and
    whoever repeats a pass does the same again."""

    status: AdapterDeploymentStatus
    route: Route | None = None
    """Route that the snapshot should have for us; None: none."""
    actions: Sequence[Action] = ()
    announcements: Sequence[Announcement] = ()
    """Those of this pass; the status has them too, with those of former passes that were not told yet."""
    measure: bool = False
    """Whether the Prometheus metrics are due."""
    collect: bool = False
    """Whether evidence is being gathered: routers are polled often while any deployment says so."""
    requeue_after: float | None = None
    """Seconds after which to look again; None: only when something changes."""

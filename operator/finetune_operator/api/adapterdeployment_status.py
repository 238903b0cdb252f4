"""What the operator says of an AdapterDeployment; enough to go on from after a restart."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from finetune_operator.api.adapterdeployment_strategy import Severity
from finetune_operator.api.base import Condition, Message, StatusModel
from finetune_operator.api.rules import keyed_list

Revision = Annotated[str, Field(max_length=16)]
Digest = Annotated[str, Field(max_length=71)]


class RolloutPhase(StrEnum):
    PENDING = "Pending"  # nothing serves yet
    PROGRESSING = "Progressing"  # a rollout is under way
    PAUSED = "Paused"  # a rollout waits for somebody or something
    HEALTHY = "Healthy"  # the wanted revision serves
    DEGRADED = "Degraded"  # the wanted revision was rolled back, or an engine lacks what it should have


class Stage(StrEnum):
    INITIALIZING = "Initializing"  # the artifact is looked up
    LOADING = "Loading"  # the engines load the candidate
    VALIDATING = "Validating"  # an evalGate step
    SHADOWING = "Shadowing"  # a setMirror step
    CANARY = "Canary"  # any other step
    WAITING_PROMOTION = "WaitingPromotion"  # confirm-promotion is asked
    PROMOTING = "Promoting"  # the weight goes to 100, and the routers confirm it
    FINALISING = "Finalising"  # the previous revision stays loaded for a while
    SUCCEEDED = "Succeeded"
    ABORTING = "Aborting"  # the weight goes to 0, and the routers confirm it
    FAILED = "Failed"


class CompletionStatus(StrEnum):
    PROMOTED = "Promoted"
    FAST_PROMOTED = "FastPromoted"  # steps were skipped by promote-full, or there were none
    ABORTED = "Aborted"
    SUPERSEDED = "Superseded"  # another revision was asked for meanwhile
    ROLLED_BACK = "RolledBack"  # spec went back to the stable revision during the rollout
    FAST_ROLLED_BACK = "FastRolledBack"  # a return within rollbackWindow


class PauseReason(StrEnum):
    CANARY_PAUSE_STEP = "CanaryPauseStep"
    USER_PAUSE = "UserPause"
    INCONCLUSIVE_ANALYSIS = "InconclusiveAnalysis"
    METRICS_UNAVAILABLE = "MetricsUnavailable"
    INSUFFICIENT_SAMPLES = "InsufficientSamples"
    SAMPLE_RATIO_MISMATCH = "SampleRatioMismatch"
    DRIFT_DETECTED = "DriftDetected"
    AWAITING_APPROVAL = "AwaitingApproval"


class AbortReason(StrEnum):
    GUARDRAIL_BREACHED = "GuardrailBreached"
    NON_INFERIORITY_REJECTED = "NonInferiorityRejected"
    METRIC_FAILED = "MetricFailed"
    EVAL_GATE_FAILED = "EvalGateFailed"
    ADAPTER_LOAD_FAILED = "AdapterLoadFailed"
    PROGRESS_DEADLINE_EXCEEDED = "ProgressDeadlineExceeded"
    METRICS_UNAVAILABLE = "MetricsUnavailable"
    APPROVAL_TIMED_OUT = "ApprovalTimedOut"
    USER_ABORT = "UserAbort"
    ROLLBACK_WEBHOOK = "RollbackWebhook"


class CheckKind(StrEnum):
    GUARDRAIL = "Guardrail"
    OBJECTIVE = "Objective"
    METRIC = "Metric"
    SAMPLE_RATIO = "SampleRatio"
    DRIFT = "Drift"


class CheckPhase(StrEnum):
    SUCCESSFUL = "Successful"
    FAILED = "Failed"
    INCONCLUSIVE = "Inconclusive"
    ERROR = "Error"


class Weights(StatusModel):
    """Who gets how much."""

    stable: float = 100
    """Percent of the users on the stable revision."""
    candidate: float = 0
    """Percent of the users on the candidate."""
    mirror: float = 0
    """Percent of the stable revision's requests that the candidate gets a copy of."""
    version: int | None = None
    """Version of the route snapshot that says so."""
    verified: bool = False
    """Whether every router replica applies that version."""
    pending_since: datetime | None = None
    """Since when the routers have been asked for it; absent once all of them apply it."""


class PauseCondition(StatusModel):
    """Why the rollout waits."""

    reason: PauseReason
    """One word."""
    message: Message
    """What to do."""
    start_time: datetime
    """Since when."""

    @property
    def is_timed(self) -> bool:
        """Whether it is over after a time that the step has: nobody is waited for."""
        return self.reason is PauseReason.CANARY_PAUSE_STEP and "until" not in self.message


class Abort(StatusModel):
    """Why the candidate was rolled back. It stays away until spec.adapter changes or somebody says `retry`."""

    reason: AbortReason
    """One word."""
    message: Message
    """What happened, and what to do."""
    at: datetime
    """When."""
    revision: Revision
    """The candidate."""
    weight: float = 0
    """Percent of the users that it had."""


class LoadedAdapter(StatusModel):
    """A revision and the engines that have it."""

    revision: Revision
    """First 8 digits of the digest."""
    served_name: Annotated[str, Field(max_length=128)]
    """Name in the engines; never used for anything else."""
    digest: Digest
    """SHA-256 of the manifest."""
    uri: Annotated[str, Field(max_length=1200)]
    """Folder of the artifact."""
    fine_tune_job: Annotated[str, Field(max_length=253)] | None = None
    """FineTuneJob that made it."""
    loaded_replicas: int = 0
    """Engines that have it loaded, verified and probed."""
    desired_replicas: int = 0
    """Engines that should have it."""
    message: Message | None = None
    """What the engines that lack it say."""
    unload_at: datetime | None = None
    """When it will be unloaded; absent while it is in use."""


class PerArm(StatusModel):
    """A number per side."""

    stable: int = 0
    """Of the stable revision."""
    candidate: int = 0
    """Of the candidate."""


class Interval(StatusModel):
    """Bounds of a confidence sequence."""

    low: float | None = None
    """Lower bound."""
    high: float | None = None
    """Upper bound."""


class Measurements(StatusModel):
    """Tally of the measurements of a metric."""

    successful: int = 0
    """Measurements that were Successful."""
    failed: int = 0
    """Measurements that were Failed."""
    inconclusive: int = 0
    """Measurements without a verdict (no data, NaN, neither condition)."""
    error: int = 0
    """Queries without an answer."""
    consecutive_errors: int = 0
    """Queries without an answer since the last one with."""
    last_time: datetime | None = None
    """When it was last measured."""


class Check(StatusModel):
    """One guardrail, objective or metric, or one of the alarms, as of the last look."""

    name: Annotated[str, Field(max_length=253)]
    """Name from the spec; sample-ratio and drift for the alarms."""
    kind: CheckKind
    """What it is."""
    phase: CheckPhase
    """Verdict so far."""
    n: PerArm | None = None
    """Samples per side."""
    failures: PerArm | None = None
    """Guardrail: answers with the event, per side."""
    estimate: float | None = None
    """Guardrail: rate of the candidate over that of the stable revision. Objective: difference of the means.
    Metric: the last result. Sample ratio: share of the users that came to the candidate. Drift: population stability
    index."""
    expected: float | None = None
    """Sample ratio: share of the users that should have come to the candidate."""
    interval: Interval | None = None
    """Objective: confidence sequence of the estimate."""
    e_value: float | None = None
    """Guardrail and sample ratio: evidence against the candidate; from threshold on it counts as proof."""
    threshold: float | None = None
    """Value of eValue (or of the index) from which on the check fails."""
    dry_run: bool | None = None
    """Whether it is only shown."""
    message: Annotated[str, Field(max_length=1024)] | None = None
    """The same in words."""
    measurements: Measurements | None = None
    """Metric: tally."""


class SampleRatio(StatusModel):
    """Whether the sides get the shares of the users that they should."""

    expected: float | None = None
    """Share of the users that should have come to the candidate, 0 to 1; absent before any is compared."""
    observed: float | None = None
    """Share of the users that came to it."""
    e_value: float | None = None
    """Evidence that the shares are wrong; the alarm is raised from 1/alpha on."""


class EvaluationResult(StatusModel):
    """Result of the evalGate step under way, or of the last one."""

    name: Annotated[str, Field(max_length=253)]
    """Name of the evaluation."""
    id: Annotated[str, Field(max_length=128)]
    """Identity of this run at the agent."""
    phase: CheckPhase
    """Verdict; Inconclusive while it runs."""
    candidate: float | None = None
    """Score of the candidate, 0 to 1."""
    stable: float | None = None
    """Score of what it is compared with."""
    rows: int | None = None
    """Rows that were scored."""
    message: Message | None = None
    """The same in words."""


class HistoryEntry(StatusModel):
    """A rollout that is over."""

    revision: Revision
    """The candidate of that rollout."""
    digest: Digest
    """SHA-256 of its manifest."""
    uri: Annotated[str, Field(max_length=1200)]
    """Folder of its artifact."""
    fine_tune_job: Annotated[str, Field(max_length=253)] | None = None
    """FineTuneJob that made it."""
    completion_status: CompletionStatus
    """How it ended."""
    reason: Annotated[str, Field(max_length=64)] | None = None
    """Abort reason."""
    message: Message | None = None
    """The same in words."""
    start_time: datetime
    """When the rollout began."""
    end_time: datetime
    """When it ended."""


class TakenAction(StatusModel):
    """The last value of the annotation finetune.dev/action that was obeyed or refused."""

    value: Annotated[str, Field(max_length=128)]
    """The annotation's value."""
    pending: bool = True
    """Whether the annotation still has to be removed."""
    refused: bool = False
    """Whether it could not be done now; the message says why."""
    message: Message | None = None
    """What was done."""


class Announcement(StatusModel):
    """A transition that was worth telling."""

    name: Annotated[str, Field(max_length=253)]
    """Name of its Event. Whoever finds that Event there does not tell it again."""
    time: datetime
    """When it happened."""
    severity: Severity
    """How bad it is: info, warn or error."""
    reason: Annotated[str, Field(max_length=64)]
    """One word."""
    message: Annotated[str, Field(max_length=1000)]
    """What happened."""


class AdapterDeploymentStatus(StatusModel):
    """What serves, what is under way, and why."""

    observed_generation: int | None = None
    """Generation of the spec that this status is about; -1 until the operator has seen the object."""
    phase: RolloutPhase | None = None
    """Summary for people, with the words of Argo Rollouts."""
    stage: Stage | None = None
    """Where the rollout is."""
    reason: Annotated[str, Field(max_length=64)] | None = None
    """One word for why."""
    message: Message | None = None
    """One sentence: what happens now, or what to do."""
    completion_status: CompletionStatus | None = None
    """How the last rollout ended."""
    stable_revision: Revision | None = None
    """Revision that serves, or `base` where the base model does."""
    candidate_revision: Revision | None = None
    """Revision of the rollout under way, or that was rolled back."""
    current_step_index: int | None = None
    """Step under way, from 0."""
    current_step_hash: Annotated[str, Field(max_length=64)] | None = None
    """Hash of the steps; another one starts them anew."""
    step: Annotated[str, Field(max_length=64)] | None = None
    """The same for printing, for example 3/6 pause."""
    weights: Weights | None = None
    """Who gets how much."""
    pause_conditions: Annotated[
        list[PauseCondition], Field(max_length=16, json_schema_extra=keyed_list("reason"))
    ] = Field(default_factory=list)
    """Why the rollout waits; all of them must go before it goes on."""
    abort: Abort | None = None
    """Why the candidate was rolled back."""
    adapters: Annotated[
        list[LoadedAdapter], Field(max_length=16, json_schema_extra=keyed_list("revision"))
    ] = Field(default_factory=list)
    """Revisions that the engines have or should have."""
    analysis: Annotated[list[Check], Field(max_length=64, json_schema_extra=keyed_list("name"))] = Field(
        default_factory=list
    )
    """Guardrails, objectives, metrics and alarms as of the last look."""
    sample_ratio: SampleRatio | None = None
    """The numbers of the alarm sample-ratio in analysis."""
    evaluation: EvaluationResult | None = None
    """The evalGate step under way, or the last one."""
    rollout_start_time: datetime | None = None
    """When the rollout began."""
    stage_start_time: datetime | None = None
    """When the stage began."""
    step_start_time: datetime | None = None
    """When the step began."""
    last_progress_time: datetime | None = None
    """When the rollout last went on; progressDeadlineSeconds counts from here."""
    evidence_missing_since: datetime | None = None
    """Since when the routers (or Prometheus) have told nothing."""
    last_action: TakenAction | None = None
    """The last action that was asked for by annotation."""
    history: Annotated[list[HistoryEntry], Field(max_length=100)] = Field(default_factory=list)
    """Rollouts that are over, newest first; at most revisionHistoryLimit."""
    announcements: Annotated[
        list[Announcement], Field(max_length=16, json_schema_extra=keyed_list("name"))
    ] = Field(default_factory=list)
    """Transitions that the operator tells by Events and alerts, in the same write as the transition itself, so that an
    operator that is killed leaves them to the next one. What was told goes with the next write."""
    conditions: Annotated[list[Condition], Field(max_length=16, json_schema_extra=keyed_list("type"))] = (
        Field(default_factory=list)
    )
    """Available, Progressing, Paused, Promoted, AdaptersLoaded, TrafficRouted, MetricsAvailable, AnalysisPassing,
    SampleRatioOK, BaseModelCompatible, CapacityOK, RoutesStored, InvalidSpec, and Reconciling and Stalled (kstatus)."""

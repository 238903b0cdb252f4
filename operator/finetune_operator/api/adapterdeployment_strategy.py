"""How a new adapter reaches its users: the steps, and who is asked and told on the way."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field

from finetune_operator.api.adapterdeployment_traffic import Url
from finetune_operator.api.base import ApiModel
from finetune_operator.api.rules import REQUIRED, DnsName, rule, rules
from finetune_operator.api.uris import DataUri

Duration = Annotated[
    str,
    Field(
        min_length=1,
        max_length=32,
        json_schema_extra=rules(
            rule(
                "self.matches('^([0-9]+h)?([0-9]+m)?([0-9]+s)?$') && self != ''",
                "must be a duration such as 30s, 10m or 1h30m",
            )
        ),
    ),
]
Percent = Annotated[int, Field(ge=0, le=100)]
Score = Annotated[float, Field(ge=0, le=1)]


class EvalGateStep(ApiModel):
    """Both revisions answer the rows of an evaluation before any user meets the candidate."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "has(self.minScore) || has(self.maxRegression)",
                "set minScore, maxRegression or both; a gate without a bar lets everything pass",
                reason=REQUIRED,
            )
        )
    )

    eval_ref: DnsName
    """Name of one of spec.evaluations."""
    min_score: Score | None = None
    """Least score of the candidate, from 0 to 1."""
    max_regression: Score | None = None
    """By how much the candidate's score may be below the stable revision's (the base model's at first)."""


class Judge(StrEnum):
    HEURISTIC = "heuristic"


class SetMirrorStep(ApiModel):
    """The candidate gets copies of requests; its answers are counted and thrown away."""

    percent: Annotated[int, Field(ge=1, le=100)]
    """Share of the stable revision's requests that is copied, in percent."""
    duration: Duration
    """How long; then the next step follows."""
    judge: Judge = Judge.HEURISTIC
    """heuristic: the guardrails are applied to the copied answers."""


class PauseStep(ApiModel):
    """Wait with the weight as it is."""

    duration: Duration | None = None
    """How long. Absent: until somebody says `promote` or `resume`."""


class AnalysisStep(ApiModel):
    """Go on only when every objective and metric of spec.analysis is Successful."""

    duration: Duration | None = None
    """Least time to look, even when the evidence is enough earlier."""


class OnTimeout(StrEnum):
    ABORT = "Abort"
    PROMOTE = "Promote"


class ApprovalStep(ApiModel):
    """Wait for a person: `finetune rollout promote`, or the annotation finetune.dev/action: promote."""

    timeout: Duration | None = None
    """Longest wait. Absent: for ever."""
    on_timeout: OnTimeout = OnTimeout.ABORT
    """What then happens: Abort (default) or Promote (go on)."""


STEP_KINDS = ("evalGate", "setMirror", "setWeight", "pause", "analysis", "approval")
ONE_KIND = " + ".join(f"(has(self.{kind}) ? 1 : 0)" for kind in STEP_KINDS) + " == 1"


class Step(ApiModel):
    """One step: exactly one of evalGate, setMirror, setWeight, pause, analysis and approval."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(ONE_KIND, "name exactly one of " + ", ".join(STEP_KINDS) + " in each step", reason=REQUIRED)
        )
    )

    eval_gate: EvalGateStep | None = None
    """Compare both revisions on golden rows."""
    set_mirror: SetMirrorStep | None = None
    """Copy requests to the candidate for a while."""
    set_weight: Percent | None = None
    """Percent of the users that get the candidate from now on."""
    pause: PauseStep | None = None
    """Wait."""
    analysis: AnalysisStep | None = None
    """Wait for evidence."""
    approval: ApprovalStep | None = None
    """Wait for a person."""


DEFAULT_STEPS = [
    Step(set_weight=5),
    Step(pause=PauseStep(duration="5m")),
    Step(set_weight=25),
    Step(pause=PauseStep(duration="5m")),
    Step(set_weight=50),
    Step(pause=PauseStep(duration="5m")),
]


class CanarySpec(ApiModel):
    """Step by step, with the guardrails armed all the time."""

    steps: Annotated[list[Step], Field(max_length=32)] = DEFAULT_STEPS
    """Steps in their order; after the last one the candidate becomes the stable revision. Default: 5, 25 and 50
    percent, five minutes each. An empty list promotes as soon as the adapter is loaded."""
    max_step_duration: Duration = "24h"
    """An analysis step that has no verdict after this time pauses the rollout."""
    scale_down_delay_seconds: Annotated[int, Field(ge=0, le=604800)] = 600
    """How long the previous revision stays loaded after a promotion, in seconds."""
    abort_scale_down_delay_seconds: Annotated[int, Field(ge=0, le=604800)] = 30
    """How long an aborted candidate stays loaded, in seconds."""


class StrategySpec(ApiModel):
    """How a new adapter reaches its users."""

    canary: CanarySpec = CanarySpec()
    """Step by step."""


class Scorer(StrEnum):
    EXACT_MATCH = "ExactMatch"
    JSON_VALID = "JsonValid"
    JSON_FIELDS = "JsonFields"
    CONTAINS = "Contains"


class EvaluationSpec(ApiModel):
    """Golden rows that revisions are scored on. The agent beside the engine reads them."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "self.scorer != 'JsonFields' || has(self.fields)",
                "JsonFields compares fields; name them, for example fields: [category]",
                fieldPath=".fields",
                reason=REQUIRED,
            )
        )
    )

    name: DnsName
    """Name for evalGate.evalRef."""
    uri: DataUri
    """JSONL file; each row has messages (the last one is the reference answer) or prompt and completion."""
    scorer: Scorer = Scorer.EXACT_MATCH
    """ExactMatch (default): the answer is the reference, apart from blanks around it. Contains: the reference is
    part of the answer. JsonValid: the answer is JSON. JsonFields: the named fields of both JSON objects are equal."""
    fields: (
        Annotated[
            list[Annotated[str, Field(min_length=1, max_length=128)]], Field(min_length=1, max_length=32)
        ]
        | None
    ) = None
    """Fields that JsonFields compares."""
    max_rows: Annotated[int, Field(ge=1, le=10000)] = 200
    """Rows that are used, from the first on."""
    max_tokens: Annotated[int, Field(ge=1, le=8192)] = 256
    """Longest answer, in tokens."""


class WebhookType(StrEnum):
    CONFIRM_ROLLOUT = "confirm-rollout"
    CONFIRM_TRAFFIC_INCREASE = "confirm-traffic-increase"
    CONFIRM_PROMOTION = "confirm-promotion"
    ROLLBACK = "rollback"
    EVENT = "event"


class WebhookSpec(ApiModel):
    """A URL that is asked (confirm-*, rollback) or told (event). The types are Flagger's."""

    name: DnsName
    """Name for messages."""
    type: WebhookType
    """confirm-rollout, confirm-traffic-increase and confirm-promotion: the rollout waits until the answer is 2xx.
    rollback: a 2xx answer aborts the rollout. event: is told of each transition."""
    url: Url
    """Where the JSON document is posted to: {name, namespace, alias, phase, stage, candidateRevision, ...}."""
    timeout_seconds: Annotated[int, Field(ge=1, le=60)] = 10
    """Longest time for an answer, in seconds."""


class Severity(StrEnum):
    INFO = "info"
    WARN = "warn"
    ERROR = "error"


class AlertProvider(ApiModel):
    """An alert provider by name."""

    name: DnsName
    """Name of a provider in the operator's configuration. Its URL is a secret and stands there."""


class AlertSpec(ApiModel):
    """Who is told when something happens, as a Slack-compatible message."""

    severity: Severity = Severity.WARN
    """Least severity: info (every stage), warn (pauses) or error (rollbacks)."""
    provider_ref: AlertProvider
    """Whom to tell."""


class RollbackWindowSpec(ApiModel):
    """Revisions that served before need no steps."""

    revisions: Annotated[int, Field(ge=0, le=100)] = 3
    """A return to one of this many last stable revisions is done at once. 0: always with steps."""

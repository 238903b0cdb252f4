"""How a new adapter reaches its users: the steps, and who is asked and told on the way."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Self

from pydantic import ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from finetune_operator.api.adapterdeployment_traffic import Url
from finetune_operator.api.base import ApiModel
from finetune_operator.api.rules import FORBIDDEN, REQUIRED, PartName, read_as, rule, rules
from finetune_operator.api.uris import BY_AGENT, DATA_SHAPES, ONE_FILE, uri_rules

# Few digits, so that CEL's duration() can hold every one of them.
DURATION = "^([0-9]{1,4}h)?([0-9]{1,5}m)?([0-9]{1,7}s)?$"
DURATION_MESSAGE = "must be a duration of at least a second, such as 30s, 10m or 1h30m"
IS_DURATION = rule(
    f"self.matches('{DURATION}') && self != '' && duration(self) >= duration('1s')", DURATION_MESSAGE
)
DURATION_TEXT = read_as(DURATION, DURATION_MESSAGE)
Duration = Annotated[
    str, Field(min_length=1, max_length=32, json_schema_extra=rules(IS_DURATION)), DURATION_TEXT
]


def duration_of_at_most(limit: str, message: str) -> Any:
    """Field of a duration with an upper bound."""
    bound = rule(f"!self.matches('{DURATION}') || duration(self) <= duration('{limit}')", message)
    return Field(min_length=1, max_length=32, json_schema_extra=rules(IS_DURATION, bound))


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

    eval_ref: PartName
    """Name of one of spec.evaluations."""
    min_score: Score | None = None
    """Least score of the candidate, from 0 to 1. Absent: any."""
    max_regression: Score | None = None
    """By how much the candidate's score may be below the stable revision's (the base model's at first). Absent: by any
    amount."""


class SetMirrorStep(ApiModel):
    """The candidate gets copies of requests; its answers are counted, by the guardrails too, and thrown away."""

    percent: Annotated[int, Field(ge=1, le=100)]
    """Share of the stable revision's requests that is copied, in percent."""
    duration: Duration
    """How long; then the next step follows."""


class PauseStep(ApiModel):
    """Wait with the weight as it is."""

    duration: Duration | None = None
    """How long. Absent: until somebody says `promote` or `resume`."""


class AnalysisStep(ApiModel):
    """Go on only when every objective and metric of spec.analysis is Successful."""

    duration: Duration | None = None
    """Least time to look, even when the evidence is enough earlier. Absent: as soon as the evidence is enough."""


class OnTimeout(StrEnum):
    ABORT = "Abort"
    PROMOTE = "Promote"


class ApprovalStep(ApiModel):
    """Wait for a person: `finetune rollout promote`, or the annotation finetune.dev/action: promote."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "has(self.timeout) || !has(self.onTimeout)",
                "says what happens after timeout, and there is no timeout; set timeout or remove onTimeout",
                fieldPath=".onTimeout",
                reason=FORBIDDEN,
            )
        )
    )

    timeout: Duration | None = None
    """Longest wait. Absent: for ever."""
    on_timeout: OnTimeout = OnTimeout.ABORT
    """What then happens: Abort (default) or Promote (go on)."""


STEP_KINDS = ("evalGate", "setMirror", "setWeight", "pause", "analysis", "approval")
ONE_OF_THEM = "name exactly one of " + ", ".join(STEP_KINDS) + " in each step"
ONE_KIND = " + ".join(f"(has(self.{kind}) ? 1 : 0)" for kind in STEP_KINDS) + " == 1"


class Step(ApiModel):
    """One step: exactly one of evalGate, setMirror, setWeight, pause, analysis and approval."""

    model_config = ConfigDict(json_schema_extra=rules(rule(ONE_KIND, ONE_OF_THEM, reason=REQUIRED)))

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

    @model_validator(mode="after")
    def _has_one_kind(self) -> Self:
        if len(self.model_dump(exclude_none=True)) != 1:
            raise PydanticCustomError("rule", "{message}", {"message": ONE_OF_THEM})
        return self


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
    """An analysis step that has no verdict after this time pauses the rollout. Default: 24h."""
    scale_down_delay_seconds: Annotated[int, Field(ge=0, le=604800)] = 600
    """How long the previous revision stays loaded after a promotion, in seconds; until then going back is
    immediate. Default: 600."""
    abort_scale_down_delay_seconds: Annotated[int, Field(ge=0, le=604800)] = 30
    """How long an aborted candidate stays loaded, in seconds. Default: 30."""


class StrategySpec(ApiModel):
    """How a new adapter reaches its users."""

    canary: CanarySpec = CanarySpec()
    """Step by step."""


# Rows are read by the agent, which reads JSON lines and nothing else.
GoldenUri = Annotated[
    str,
    Field(
        min_length=1,
        max_length=1024,
        json_schema_extra=rules(
            *uri_rules(DATA_SHAPES, what="a file with golden rows", credentials=BY_AGENT),
            rule("self.endsWith('.jsonl')", "must name one file with JSON lines that ends in .jsonl"),
            ONE_FILE,
        ),
    ),
]


class Scorer(StrEnum):
    EXACT_MATCH = "ExactMatch"
    JSON_VALID = "JsonValid"
    JSON_FIELDS = "JsonFields"
    CONTAINS = "Contains"


JSON_FIELDS = "has(self.scorer) && self.scorer == 'JsonFields'"


class EvaluationSpec(ApiModel):
    """Golden rows that revisions are scored on. The agent beside the engine reads them."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                f"!({JSON_FIELDS}) || has(self.fields)",
                "JsonFields compares fields; name them, for example fields: [category]",
                fieldPath=".fields",
                reason=REQUIRED,
            ),
            rule(
                f"{JSON_FIELDS} || !has(self.fields)",
                "only the scorer JsonFields compares fields; set scorer: JsonFields or remove fields",
                fieldPath=".fields",
                reason=FORBIDDEN,
            ),
        )
    )

    name: PartName
    """Name for evalGate.evalRef."""
    uri: GoldenUri
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
    """Fields that JsonFields compares; only and always with that scorer. Absent: none."""
    max_rows: Annotated[int, Field(ge=1, le=10000)] = 200
    """Rows that are used, from the first on. Default: 200."""
    max_tokens: Annotated[int, Field(ge=1, le=8192)] = 256
    """Longest answer, in tokens. Default: 256."""


class WebhookType(StrEnum):
    CONFIRM_ROLLOUT = "confirm-rollout"
    CONFIRM_TRAFFIC_INCREASE = "confirm-traffic-increase"
    CONFIRM_PROMOTION = "confirm-promotion"
    ROLLBACK = "rollback"
    EVENT = "event"


class WebhookSpec(ApiModel):
    """A URL that is asked (confirm-*, rollback) or told (event). The types are Flagger's."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!(has(self.timeout) && has(self.timeoutSeconds))",
                "says the same as timeout; remove one of them",
                fieldPath=".timeoutSeconds",
                reason=FORBIDDEN,
            )
        )
    )

    name: PartName | None = None
    """Name for messages. Absent: its type."""
    type: WebhookType
    """confirm-rollout, confirm-traffic-increase and confirm-promotion: the rollout waits until the answer is 2xx.
    rollback: a 2xx answer aborts the rollout. event: is told of each transition."""
    url: Url
    """Where the JSON document is posted to: {name, namespace, alias, phase, stage, candidateRevision, ...}."""
    timeout: (
        Annotated[str, duration_of_at_most("1m", "must be a minute at most, for example 10s"), DURATION_TEXT]
        | None
    ) = None
    """Longest time for an answer. Absent: 10s."""
    timeout_seconds: Annotated[int, Field(ge=1, le=60)] | None = None
    """The same in seconds, instead of timeout. Absent: see timeout."""

    @property
    def key(self) -> str:
        """What tells it from the others."""
        return self.name or self.type


class Severity(StrEnum):
    INFO = "info"
    WARN = "warn"
    ERROR = "error"


class AlertProvider(ApiModel):
    """An alert provider by name."""

    name: PartName
    """Name of a provider in the operator's configuration. Its URL is a secret and stands there."""


class AlertSpec(ApiModel):
    """Who is told when something happens, as a Slack-compatible message."""

    severity: Severity = Severity.WARN
    """Least severity: info (every stage), warn (default; pauses) or error (rollbacks)."""
    provider_ref: AlertProvider
    """Whom to tell."""


class RollbackWindowSpec(ApiModel):
    """Revisions that served before need no steps."""

    revisions: Annotated[int, Field(ge=0, le=100)] = 3
    """A return to one of this many last stable revisions is done at once; 0 means always with steps. Default: 3."""

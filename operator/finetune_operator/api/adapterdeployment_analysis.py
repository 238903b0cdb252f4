"""What counts as evidence in a rollout, and what follows from it."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field

from finetune_operator.api.adapterdeployment_strategy import DURATION_TEXT, duration_of_at_most
from finetune_operator.api.adapterdeployment_traffic import Url
from finetune_operator.api.base import ApiModel
from finetune_operator.api.routes import SignalEvent
from finetune_operator.api.rules import (
    FORBIDDEN,
    PART_NAME,
    REQUIRED,
    PartName,
    keyed_list,
    read_as,
    rule,
    rules,
)

# As a rule, because the API server cuts the fraction off a bound that it compares with a whole number.
Alpha = Annotated[
    float,
    Field(
        gt=0,
        lt=1,
        json_schema_extra=rules(
            rule(
                "self >= 0.000001 && self <= 0.5",
                "must be a probability from 0.000001 to 0.5, for example 0.01 (one in a hundred)",
            )
        ),
    ),
]
# The alarms stand under these names beside the checks in status.analysis.
CheckName = Annotated[
    str,
    Field(
        min_length=1,
        max_length=63,
        json_schema_extra=rules(
            PART_NAME,
            rule(
                "!(self in ['sample-ratio', 'drift'])",
                "sample-ratio and drift are the names of the built-in alarms; choose another one",
            ),
        ),
    ),
]
CONDITION = (
    "^ *result *(<=|>=|<|>|==|!=) *-?[0-9]+([.][0-9]+)?(e-?[0-9]+)?"
    "( *(&&|[|][|]) *result *(<=|>=|<|>|==|!=) *-?[0-9]+([.][0-9]+)?(e-?[0-9]+)?)* *$"
)
CONDITION_MESSAGE = (
    "must compare result with numbers, for example result <= 1.2, or result > 0.9 && result < 1.1"
)
Condition = Annotated[
    str,
    Field(
        min_length=1,
        max_length=256,
        json_schema_extra=rules(rule(f"self.matches('{CONDITION}')", CONDITION_MESSAGE)),
    ),
    read_as(CONDITION, CONDITION_MESSAGE),
]
THRESHOLD = "^[0-9]{1,7}(ms|s)$"
THRESHOLD_MESSAGE = "must be a time above zero such as 800ms or 2s"


class GuardrailSource(StrEnum):
    ROUTER = "router"


class GuardrailSpec(ApiModel):
    """A kind of harm. The candidate is rolled back at once when it does more of it than the stable revision: a count
    e-process (Lindon and Malek 2022), valid however often one looks, needs no least number of samples."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!(self.event in ['ttft_over', 'latency_over']) || has(self.threshold)",
                "ttft_over and latency_over need a threshold, for example 2s",
                fieldPath=".threshold",
                reason=REQUIRED,
            ),
            rule(
                "self.event in ['ttft_over', 'latency_over'] || !has(self.threshold)",
                "only ttft_over and latency_over have a threshold",
                fieldPath=".threshold",
                reason=FORBIDDEN,
            ),
        )
    )

    name: CheckName
    """Name in the status and in metrics."""
    source: GuardrailSource | None = None
    """Who counts it: router. Absent: the same."""
    event: SignalEvent
    """What is counted, at most once per answer: error, ttft_over, latency_over, schema_invalid, empty_output,
    truncated, refusal, repetition, flagged."""
    threshold: (
        Annotated[
            str,
            Field(
                min_length=2,
                max_length=32,
                json_schema_extra=rules(
                    rule(
                        f"self.matches('{THRESHOLD}') && !self.matches('^0+m?s$')",
                        THRESHOLD_MESSAGE,
                    )
                ),
            ),
            read_as(THRESHOLD, THRESHOLD_MESSAGE),
        ]
        | None
    ) = None
    """Time over which an answer counts, for ttft_over (first byte) and latency_over (last byte), for example 2s.
    Absent for all other events."""
    alpha: Alpha = 0.01
    """Probability of a false rollback over the whole rollout, however often one looks; it is shared among the
    guardrails. Default: 0.01."""


class ObjectiveSource(StrEnum):
    FEEDBACK = "feedback"
    ROUTER = "router"


class Direction(StrEnum):
    INCREASE = "Increase"
    DECREASE = "Decrease"


class ObjectiveTest(StrEnum):
    NON_INFERIORITY = "NonInferiority"
    SUPERIORITY = "Superiority"


FROM_ROUTER = "has(self.source) && self.source == 'router'"


class ObjectiveSpec(ApiModel):
    """A mean that the candidate must not worsen: a confidence sequence for the difference of means, valid however
    often one looks."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                f"!({FROM_ROUTER}) || self.metric in ['seconds', 'ttft_seconds', 'completion_tokens']",
                "the router measures seconds, ttft_seconds and completion_tokens; other metrics come from feedback",
                fieldPath=".metric",
            ),
            rule(
                f"!({FROM_ROUTER} && self.metric in ['seconds', 'ttft_seconds']) || "
                "(has(self.direction) && self.direction == 'Decrease')",
                "fewer seconds are better; set direction: Decrease",
                fieldPath=".direction",
            ),
        )
    )

    name: CheckName
    """Name in the status and in metrics."""
    source: ObjectiveSource = ObjectiveSource.FEEDBACK
    """feedback (default): POST /v1/feedback of the router. router: seconds, ttft_seconds or completion_tokens of each
    answer."""
    metric: Annotated[str, Field(min_length=1, max_length=64)]
    """Name of the metric, for example helpful."""
    direction: Direction = Direction.INCREASE
    """Whether more is better (Increase, default) or less (Decrease)."""
    test: ObjectiveTest = ObjectiveTest.NON_INFERIORITY
    """NonInferiority (default): worse by less than margin. Superiority: better by more than margin."""
    margin: Annotated[float, Field(ge=0, le=1000000)] = 0.02
    """Difference of the means that does not matter, in units of the metric. Default: 0.02."""
    alpha: Alpha = 0.05
    """One minus the coverage of the sequence: the probability of a wrong verdict. Default: 0.05."""
    min_samples_per_arm: Annotated[int, Field(ge=20, le=100000000)] = 200
    """Values per side before anything is said. Default: 200."""


class PrometheusQuery(ApiModel):
    """A query whose result is one number."""

    address: Url
    """URL of Prometheus, for example http://prometheus:9090."""
    query: Annotated[str, Field(min_length=1, max_length=4096)]
    """PromQL that gives one number. {{alias}}, {{stable}} and {{candidate}} stand for the alias and the revisions."""


class MetricSpec(ApiModel):
    """A number from Prometheus, judged at each interval. The rules are Argo Rollouts', apart from one: a missing or
    NaN result is Inconclusive and never a reason for a rollback."""

    name: CheckName
    """Name in the status and in metrics."""
    prometheus: PrometheusQuery
    """Where the number comes from."""
    success_condition: Condition
    """When a measurement is Successful, for example result <= 1.2."""
    failure_condition: Condition | None = None
    """When a measurement is Failed. Absent: whenever it is not Successful."""
    failure_limit: Annotated[int, Field(ge=0, le=1000)] = 3
    """Failed measurements that are borne; one more rolls back. Default: 3."""
    inconclusive_limit: Annotated[int, Field(ge=0, le=1000)] = 10
    """Inconclusive measurements that are borne; one more pauses. Default: 10."""
    consecutive_error_limit: Annotated[int, Field(ge=0, le=1000)] = 4
    """Unanswered queries in a row that are borne; one more counts as missing evidence (see
    onMetricsUnavailable). Default: 4."""
    count: Annotated[int, Field(ge=1, le=1000)] = 3
    """Successful measurements that an analysis step asks for. Default: 3."""


class SampleRatioSpec(ApiModel):
    """Alarm when the sides get other shares of the users than they should (sample ratio mismatch)."""

    alpha: Alpha = 0.001
    """Probability of a false alarm. An alarm pauses the rollout. Default: 0.001."""


class DriftSpec(ApiModel):
    """Alarm when the candidate's answers have other lengths or words than the stable revision's, or are refusals or cut
    off more often."""

    max_psi: Annotated[float, Field(gt=0, le=10)] = 0.25
    """Population stability index of lengths, or of first words, from which on the rollout pauses. Default: 0.25."""
    min_samples_per_arm: Annotated[int, Field(ge=50, le=100000000)] = 500
    """Answers per side before anything is said. Default: 500."""


class OnMetricsUnavailable(StrEnum):
    HOLD = "Hold"
    PAUSE = "Pause"
    ABORT = "Abort"


GUARDRAILS = [GuardrailSpec(name="errors", event=SignalEvent.ERROR)]


class AnalysisSpec(ApiModel):
    """Evidence and what follows from it."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!has(self.objectives) || self.objectives.all(o, !self.guardrails.exists(g, g.name == o.name))",
                "an objective has the name of a guardrail; the status tells them apart by name, so rename one",
                fieldPath=".objectives",
            ),
            rule(
                "!has(self.metrics) || self.metrics.all(m, !self.guardrails.exists(g, g.name == m.name) && "
                "!(has(self.objectives) && self.objectives.exists(o, o.name == m.name)))",
                "a metric has the name of a guardrail or of an objective; the status tells them apart by name, "
                "so rename one",
                fieldPath=".metrics",
            ),
            rule(
                "!has(self.dryRun) || self.dryRun.all(n, self.guardrails.exists(g, g.name == n) || "
                "(has(self.objectives) && self.objectives.exists(o, o.name == n)) || "
                "(has(self.metrics) && self.metrics.exists(m, m.name == n)))",
                "dryRun names something that is neither a guardrail, an objective nor a metric",
                fieldPath=".dryRun",
            ),
        )
    )

    interval: Annotated[
        str, duration_of_at_most("1h", "must be an hour at most, for example 5s"), DURATION_TEXT
    ] = "5s"
    """Time between two looks at the evidence. Default: 5s."""
    # Not a keyed list: server-side apply would leave the default one in it beside those that the user names.
    guardrails: Annotated[
        list[GuardrailSpec],
        Field(
            max_length=16,
            json_schema_extra=rules(
                rule(
                    "self.all(g, self.exists_one(h, h.name == g.name))",
                    "two guardrails have the same name; rename one",
                )
            ),
        ),
    ] = GUARDRAILS
    """Harm that rolls back at once; armed whenever the candidate gets traffic. Default: errors."""
    objectives: Annotated[list[ObjectiveSpec], Field(max_length=16, json_schema_extra=keyed_list("name"))] = (
        Field(default_factory=list)
    )
    """Means that an analysis step decides on. Absent: none."""
    metrics: Annotated[list[MetricSpec], Field(max_length=16, json_schema_extra=keyed_list("name"))] = Field(
        default_factory=list
    )
    """Numbers from Prometheus, beside what the routers count. Absent: none."""
    sample_ratio: SampleRatioSpec = SampleRatioSpec()
    """Alarm on wrong shares."""
    drift: DriftSpec | None = None
    """Alarm on other lengths. Absent: off; {} is a population stability index of 0.25."""
    on_metrics_unavailable: OnMetricsUnavailable = OnMetricsUnavailable.HOLD
    """When no evidence comes in: Hold (default; the weight stays, and after progressDeadlineSeconds the rollout
    pauses), Pause at once, or Abort."""
    dry_run: Annotated[list[PartName], Field(max_length=48)] = Field(default_factory=list)
    """Names of guardrails, objectives and metrics that are only shown, and change nothing. Absent: none."""

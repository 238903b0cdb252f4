"""What `finetune rollout plan` computes: how long each weight lasts, and what the evidence can tell in that time.

Pure; the statistics are those of finetune_operator.core.power.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_cli.rollout_views import step_text
from finetune_operator.api.adapterdeployment import AdapterDeploymentSpec
from finetune_operator.api.adapterdeployment_strategy import Step
from finetune_operator.api.adapterdeployment_traffic import StickinessType
from finetune_operator.core import power, statistics
from finetune_operator.core.durations import format_duration, parse_duration

SPAN_HEADER = (
    "STEPS",
    "CANDIDATE",
    "LASTS",
    "REQUESTS",
    "GUARDRAIL",
    "NEEDS",
    "WHICH TAKE",
    "CAUGHT BY THEN",
)
OBJECTIVE_HEADER = ("OBJECTIVE", "CANDIDATE", "NEEDS", "WHICH TAKE")


@dataclass(frozen=True)
class Assumptions:
    """What the user expects of traffic and answers; by name of the guardrail or objective, `""` for all others."""

    requests_per_second: float
    base_rates: Mapping[str, float]
    relative_risk: float
    answered: float
    deviations: Mapping[str, float]


@dataclass(frozen=True)
class Span:
    """Steps in a row during which the candidate's share stays the same."""

    steps: tuple[str, ...]
    weight: float
    """Percent of the compared answers that are the candidate's, copies included; 0: nothing is compared."""
    seconds: float
    """By the clocks of its steps."""
    by_evidence: bool = False
    """Whether it lasts until the objectives are decided."""
    by_person: bool = False
    """Whether it lasts until somebody goes on."""
    by_score: bool = False
    """Whether it lasts until the rows of an evaluation are scored."""


@dataclass(frozen=True)
class PlannedSpan:
    span: Span
    seconds: float
    """With the time that the objectives will probably take."""
    power: power.StepPower


@dataclass(frozen=True)
class RolloutPlan:
    spans: tuple[PlannedSpan, ...]
    objectives: tuple[power.Need, ...]
    warnings: tuple[str, ...]
    dry_run: frozenset[str]
    """Guardrails and objectives that are only shown."""

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.spans)

    @property
    def compared_seconds(self) -> float:
        return sum(one.seconds for one in self.spans if one.span.weight)


def plan_rollout(spec: AdapterDeploymentSpec, assumptions: Assumptions) -> RolloutPlan:
    """What the steps of the spec can find. Raises ValueError for an assumption out of bounds or about nothing."""
    analysis = statistics.plan_analysis(
        spec.analysis, sticky=spec.traffic.stickiness.type is StickinessType.HASH
    )
    guardrails = {one.name for one in analysis.guardrails}
    names = guardrails.union(one.name for one in analysis.objectives)
    unknown = sorted({*assumptions.base_rates, *assumptions.deviations} - names - {""})
    if unknown:
        raise ValueError(
            f"there is no guardrail or objective {unknown[0]}; there are {', '.join(sorted(names))}"
        )
    harms = {
        one.name: power.Harm(_pick(assumptions.base_rates, one.name, 0.02), assumptions.relative_risk)
        for one in analysis.guardrails
    }
    means = {
        one.name: power.Mean(
            deviation=_pick(assumptions.deviations, one.name, 0.5),
            answered=assumptions.answered if one.source == "feedback" else 1.0,
        )
        for one in analysis.objectives
        if one.source == "feedback" or one.name in assumptions.deviations
    }

    def compute(steps: Sequence[power.Step]) -> power.PowerPlan:
        return power.plan_power(
            analysis,
            steps,
            requests_per_second=assumptions.requests_per_second,
            interval_seconds=parse_duration(spec.analysis.interval),
            harms=harms,
            means=means,
        )

    limit = parse_duration(spec.strategy.canary.max_step_duration)
    lengths = []
    for span in spans_of(spec.strategy.canary.steps):
        needs = compute([power.Step(span.weight, 1.0)]).objectives if span.by_evidence else ()
        waits = [need.seconds_likely for need in needs if need.name not in analysis.dry_run]
        lengths.append((span, max(span.seconds, min(limit, max(waits, default=0.0)))))
    whole = compute([power.Step(span.weight, seconds) for span, seconds in lengths])
    spans = tuple(
        PlannedSpan(span, seconds, step if span.weight else dataclasses.replace(step, needs=()))
        for (span, seconds), step in zip(lengths, whole.steps, strict=True)
    )
    about_objectives = [text for text in whole.warnings if text.partition(": ")[0] not in guardrails]
    dry = analysis.dry_run
    warnings = [*_short_spans(spans, dry), *_missed_harm(spans, dry), *about_objectives]
    return RolloutPlan(spans, whole.objectives, tuple(warnings), dry)


def _short_spans(spans: Sequence[PlannedSpan], dry_run: Collection[str]) -> Iterator[str]:
    """One sentence per span and time needed, for all guardrails that need it and can roll back."""
    for one in spans:
        names: dict[float, list[str]] = {}
        for need in one.power.needs:
            if one.seconds < need.seconds_certain and need.name not in dry_run:
                names.setdefault(need.seconds_certain, []).append(need.name)
        for seconds, short in names.items():
            remedy = "no length is enough"
            if math.isfinite(seconds):
                hold = format_duration(seconds)
                remedy = f"wait {hold} before you go on" if one.span.by_person else f"hold it for {hold}"
            yield (
                f"{', '.join(one.span.steps)}: less than 95% to catch a harm to {', '.join(short)} "
                f"in this time alone; {remedy}"
            )


def _missed_harm(spans: Sequence[PlannedSpan], dry_run: Collection[str]) -> Iterator[str]:
    """What may still be missed when the last step ends."""
    names: dict[str, list[str]] = {}
    compared = any(one.span.weight for one in spans)
    for name, caught in spans[-1].power.caught.items() if compared else ():
        if caught < power.CERTAIN and name not in dry_run:
            names.setdefault(f"{caught:.0%}", []).append(name)
    for caught_percent, missed in names.items():
        yield f"all steps together catch a harm to {', '.join(missed)} with {caught_percent} only"


def _pick(values: Mapping[str, float], name: str, default: float) -> float:
    return values.get(name, values.get("", default))


def spans_of(steps: Sequence[Step]) -> list[Span]:
    """All steps in order."""
    spans, weight = [Span((), 0.0, 0.0)], 0.0
    for step in steps:
        text = step_text(step.model_dump(mode="json", by_alias=True, exclude_none=True))
        if step.set_weight is not None:
            weight = float(step.set_weight)
            spans.append(Span((text,), weight, 0.0))
        elif step.set_mirror is not None:
            # Of 100 + p answers that are compared, p are copies.
            copies = step.set_mirror.percent
            share = (weight + copies * (1 - weight / 100)) / (1 + copies / 100 * (1 - weight / 100))
            spans.append(Span((text,), round(share, 1), parse_duration(step.set_mirror.duration)))
            spans.append(Span((), weight, 0.0))
        else:
            spans[-1] = _extend(spans[-1], step, text)
    return [span for span in spans if span.steps]


def _extend(span: Span, step: Step, text: str) -> Span:
    timed = step.pause or step.analysis
    duration = parse_duration(timed.duration) if timed is not None and timed.duration else 0.0
    return dataclasses.replace(
        span,
        steps=(*span.steps, text),
        seconds=span.seconds + duration,
        by_evidence=span.by_evidence or step.analysis is not None,
        by_score=span.by_score or step.eval_gate is not None,
        by_person=span.by_person
        or step.approval is not None
        or (step.pause is not None and step.pause.duration is None),
    )


def span_rows(plan: RolloutPlan) -> list[list[str]]:
    """Header, and one row per span and guardrail."""
    rows = [list(SPAN_HEADER)]
    for one in plan.spans:
        head = [
            ", ".join(one.span.steps),
            f"{one.span.weight:.3g}%",
            _length(one),
            _count(one.power.requests),
        ]
        for need in one.power.needs:
            rows.append(
                [
                    *head,
                    _shown(need.name, plan),
                    _count(need.requests_certain),
                    _time(need.seconds_certain),
                    f"{one.power.caught.get(need.name, 0.0):.0%}",
                ]
            )
            head = [""] * len(head)
        if any(head):
            rows.append([*head, "", "", "", ""])
    return rows


def objective_rows(plan: RolloutPlan) -> list[list[str]]:
    """Header, and one row per objective whose spread is known."""
    return [
        list(OBJECTIVE_HEADER),
        *(
            [
                _shown(need.name, plan),
                f"{need.weight:.3g}%",
                _count(need.requests_certain),
                _time(need.seconds_certain),
            ]
            for need in plan.objectives
        ),
    ]


def assumption_lines(assumptions: Assumptions) -> list[str]:
    """What the numbers rest on, and how to say something else."""

    def each(values: Mapping[str, float], default: float, *, percent: bool) -> str:
        shown = {"": default, **values}
        return ", ".join(
            (f"{name} " if name else "") + (f"{value:.3g}" if not percent else f"{100 * value:.3g}%")
            for name, value in shown.items()
        )

    return [
        f"{assumptions.requests_per_second:g} requests/s for the alias (--requests-per-second)",
        f"{each(assumptions.base_rates, 0.02, percent=True)} of the stable revision's answers have the event "
        f"(--base-rate), and the candidate's {assumptions.relative_risk:g} times as often (--relative-risk)",
        f"feedback to {100 * assumptions.answered:.3g}% of the requests (--feedback-share), with a standard deviation "
        f"of {each(assumptions.deviations, 0.5, percent=False)} (--deviation)",
        "the candidate's share of the requests is its weight; of sticky users of whom a few ask most it is often "
        "less, and a guardrail needs about twice the requests (docs/statistics.md)",
        "for objectives, as many users as values; of a few who ask most it takes more, by the design effect "
        "(docs/statistics.md)",
        "a need is met with a probability of 95%",
    ]


def to_data(plan: RolloutPlan, assumptions: Assumptions) -> dict[str, Any]:
    """The plan for programs; times in seconds, null for never."""

    def need(one: power.Need) -> dict[str, Any]:
        return {
            "name": one.name,
            "dryRun": one.name in plan.dry_run,
            "candidatePercent": one.weight,
            "requestsLikely": _finite(one.requests_likely),
            "requestsCertain": _finite(one.requests_certain),
            "secondsLikely": _finite(one.seconds_likely),
            "secondsCertain": _finite(one.seconds_certain),
        }

    return {
        "assumptions": dataclasses.asdict(assumptions),
        "seconds": plan.seconds,
        "spans": [
            {
                "steps": list(one.span.steps),
                "candidatePercent": one.span.weight,
                "seconds": one.seconds,
                "untilEvidence": one.span.by_evidence,
                "untilPerson": one.span.by_person,
                "untilScored": one.span.by_score,
                "requests": one.power.requests,
                "guardrails": [
                    {**need(each), "caughtByThen": one.power.caught.get(each.name)}
                    for each in one.power.needs
                ],
            }
            for one in plan.spans
        ],
        "objectives": [need(one) for one in plan.objectives],
        "warnings": list(plan.warnings),
    }


def _length(one: PlannedSpan) -> str:
    span = one.span
    probable = span.by_evidence and one.seconds > span.seconds
    parts = [("about " if probable else "") + format_duration(one.seconds)] if one.seconds else []
    parts += ["until the rows are scored"] if span.by_score else []
    parts += ["until somebody goes on"] if span.by_person else []
    return " and ".join(parts) or format_duration(0)


def _shown(name: str, plan: RolloutPlan) -> str:
    return f"{name} (dry run)" if name in plan.dry_run else name


def _time(seconds: float) -> str:
    return format_duration(seconds) if math.isfinite(seconds) else "never"


def _count(number: float) -> str:
    return f"{number:,.0f}" if math.isfinite(number) else "never enough"


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None

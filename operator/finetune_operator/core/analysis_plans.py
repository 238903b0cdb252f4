"""What an analysis asks of the evidence, in the terms of the statistics: no times, no texts, no addresses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from finetune_operator.api.adapterdeployment_analysis import (
    AnalysisSpec,
    Direction,
    ObjectiveSource,
    ObjectiveTest,
)
from finetune_operator.api.routes import SignalEvent

# Signals whose shares the drift check looks at, where the routers count them.
DRIFT_SIGNALS = (SignalEvent.TRUNCATED, SignalEvent.REFUSAL)


@dataclass(frozen=True)
class GuardrailPlan:
    """A kind of harm that the candidate must not do more of."""

    name: str
    event: SignalEvent = SignalEvent.ERROR
    threshold: float | None = None
    """Seconds, for ttft_over and latency_over."""
    alpha: float = 0.01
    """Probability of a false abort, before it is shared among the guardrails."""

    @property
    def signal(self) -> str:
        """Name under which routers and evidence count it. What counts is part of it: with another threshold it is
        another thing, and what was counted of the former proves nothing."""
        limit = "" if self.threshold is None else f":{self.threshold:g}"
        return f"{self.name}:{self.event}{limit}"


@dataclass(frozen=True)
class ObjectivePlan:
    """A mean that the candidate must not worsen, or must improve."""

    name: str
    metric: str
    source: ObjectiveSource = ObjectiveSource.FEEDBACK
    direction: Direction = Direction.INCREASE
    test: ObjectiveTest = ObjectiveTest.NON_INFERIORITY
    margin: float = 0.02
    """In units of the metric; with `relative` as a fraction of the stable mean (0.1 is ten percent)."""
    relative: bool = False
    alpha: float = 0.05
    min_samples_per_arm: int = 200

    @property
    def quantity(self) -> str:
        """Name under which routers and evidence sum it."""
        return f"scores/{self.metric}" if self.source is ObjectiveSource.FEEDBACK else self.metric


@dataclass(frozen=True)
class SampleRatioPlan:
    """Whether the sides get the shares of the users that they should get."""

    alpha: float = 0.001
    sticky: bool = True
    """True: distinct keys are counted. False: every request is assigned anew, so requests are."""


@dataclass(frozen=True)
class DriftPlan:
    """Whether the candidate's answers look other than the stable revision's."""

    max_psi: float = 0.25
    """Population stability index of the answers' lengths."""
    max_share_change: float = 0.05
    """Change of a signal's share that matters, in absolute terms."""
    signals: tuple[str, ...] = tuple(DRIFT_SIGNALS)
    """Names of the signals whose shares are compared."""
    min_samples_per_arm: int = 500
    alpha: float = 0.001
    """Probability with which equal arms may look different by chance."""


@dataclass(frozen=True)
class AnalysisPlan:
    guardrails: tuple[GuardrailPlan, ...] = (GuardrailPlan(name="errors"),)
    objectives: tuple[ObjectivePlan, ...] = ()
    sample_ratio: SampleRatioPlan = SampleRatioPlan()
    drift: DriftPlan | None = None
    dry_run: frozenset[str] = frozenset()
    """Checks that are only shown. They take no share of the guardrails' alpha."""

    @property
    def signals(self) -> tuple[str, ...]:
        """Names of everything that is counted by answers."""
        drifting = self.drift.signals if self.drift else ()
        return tuple(dict.fromkeys([*(guardrail.signal for guardrail in self.guardrails), *drifting]))

    @property
    def grouped(self) -> tuple[str, ...]:
        """Quantities that routers sum by group of keys as well."""
        lengths = ["completion_tokens"] if self.drift else []
        return tuple(dict.fromkeys([*(objective.quantity for objective in self.objectives), *lengths]))


def plan_analysis(spec: AnalysisSpec, *, sticky: bool = True) -> AnalysisPlan:
    """The plan that a spec asks for. `sticky` is whether users keep their side (spec.traffic.stickiness)."""
    guardrails = tuple(
        GuardrailPlan(
            name=guardrail.name,
            event=guardrail.event,
            threshold=None if guardrail.threshold is None else parse_seconds(guardrail.threshold),
            alpha=guardrail.alpha,
        )
        for guardrail in spec.guardrails
    )
    return AnalysisPlan(
        guardrails=guardrails,
        objectives=tuple(
            ObjectivePlan(
                name=objective.name,
                metric=objective.metric,
                source=objective.source,
                direction=objective.direction,
                test=objective.test,
                margin=objective.margin,
                alpha=objective.alpha,
                min_samples_per_arm=objective.min_samples_per_arm,
            )
            for objective in spec.objectives
        ),
        sample_ratio=SampleRatioPlan(alpha=spec.sample_ratio.alpha, sticky=sticky),
        drift=None
        if spec.drift is None
        else DriftPlan(
            max_psi=spec.drift.max_psi,
            min_samples_per_arm=spec.drift.min_samples_per_arm,
            signals=_drift_signals(guardrails),
        ),
        dry_run=frozenset(spec.dry_run),
    )


def parse_seconds(text: str) -> float:
    """Seconds of a guardrail's threshold such as `800ms` or `2s`. ValueError for anything else."""
    for unit, factor in (("ms", 0.001), ("s", 1.0)):
        digits = text.removesuffix(unit)
        if digits != text and digits.isascii() and digits.isdigit():
            return int(digits) * factor
    raise ValueError(f"threshold {text!r} is not a time; write it as 800ms or 2s")


def _drift_signals(guardrails: Iterable[GuardrailPlan]) -> tuple[str, ...]:
    """Names under which the routers count what drift looks at: a guardrail's where one has that event."""
    declared = {guardrail.event: guardrail.signal for guardrail in reversed(tuple(guardrails))}
    return tuple(declared.get(event, event.value) for event in DRIFT_SIGNALS)

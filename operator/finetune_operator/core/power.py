"""How much traffic a rollout needs before its analysis can tell: for `finetune rollout plan`, before anything starts.

Closed forms, so the same question has the same answer. The tests hold them against simulations of the real e-process:
within 30 percent for rates from 0.1 to 20 percent and risks of 1.5 and more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

from finetune_operator.api.adapterdeployment_analysis import ObjectiveSource, ObjectiveTest
from finetune_operator.core import eprocesses, sequences
from finetune_operator.core.analysis_plans import AnalysisPlan, ObjectivePlan
from finetune_operator.core.durations import format_duration
from finetune_operator.core.eprocesses import BLOCK_REQUESTS, RELATIVE_RISKS

LIKELY, CERTAIN = 0.5, 0.95
MOST_REQUESTS = 1e12  # more are as good as never
# The mixture has 1/7 of its weight on each risk and 1/2 on harm from the start, which costs log 14 for the very risk;
# risks and beginnings nearby give some of it back. Fitted to simulations, towards caution.
MIXTURE_COST = math.log(10.0)


@dataclass(frozen=True)
class Step:
    """A span of one weight."""

    weight: float
    """Percent of the users on the candidate."""
    seconds: float


@dataclass(frozen=True)
class Harm:
    """What a guardrail is to find."""

    base_rate: float = 0.02
    """Share of the stable revision's answers with the event, between 0 and 1."""
    relative_risk: float = 2.0
    """How many times as often the candidate has it."""


@dataclass(frozen=True)
class Mean:
    """What an objective is to find."""

    deviation: float = 0.5
    """Standard deviation of a value; 0.5 is the largest that yes-or-no feedback has."""
    gain: float = 0.0
    """True difference towards better, in units of the metric."""
    answered: float = 0.05
    """Share of the requests that have a value; 1 for what the router measures."""


@dataclass(frozen=True)
class Need:
    """Traffic of both arms after which a check has spoken, at one weight."""

    name: str
    weight: float
    requests_likely: float
    """With probability 0.5. Infinite where the check can never tell."""
    requests_certain: float
    """With probability 0.95."""
    seconds_likely: float
    seconds_certain: float


@dataclass(frozen=True)
class StepPower:
    """One step beside what it needs."""

    step: Step
    requests: float
    """That will come during it."""
    needs: tuple[Need, ...]
    """Of each guardrail: to catch, in this step alone, harm that was there from its start."""
    caught: Mapping[str, float]
    """Guardrail -> probability that harm since the first step has been caught by the end of this one."""
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class PowerPlan:
    steps: tuple[StepPower, ...]
    objectives: tuple[Need, ...]
    """At the weight with the most information among the steps."""
    warnings: tuple[str, ...]
    """About the rollout as a whole."""


def plan_power(
    plan: AnalysisPlan,
    steps: Sequence[Step],
    *,
    requests_per_second: float,
    interval_seconds: float = 5.0,
    harms: Mapping[str, Harm] | None = None,
    means: Mapping[str, Mean] | None = None,
) -> PowerPlan:
    """What the steps can find at this traffic, and what they would need.

    `harms` and `means` by the name of the guardrail or objective; without one, a doubled rate of 2 percent and, for
    feedback, yes-or-no values to 5 percent of the answers. ValueError names an assumption out of bounds.
    """
    _check(steps, requests_per_second, interval_seconds)
    harms, means = harms or {}, means or {}
    block = max(requests_per_second * interval_seconds, BLOCK_REQUESTS)
    spans: list[tuple[float, float]] = []
    powers = []
    for step in steps:
        spans.append((step.weight / 100.0, step.seconds * requests_per_second))
        powers.append(_step_power(plan, step, spans, harms, per_second=requests_per_second, block=block))
    objectives = [
        need
        for objective in plan.objectives
        if (need := _objective_need(objective, means, steps, requests_per_second=requests_per_second))
    ]
    return PowerPlan(tuple(powers), tuple(objectives), tuple(_plan_warnings(plan, powers, objectives, harms)))


def _step_power(
    plan: AnalysisPlan,
    step: Step,
    spans: Sequence[tuple[float, float]],
    harms: Mapping[str, Harm],
    *,
    per_second: float,
    block: float,
) -> StepPower:
    """The last one of `spans` is the step's own."""
    share, requests = spans[-1]
    needs, caught = [], {}
    for guardrail in plan.guardrails:
        harm = _checked(guardrail.name, harms.get(guardrail.name, Harm()))
        log_needed = eprocesses.log_threshold(guardrail.alpha, tests=_sharing(plan))
        likely, certain = (
            _requests_until(quantile, share, harm, log_needed=log_needed, block=block)
            for quantile in (LIKELY, CERTAIN)
        )
        needs.append(_need(guardrail.name, step.weight, per_second, likely, certain))
        caught[guardrail.name] = chance(spans, harm, log_needed=log_needed, block=block)
    return StepPower(step, requests, tuple(needs), caught, tuple(_step_warnings(step, needs, harms)))


def chance(
    spans: Sequence[tuple[float, float]], harm: Harm, *, log_needed: float, block: float = 100.0
) -> float:
    """Probability that a guardrail has caught harm after spans of (candidate's share in (0, 1), requests).

    First passage of the log evidence, taken as a Brownian motion with the drift and the variance that each request
    adds (Wald 1947; inverse Gaussian law), for the best one of the relative risks in the mixture.
    """
    best = 0.0
    for risk in RELATIVE_RISKS:
        drift = variance = jump = 0.0
        for share, requests in spans:
            step_drift, step_variance, step_jump = _growth(share, harm, risk)
            # A block of n requests holds 1 - 1/n of their information.
            drift += step_drift * requests * (1.0 - 1.0 / block)
            variance += step_variance * requests * (1.0 - 1.0 / block)
            jump = max(jump, step_jump)
        if drift > 0.0 and variance > 0.0:
            best = max(best, _passed(log_needed + MIXTURE_COST + jump / 2.0, drift, variance))
    return best


def _growth(share: float, harm: Harm, risk: float) -> tuple[float, float, float]:
    """Drift and variance of the log evidence per request, and what one failure of the candidate adds."""
    if not 0.0 < share < 1.0:
        return 0.0, 0.0, 0.0
    candidate = share * min(harm.base_rate * harm.relative_risk, 1.0)
    stable = (1.0 - share) * harm.base_rate
    loss = math.log1p(share * (risk - 1.0))
    gain = math.log(risk) - loss
    return candidate * gain - stable * loss, candidate * gain * gain + stable * loss * loss, gain


def _passed(boundary: float, drift: float, variance: float) -> float:
    normal = NormalDist().cdf
    root = math.sqrt(variance)
    tail = normal((-boundary - drift) / root)
    reflected = 2.0 * boundary * drift / variance
    return normal((drift - boundary) / root) + (math.exp(reflected) * tail if reflected < 500.0 else 0.0)


def _requests_until(quantile: float, share: float, harm: Harm, *, log_needed: float, block: float) -> float:
    """Requests of both arms until harm is caught with this probability, in whole blocks; infinite for never."""
    low, high = 1.0, MOST_REQUESTS
    if chance([(share, high)], harm, log_needed=log_needed, block=block) < quantile:
        return math.inf
    while high / low > 1.005:
        middle = math.sqrt(low * high)
        if chance([(share, middle)], harm, log_needed=log_needed, block=block) >= quantile:
            high = middle
        else:
            low = middle
    return math.ceil(high / block + 0.5) * block  # harm begins somewhere between two polls


def _objective_need(
    objective: ObjectivePlan, means: Mapping[str, Mean], steps: Sequence[Step], *, requests_per_second: float
) -> Need | None:
    """What the objective needs at the most telling weight, or None where nothing is known of its spread."""
    mean = means.get(objective.name, Mean() if objective.source is ObjectiveSource.FEEDBACK else None)
    split = [step.weight for step in steps if 0.0 < step.weight < 100.0]
    if mean is None or not split or objective.relative:
        return None
    if not 0.0 < mean.deviation < math.inf:
        raise ValueError(f"{objective.name}: the standard deviation must be above 0, not {mean.deviation:g}")
    if not 0.0 < mean.answered <= 1.0:
        raise ValueError(
            f"the share of the answers with feedback must be above 0 and at most 1, not {mean.answered:g}"
        )
    weight = min(split, key=lambda w: abs(w - 50.0))
    share = weight / 100.0
    goal = objective.margin if objective.test is ObjectiveTest.SUPERIORITY else -objective.margin
    requests = []
    for quantile in (LIKELY, CERTAIN):
        effective = _effective_until(quantile, (mean.gain - goal) / mean.deviation, alpha=objective.alpha)
        values = max(
            effective / (share * (1.0 - share)), objective.min_samples_per_arm / min(share, 1.0 - share)
        )
        requests.append(values / mean.answered)
    return _need(objective.name, weight, requests_per_second, *requests)


def _effective_until(quantile: float, distance: float, *, alpha: float) -> float:
    """Effective sample size from which on the sequence excludes a goal that lies `distance` deviations away."""
    if distance <= 0.0:
        return math.inf
    extra = NormalDist().inv_cdf(quantile)
    low, high = 1.0, MOST_REQUESTS
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        error = 1.0 / math.sqrt(middle)
        if sequences.radius(error, n=middle, alpha=alpha) + extra * error <= distance:
            high = middle
        else:
            low = middle
    return high


def _need(name: str, weight: float, per_second: float, likely: float, certain: float) -> Need:
    return Need(name, weight, likely, certain, likely / per_second, certain / per_second)


def _step_warnings(step: Step, needs: Sequence[Need], harms: Mapping[str, Harm]) -> list[str]:
    if not 0.0 < step.weight < 100.0:
        return []
    return [
        f"{need.name}: {_times(harms.get(need.name))} would be caught in less than 95 of 100 rollouts at "
        f"{step.weight:g}% within {format_duration(step.seconds)}; "
        + (
            f"hold it for {format_duration(need.seconds_certain)}"
            if math.isfinite(need.seconds_certain)
            else "it cannot tell such a small difference at any length"
        )
        for need in needs
        if step.seconds < need.seconds_certain
    ]


def _times(harm: Harm | None) -> str:
    risk = (harm or Harm()).relative_risk
    return "twice the events" if risk == 2.0 else f"{risk:g} times the events"


def _plan_warnings(
    plan: AnalysisPlan, steps: Sequence[StepPower], objectives: Sequence[Need], harms: Mapping[str, Harm]
) -> list[str]:
    warnings = []
    if steps:
        warnings += [
            f"{name}: {_times(harms.get(name))} would be caught in {math.floor(caught * 100)} of 100 rollouts before "
            "the last step ends"
            for name, caught in steps[-1].caught.items()
            if caught < CERTAIN and name not in plan.dry_run
        ]
    length = sum(power.step.seconds for power in steps if power.step.weight > 0.0)
    for need in (need for need in objectives if need.name not in plan.dry_run):
        if not math.isfinite(need.seconds_certain):
            warnings.append(
                f"{need.name}: the assumed difference lies beyond the margin, so it is never proved"
            )
        elif need.seconds_certain > length:
            warnings.append(
                f"{need.name} needs {format_duration(need.seconds_certain)} at {need.weight:g}% and all steps together "
                f"last {format_duration(length)}: the analysis will wait or stay inconclusive"
            )
    known = plan.dry_run.union(need.name for need in objectives)
    why = "not planned, because the spread of its values is not known (or its margin is relative)"
    if not any(0.0 < power.step.weight < 100.0 for power in steps):
        why = "no step has answers of both sides, so it is never decided"
    warnings += [f"{objective.name}: {why}" for objective in plan.objectives if objective.name not in known]
    return warnings


def _sharing(plan: AnalysisPlan) -> int:
    return sum(guardrail.name not in plan.dry_run for guardrail in plan.guardrails)


def _checked(name: str, harm: Harm) -> Harm:
    if not (0.0 < harm.base_rate < 1.0 and harm.relative_risk > 0.0):
        raise ValueError(
            f"{name}: the base rate must lie between 0 and 1 and the relative risk above 0, not {harm.base_rate} and "
            f"{harm.relative_risk}"
        )
    return harm


def _check(steps: Sequence[Step], requests_per_second: float, interval_seconds: float) -> None:
    if not 0.0 < requests_per_second < math.inf or not interval_seconds > 0.0:
        raise ValueError(
            f"traffic must be above 0 requests/s and the interval above 0 s, not {requests_per_second} and "
            f"{interval_seconds}"
        )
    for step in steps:
        if not 0.0 <= step.weight <= 100.0 or step.seconds < 0.0:
            raise ValueError(
                f"a step of weight {step.weight} for {step.seconds} s: weights are 0 to 100, times not below 0"
            )

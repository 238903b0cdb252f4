"""The verdicts on a candidate: what the evidence says of each guardrail, each objective and the two alarms.

This is the whole public face of the statistics: plan with `plan_analysis`, gather with `fold`, store with `to_json` and
`from_json`, judge with `assess`. Everything is valid however often one looks. Explained in docs/statistics.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune_operator.api.adapterdeployment_analysis import Direction, ObjectiveSource, ObjectiveTest
from finetune_operator.api.adapterdeployment_status import Check, CheckKind, CheckPhase, Interval, PerArm
from finetune_operator.api.routes import Arm
from finetune_operator.core import drift, eprocesses, sequences, tallies
from finetune_operator.core.analysis_plans import (
    AnalysisPlan,
    DriftPlan,
    GuardrailPlan,
    ObjectivePlan,
    SampleRatioPlan,
    plan_analysis,
)
from finetune_operator.core.eprocesses import HarmProcess, e_value
from finetune_operator.core.evidence import Evidence, Stratum, fold
from finetune_operator.core.evidence_json import from_json, to_json
from finetune_operator.core.tallies import REQUESTS

__all__ = [
    "AnalysisPlan",
    "Assessment",
    "DriftPlan",
    "Evidence",
    "GuardrailPlan",
    "ObjectivePlan",
    "SampleRatioPlan",
    "assess",
    "fold",
    "from_json",
    "plan_analysis",
    "to_json",
]

SAMPLE_RATIO = "sample-ratio"
DRIFT = "drift"
DIGITS = 5  # significant ones, of numbers in the status
DRIFT_KEYS = 30  # distinct users per side at least: a few heavy ones have a style of their own


@dataclass(frozen=True)
class Assessment:
    """All verdicts as of now."""

    guardrails: tuple[Check, ...]
    objectives: tuple[Check, ...]
    sample_ratio: Check
    drift: Check | None

    @property
    def checks(self) -> tuple[Check, ...]:
        """All of them, for the status."""
        alarms = (self.sample_ratio,) if self.drift is None else (self.sample_ratio, self.drift)
        return (*self.guardrails, *self.objectives, *alarms)


def assess(evidence: Evidence, plan: AnalysisPlan, *, weight: float) -> Assessment:
    """The verdicts by the evidence; `weight` is the percentage in force, for the sample ratio's message.

    Guardrail: Failed is proof of harm and stays, Successful is no proof so far, Inconclusive is nothing to judge.
    Objective: Successful or Failed as soon as the sequence excludes the other. Alarms: Failed is an alarm.
    """
    sharing = sum(guardrail.name not in plan.dry_run for guardrail in plan.guardrails)
    return Assessment(
        guardrails=tuple(
            _guardrail(evidence, guardrail, tests=sharing, dry_run=_dry(plan, guardrail.name))
            for guardrail in plan.guardrails
        ),
        objectives=tuple(
            _objective(evidence, objective, dry_run=_dry(plan, objective.name))
            for objective in plan.objectives
        ),
        sample_ratio=_sample_ratio(evidence, plan.sample_ratio, weight=weight),
        drift=None if plan.drift is None else _drift(evidence, plan.drift),
    )


def _guardrail(evidence: Evidence, plan: GuardrailPlan, *, tests: int, dry_run: bool | None) -> Check:
    stable = evidence.total(Arm.STABLE)
    candidate = tallies.add(evidence.total(Arm.CANDIDATE), evidence.total(Arm.SHADOW))
    n = _per_arm(stable, candidate, REQUESTS)
    failures = _per_arm(stable, candidate, f"events/{plan.name}")
    process = evidence.harm.get(plan.name, HarmProcess())
    needed = eprocesses.log_threshold(plan.alpha, tests=tests)
    rates = f"{_rate(failures.candidate, n.candidate)} of the candidate, {_rate(failures.stable, n.stable)} of stable"
    if process.log_peak >= needed:
        phase, message = CheckPhase.FAILED, f"the candidate does more harm: {plan.name} in {rates}"
    elif not n.candidate or not n.stable:
        phase, message = CheckPhase.INCONCLUSIVE, f"no requests yet of {_sides_without(n)}"
    else:
        phase, message = CheckPhase.SUCCESSFUL, f"no proof of harm: {plan.name} in {rates}"
    # Half a failure and a request more on each side, so that the ratio exists without failures.
    ratio = (failures.candidate + 0.5) / (n.candidate + 1) * (n.stable + 1) / (failures.stable + 0.5)
    return Check(
        name=plan.name,
        kind=CheckKind.GUARDRAIL,
        phase=phase,
        n=n,
        failures=failures,
        estimate=_rounded(ratio) if n.candidate and n.stable else None,
        e_value=_rounded(e_value(process.log_peak)),
        threshold=_rounded(math.exp(needed)),
        dry_run=dry_run,
        message=message,
    )


def _objective(evidence: Evidence, plan: ObjectivePlan, *, dry_run: bool | None) -> Check:
    quantity = f"scores/{plan.metric}" if plan.source is ObjectiveSource.FEEDBACK else plan.metric
    strata = [
        (tallies.moments(s.arm(Arm.STABLE), quantity), tallies.moments(s.arm(Arm.CANDIDATE), quantity))
        for s in evidence.strata
    ]
    plain = sequences.compare(strata)
    n = PerArm(
        stable=plain.stable_n if plain else sum(stable.n for stable, _ in strata),
        candidate=plain.candidate_n if plain else sum(candidate.n for _, candidate in strata),
    )
    missing = plan.min_samples_per_arm - min(n.stable, n.candidate)
    if plain is None or missing > 0:
        return Check(
            name=plan.name,
            kind=CheckKind.OBJECTIVE,
            phase=CheckPhase.INCONCLUSIVE,
            n=n,
            dry_run=dry_run,
            message=f"{plan.metric} has {n.stable} values of stable and {n.candidate} of the candidate; "
            f"each side needs {plan.min_samples_per_arm}",
        )
    half = sequences.radius(plain.standard_error, n=plain.effective_n, alpha=plan.alpha)
    phase, message = _objective_verdict(plan, plain, strata)
    return Check(
        name=plan.name,
        kind=CheckKind.OBJECTIVE,
        phase=phase,
        n=n,
        estimate=_rounded(plain.estimate),
        interval=Interval(low=_rounded(plain.estimate - half), high=_rounded(plain.estimate + half)),
        dry_run=dry_run,
        message=message,
    )


def _objective_verdict(
    plan: ObjectivePlan,
    plain: sequences.Difference,
    strata: list[tuple[sequences.Moments, sequences.Moments]],
) -> tuple[CheckPhase, str]:
    """The verdict on the gain (difference towards better) beyond the goal, which is -margin or +margin."""
    sign = 1.0 if plan.direction is Direction.INCREASE else -1.0
    goal = plan.margin if plan.test is ObjectiveTest.SUPERIORITY else -plan.margin
    compared = plain
    if plan.relative:
        if plain.stable_mean <= 0.0:
            return (
                CheckPhase.INCONCLUSIVE,
                f"the stable mean of {plan.metric} is {plain.stable_mean:.4g}, and a relative margin needs one above "
                "zero; use an absolute margin",
            )
        # candidate - stable > goal * stable, written as candidate - (1 + goal) * stable > 0
        compared = sequences.compare(strata, scale=1.0 + sign * goal) or plain
        goal = 0.0
    gain = sign * compared.estimate - goal
    half = sequences.radius(compared.standard_error, n=compared.effective_n, alpha=plan.alpha)
    wanted = (
        f"{'better' if plan.test is ObjectiveTest.SUPERIORITY else 'worse'} by "
        f"{'more' if plan.test is ObjectiveTest.SUPERIORITY else 'less'} than "
        f"{f'{plan.margin:.3g} of the stable mean' if plan.relative else f'{plan.margin:.4g}'}"
    )
    means = f"{plan.metric} is {plain.candidate_mean:.4g} of the candidate, {plain.stable_mean:.4g} of stable"
    if gain - half > 0.0:
        return CheckPhase.SUCCESSFUL, f"{means}: proved {wanted}"
    if gain + half < 0.0:
        return CheckPhase.FAILED, f"{means}: proved not {wanted}"
    return CheckPhase.INCONCLUSIVE, f"{means}: too early to say whether {wanted}"


def _sample_ratio(evidence: Evidence, plan: SampleRatioPlan, *, weight: float) -> Check:
    log_e = evidence.merged_log_share_evidence + math.fsum(
        stratum.log_share_evidence(sticky=plan.sticky) for stratum in evidence.strata
    )
    split = [stratum for stratum in evidence.strata if 0.0 < stratum.weight < 100.0]
    n = PerArm(
        stable=sum(_units(stratum, Arm.STABLE, plan) for stratum in split),
        candidate=sum(_units(stratum, Arm.CANDIDATE, plan) for stratum in split),
    )
    total = n.stable + n.candidate
    expected = sum(
        stratum.weight / 100.0 * (_units(stratum, Arm.STABLE, plan) + _units(stratum, Arm.CANDIDATE, plan))
        for stratum in split
    )
    units = "distinct users" if plan.sticky else "requests"
    needed = eprocesses.log_threshold(plan.alpha)
    if not total:
        phase, message = CheckPhase.INCONCLUSIVE, f"no {units} yet"
    else:
        phase = CheckPhase.FAILED if log_e >= needed else CheckPhase.SUCCESSFUL
        message = (
            f"{n.candidate / total:.1%} of {total} {units} were the candidate's, {expected / total:.1%} were expected "
            f"(weight now {weight:g}%)"
        )
    return Check(
        name=SAMPLE_RATIO,
        kind=CheckKind.SAMPLE_RATIO,
        phase=phase,
        n=n,
        estimate=_rounded(n.candidate / total) if total else None,
        e_value=_rounded(e_value(log_e)),
        threshold=_rounded(math.exp(needed)),
        message=message,
    )


def _drift(evidence: Evidence, plan: DriftPlan) -> Check:
    strata = [(tallies.lengths(s.arm(Arm.STABLE)), tallies.lengths(_answers(s))) for s in evidence.strata]
    both = [(stable, candidate) for stable, candidate in strata if sum(stable) and sum(candidate)]
    n = PerArm(stable=sum(sum(s) for s, _ in both), candidate=sum(sum(c) for _, c in both))
    if min(n.stable, n.candidate) < plan.min_samples_per_arm:
        return Check(
            name=DRIFT,
            kind=CheckKind.DRIFT,
            phase=CheckPhase.INCONCLUSIVE,
            n=n,
            threshold=plan.max_psi,
            message=f"{n.stable} answers of stable and {n.candidate} of the candidate; "
            f"each side needs {plan.min_samples_per_arm}",
        )
    stable, candidate = drift.standardize(both)
    index = drift.stability_index(stable, candidate)
    bins = sum(bool(s or c) for s, c in zip(stable, candidate, strict=True))
    limit = max(
        plan.max_psi,
        drift.chance_index(bins, stable_n=sum(stable), candidate_n=sum(candidate), alpha=plan.alpha),
    )
    found = [f"other lengths (index {index:.3g}, {limit:.3g} is the limit)"] if index > limit else []
    found += [text for name in plan.signals if (text := _share_change(evidence, name, plan))]
    return Check(
        name=DRIFT,
        kind=CheckKind.DRIFT,
        phase=CheckPhase.FAILED if found else CheckPhase.SUCCESSFUL,
        n=n,
        estimate=_rounded(index),
        threshold=_rounded(limit),
        message="the candidate answers otherwise: " + "; ".join(found)
        if found
        else "the candidate's answers look alike",
    )


def _share_change(evidence: Evidence, signal: str, plan: DriftPlan) -> str | None:
    """What is to be said of a signal whose share has changed by more than chance and by more than matters."""
    strata = []
    for stratum in evidence.strata:
        pair = []
        for tally in (stratum.arm(Arm.STABLE), _answers(stratum)):
            hits = tallies.count(tally, f"events/{signal}")
            pair.append(sequences.Moments(n=tallies.count(tally, REQUESTS), total=hits, squares=hits))
        strata.append((pair[0], pair[1]))
    found = sequences.compare(strata)
    if found is None or min(found.stable_n, found.candidate_n) < plan.min_samples_per_arm:
        return None
    half = sequences.radius(found.standard_error, n=found.effective_n, alpha=plan.alpha)
    if abs(found.estimate) < max(plan.max_share_change, half):
        return None
    return (
        f"{signal} in {found.candidate_mean:.1%} of its answers, {found.stable_mean:.1%} of the stable ones"
    )


def _answers(stratum: Stratum) -> tallies.Tally:
    """What the candidate revision answered, shadow included."""
    return tallies.add(stratum.arm(Arm.CANDIDATE), stratum.arm(Arm.SHADOW))


def _units(stratum: Stratum, arm: Arm, plan: SampleRatioPlan) -> int:
    if not plan.sticky:
        return tallies.count(stratum.arm(arm), REQUESTS)
    return stratum.stable_keys if arm is Arm.STABLE else stratum.candidate_keys


def _per_arm(stable: tallies.Tally, candidate: tallies.Tally, name: str) -> PerArm:
    return PerArm(stable=tallies.count(stable, name), candidate=tallies.count(candidate, name))


def _sides_without(n: PerArm) -> str:
    if not n.stable and not n.candidate:
        return "either side"
    return "the candidate" if n.stable else "the stable revision"


def _rate(failures: int, requests: int) -> str:
    return f"{failures} of {requests} answers" + (f" ({failures / requests:.2%})" if requests else "")


def _dry(plan: AnalysisPlan, name: str) -> bool | None:
    return True if name in plan.dry_run else None


def _rounded(number: float) -> float:
    return float(f"{number:.{DIGITS}g}")

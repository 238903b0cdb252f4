"""The verdicts on a candidate: what the evidence says of each guardrail, each objective and the two alarms.

This is the whole public face of the statistics: plan with `plan_analysis`, gather with `fold`, store with `to_json` and
`from_json`, judge with `assess`. Everything is valid however often one looks. Explained in docs/statistics.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from finetune_operator.api.adapterdeployment_status import Check, CheckKind, CheckPhase, PerArm
from finetune_operator.api.routes import Arm
from finetune_operator.core import eprocesses, tallies
from finetune_operator.core.alarm_checks import DRIFT, SAMPLE_RATIO, assess_drift, assess_sample_ratio
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
from finetune_operator.core.objective_checks import assess_objective
from finetune_operator.core.reports import rounded

__all__ = [
    "DRIFT",
    "SAMPLE_RATIO",
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
            _assess_guardrail(evidence, guardrail, tests=sharing, dry_run=_dry(plan, guardrail.name))
            for guardrail in plan.guardrails
        ),
        objectives=tuple(
            assess_objective(evidence, objective, dry_run=_dry(plan, objective.name))
            for objective in plan.objectives
        ),
        sample_ratio=assess_sample_ratio(evidence, plan.sample_ratio, weight=weight),
        drift=None if plan.drift is None else assess_drift(evidence, plan.drift),
    )


def _assess_guardrail(evidence: Evidence, plan: GuardrailPlan, *, tests: int, dry_run: bool | None) -> Check:
    spans = [_span(stratum, plan.signal) for stratum in evidence.strata]
    # Of the time before the candidate answered, nothing is shown: it is no part of the comparison.
    spans = [span for span in spans if span[0].candidate] or spans
    n = PerArm(stable=sum(n.stable for n, _ in spans), candidate=sum(n.candidate for n, _ in spans))
    failures = PerArm(stable=sum(f.stable for _, f in spans), candidate=sum(f.candidate for _, f in spans))
    process = evidence.harm.get(plan.signal, HarmProcess())
    needed = eprocesses.log_threshold(plan.alpha, tests=tests)
    rates = f"{_rate(failures.candidate, n.candidate)} of the candidate, {_rate(failures.stable, n.stable)} of stable"
    if process.log_peak >= needed:
        phase, message = CheckPhase.FAILED, f"the candidate does more harm: {plan.name} in {rates}"
    elif not n.candidate or not n.stable:
        phase, message = CheckPhase.INCONCLUSIVE, f"no requests yet of {_sides_without(n)}"
    else:
        phase, message = CheckPhase.SUCCESSFUL, f"no proof of harm: {plan.name} in {rates}"
    return Check(
        name=plan.name,
        kind=CheckKind.GUARDRAIL,
        phase=phase,
        n=n,
        failures=failures,
        estimate=rounded(_relative_risk(spans)),
        e_value=rounded(e_value(process.log_peak)),
        threshold=rounded(math.exp(needed)),
        dry_run=dry_run,
        message=message,
    )


def _span(stratum: Stratum, signal: str) -> tuple[PerArm, PerArm]:
    """Answers that were looked at for the signal and those that had it, of one stratum; the candidate's with those of
    the shadow."""
    candidate = tallies.add(stratum.arm(Arm.CANDIDATE), stratum.arm(Arm.SHADOW))
    n, failures = (
        PerArm(stable=tallies.count(stratum.arm(Arm.STABLE), name), candidate=tallies.count(candidate, name))
        for name in (tallies.watched(signal), tallies.event(signal))
    )
    return n, failures


def _relative_risk(spans: Sequence[tuple[PerArm, PerArm]]) -> float | None:
    """The candidate's rate over the stable one's, within strata (Mantel and Haenszel 1959); None without both arms.

    Half an event more on each side, so that it exists without events.
    """
    both = [(n, failures) for n, failures in spans if n.stable and n.candidate]
    if not both:
        return None
    stable, candidate = sum(n.stable for n, _ in both), sum(n.candidate for n, _ in both)
    over = 0.5 * stable / (stable + candidate)
    under = 0.5 * candidate / (stable + candidate)
    over += math.fsum(f.candidate * n.stable / (n.stable + n.candidate) for n, f in both)
    under += math.fsum(f.stable * n.candidate / (n.stable + n.candidate) for n, f in both)
    return over / under


def _sides_without(n: PerArm) -> str:
    if not n.stable and not n.candidate:
        return "either side"
    return "the candidate" if n.stable else "the stable revision"


def _rate(failures: int, requests: int) -> str:
    return f"{failures} of {requests} answers" + (f" ({failures / requests:.2%})" if requests else "")


def _dry(plan: AnalysisPlan, name: str) -> bool | None:
    return True if name in plan.dry_run else None

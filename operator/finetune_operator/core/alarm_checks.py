"""The two built-in alarms: wrong shares of users, and answers that look other than before."""

from __future__ import annotations

import math
from collections.abc import Sequence

from finetune_operator.api.adapterdeployment_status import Check, CheckKind, CheckPhase, PerArm
from finetune_operator.api.routes import Arm
from finetune_operator.core import drift, eprocesses, sequences, tallies
from finetune_operator.core.analysis_plans import DriftPlan, SampleRatioPlan
from finetune_operator.core.eprocesses import e_value
from finetune_operator.core.evidence import Evidence, Stratum
from finetune_operator.core.reports import rounded

SAMPLE_RATIO = "sample-ratio"
DRIFT = "drift"
LENGTHS = "completion_tokens"


def assess_sample_ratio(evidence: Evidence, plan: SampleRatioPlan, *, weight: float) -> Check:
    """Failed is an alarm: something other than the assignment decides who is counted on which side."""
    keys = evidence.keys
    total = keys.stable + keys.candidate
    n = PerArm(stable=keys.stable, candidate=keys.candidate)
    units = "users" if plan.sticky else "requests"
    needed = eprocesses.log_threshold(plan.alpha)
    if not total:
        n = PerArm(
            stable=tallies.count(evidence.total(Arm.STABLE), tallies.REQUESTS),
            candidate=tallies.count(evidence.total(Arm.CANDIDATE), tallies.REQUESTS),
        )
        phase, message = (
            CheckPhase.INCONCLUSIVE,
            f"no {units} compared yet; that begins a minute after a change of the weight",
        )
    else:
        phase = CheckPhase.FAILED if keys.log_evidence >= needed else CheckPhase.SUCCESSFUL
        message = (
            f"{keys.candidate / total:.1%} of {total} assigned {units} came to the candidate, "
            f"{keys.expected_candidate / total:.1%} should have (weight now {weight:g}%)"
        )
    return Check(
        name=SAMPLE_RATIO,
        kind=CheckKind.SAMPLE_RATIO,
        phase=phase,
        n=n,
        estimate=rounded(keys.candidate / total) if total else None,
        expected=rounded(keys.expected_candidate / total) if total else None,
        e_value=rounded(e_value(keys.log_evidence)),
        threshold=rounded(math.exp(needed)),
        message=message,
    )


def assess_drift(evidence: Evidence, plan: DriftPlan) -> Check:
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
    effect = min(_design_effect(evidence), n.candidate)
    stable, candidate = drift.standardize(both)
    index, limit = _shift(stable, candidate, (sum(stable), sum(candidate)), plan, effect=effect)
    found = [f"other lengths (index {index:.3g}, {limit:.3g} is the limit)"] if index > limit else []
    found += [text] if (text := _word_change(evidence, plan, n, effect=effect)) else []
    found += [text for name in plan.signals if (text := _share_change(evidence, name, plan, effect=effect))]
    return Check(
        name=DRIFT,
        kind=CheckKind.DRIFT,
        phase=CheckPhase.FAILED if found else CheckPhase.SUCCESSFUL,
        n=n,
        estimate=rounded(index),
        threshold=rounded(limit),
        message="the candidate answers otherwise: " + "; ".join(found)
        if found
        else "the candidate's answers look alike",
    )


def _shift(
    stable: Sequence[float],
    candidate: Sequence[float],
    draws: tuple[float, float],
    plan: DriftPlan,
    *,
    effect: float,
) -> tuple[float, float]:
    """Stability index of two histograms of so many draws, and its limit: what matters, and what chance does."""
    bins = sum(bool(s or c) for s, c in zip(stable, candidate, strict=True))
    chance = drift.chance_index(bins, stable_n=draws[0], candidate_n=draws[1], alpha=plan.alpha)
    return drift.stability_index(stable, candidate), max(plan.max_psi, chance * effect)


def _word_change(evidence: Evidence, plan: DriftPlan, n: PerArm, *, effect: float) -> str | None:
    """What is to be said of first words that are distributed otherwise. The words of one answer hang together, so each
    answer is taken for a single draw: chance does less than that."""
    strata = [(tallies.words(s.arm(Arm.STABLE)), tallies.words(_answers(s))) for s in evidence.strata]
    stable, candidate = drift.standardize(strata)
    if not stable:
        return None
    index, limit = _shift(stable, candidate, (n.stable, n.candidate), plan, effect=effect)
    return f"other words (index {index:.3g}, {limit:.3g} is the limit)" if index > limit else None


def _design_effect(evidence: Evidence) -> float:
    """Of the mean length. Users have styles of their own, and a few who ask most would look like drift. To divide a
    chi-square by a design effect: Rao and Scott 1984, "On chi-squared tests for multiway contingency tables with cell
    proportions estimated from survey data", Annals of Statistics 12. A shadow has the stable revision's users, and no
    part in it.
    """
    found = sequences.compare(
        [
            (tallies.moments(s.arm(Arm.STABLE), LENGTHS), tallies.moments(s.arm(Arm.CANDIDATE), LENGTHS))
            for s in evidence.strata
        ]
    )
    return 1.0 if found is None else found.design_effect


def _share_change(evidence: Evidence, signal: str, plan: DriftPlan, *, effect: float) -> str | None:
    """What is to be said of a signal whose share has changed by more than chance and by more than matters."""
    strata = []
    for stratum in evidence.strata:
        pair = []
        for tally in (stratum.arm(Arm.STABLE), _answers(stratum)):
            hits = tallies.count(tally, tallies.event(signal))
            looked_at = tallies.count(tally, tallies.watched(signal))
            pair.append(sequences.Moments(n=looked_at, total=hits, squares=hits))
        strata.append((pair[0], pair[1]))
    found = sequences.compare(strata)
    if found is None or min(found.stable_n, found.candidate_n) < plan.min_samples_per_arm:
        return None
    error = found.standard_error * math.sqrt(effect)
    half = sequences.radius(error, n=found.effective_n / effect, alpha=plan.alpha)
    if abs(found.estimate) < max(plan.max_share_change, half):
        return None
    name = signal.partition(":")[0]
    return f"{name} in {found.candidate_mean:.1%} of its answers, {found.stable_mean:.1%} of the stable ones"


def _answers(stratum: Stratum) -> tallies.Tally:
    """What the candidate revision answered, shadow included."""
    return tallies.add(stratum.arm(Arm.CANDIDATE), stratum.arm(Arm.SHADOW))

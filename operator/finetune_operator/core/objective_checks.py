"""Objectives: whether the candidate's mean is not worse, or better, by a confidence sequence."""

from __future__ import annotations

import math

from finetune_operator.api.adapterdeployment_analysis import Direction, ObjectiveTest
from finetune_operator.api.adapterdeployment_status import Check, CheckKind, CheckPhase, Interval, PerArm
from finetune_operator.api.routes import Arm
from finetune_operator.core import sequences, tallies
from finetune_operator.core.analysis_plans import ObjectivePlan
from finetune_operator.core.evidence import Evidence
from finetune_operator.core.reports import rounded

# Design effect from which on a verdict tells of it. Chance alone makes it 1.5 at times, with 32 groups.
NOTABLE_EFFECT = 2.0


def assess_objective(evidence: Evidence, plan: ObjectivePlan, *, dry_run: bool | None) -> Check:
    strata = [
        (
            tallies.moments(s.arm(Arm.STABLE), plan.quantity),
            tallies.moments(s.arm(Arm.CANDIDATE), plan.quantity),
        )
        for s in evidence.strata
    ]
    plain = sequences.compare(strata)
    n = PerArm(
        stable=plain.stable_n if plain else sum(stable.n for stable, _ in strata),
        candidate=plain.candidate_n if plain else sum(candidate.n for _, candidate in strata),
    )
    lacking = None
    if plain is None or min(n.stable, n.candidate) < plan.min_samples_per_arm:
        lacking = f"each side needs {plan.min_samples_per_arm}"
    elif math.isinf(plain.design_effect):
        lacking = "on one side a single user, or very few, gave all of them: nothing tells users and revisions apart"
    if plain is None or lacking:
        return Check(
            name=plan.name,
            kind=CheckKind.OBJECTIVE,
            phase=CheckPhase.INCONCLUSIVE,
            n=n,
            dry_run=dry_run,
            message=f"{plan.metric} has {n.stable} values of stable and {n.candidate} of the candidate; {lacking}",
        )
    half = sequences.radius(plain.standard_error, n=plain.effective_n, alpha=plan.alpha)
    phase, message = _verdict(plan, plain, strata)
    if plain.design_effect >= NOTABLE_EFFECT:
        independent = round((n.stable + n.candidate) / plain.design_effect)
        message += f"; values of one user are alike, and these say as much as {independent} independent ones"
    return Check(
        name=plan.name,
        kind=CheckKind.OBJECTIVE,
        phase=phase,
        n=n,
        estimate=rounded(plain.estimate),
        interval=Interval(low=rounded(plain.estimate - half), high=rounded(plain.estimate + half)),
        dry_run=dry_run,
        message=message,
    )


def _verdict(
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

"""From evidence to the checks in the status: phases, numbers and words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from finetune_operator.api.adapterdeployment_analysis import (
    AnalysisSpec,
    Direction,
    ObjectiveSource,
    ObjectiveTest,
)
from finetune_operator.api.adapterdeployment_status import Check, CheckPhase, PerArm
from finetune_operator.api.routes import GROUPS, Arm, Moments, RouterCounters, SignalEvent
from finetune_operator.core import analysis_plans
from finetune_operator.core.statistics import (
    AnalysisPlan,
    DriftPlan,
    GuardrailPlan,
    ObjectivePlan,
    assess,
    from_json,
    plan_analysis,
    to_json,
)
from tests.unit.statistics.fleets import answer, arm_counters, both, folded

START = both((0, 0), (0, 0))


def guardrail(*told: tuple[tuple[int, int], tuple[int, int]], plan: AnalysisPlan | None = None) -> Check:
    evidence = folded(None, START, plan=plan)
    for stable, candidate in told:
        evidence = folded(evidence, both(stable, candidate), plan=plan)
    return assess(evidence, plan or AnalysisPlan(), weight=10.0).guardrails[0]


def test_proof_of_harm_fails_the_guardrail_and_says_how_much() -> None:
    check = guardrail(((90, 1), (10, 5)))
    assert check.phase is CheckPhase.FAILED
    assert (check.n, check.failures) == (PerArm(stable=90, candidate=10), PerArm(stable=1, candidate=5))
    assert check.threshold == 100
    assert check.e_value is not None
    assert check.e_value > 100
    assert check.estimate == pytest.approx((5.5 / 10) / (1.5 / 90), rel=1e-4)
    assert check.message == (
        "the candidate does more harm: errors in 5 of 10 answers (50.00%) of the candidate, 1 of 90 answers (1.11%) "
        "of stable"
    )


def test_a_breach_stays_a_breach_when_better_times_follow() -> None:
    check = guardrail(((90, 1), (10, 5)), ((9_000, 180), (1_000, 6)), ((90_000, 1_800), (10_000, 6)))
    assert check.phase is CheckPhase.FAILED


@pytest.mark.parametrize(
    ("stable", "candidate", "phase", "message"),
    [
        ((0, 0), (0, 0), CheckPhase.INCONCLUSIVE, "no requests yet of either side"),
        ((50, 1), (0, 0), CheckPhase.INCONCLUSIVE, "no requests yet of the candidate"),
        ((0, 0), (50, 50), CheckPhase.INCONCLUSIVE, "no requests yet of the stable revision"),
    ],
)
def test_without_both_sides_nothing_is_said(
    stable: tuple[int, int], candidate: tuple[int, int], phase: CheckPhase, message: str
) -> None:
    check = guardrail((stable, candidate))
    assert (check.phase, check.message, check.estimate) == (phase, message, None)


def slow(threshold: float) -> AnalysisPlan:
    return AnalysisPlan(guardrails=(GuardrailPlan("slow", SignalEvent.TTFT_OVER, threshold),))


def test_a_guardrail_with_another_threshold_begins_anew() -> None:
    tight, wide = slow(0.1), slow(60.0)

    def told(stable: int, candidate: int, tight_events: int, wide_events: int) -> RouterCounters:
        counted = {tight.signals[0]: tight_events, wide.signals[0]: wide_events}
        return answer(
            arm_counters(Arm.STABLE, requests=stable, events={tight.signals[0]: 1}),
            arm_counters(Arm.CANDIDATE, requests=candidate, events=counted),
        )

    evidence = folded(None, told(0, 0, 0, 0), plan=tight)
    evidence = folded(evidence, told(1_000, 100, 90, 0), plan=tight)
    assert assess(evidence, tight, weight=10).guardrails[0].phase is CheckPhase.FAILED
    evidence = folded(evidence, told(1_000, 100, 90, 0), plan=wide)
    check = assess(evidence, wide, weight=10).guardrails[0]
    assert (check.phase, check.n, check.e_value) == (
        CheckPhase.INCONCLUSIVE,
        PerArm(stable=0, candidate=0),
        1.0,
    )
    evidence = folded(evidence, told(2_000, 200, 90, 1), plan=wide)
    check = assess(evidence, wide, weight=10).guardrails[0]
    assert (check.n, check.failures) == (PerArm(stable=1_000, candidate=100), PerArm(stable=0, candidate=1))
    assert from_json(to_json(evidence)) == evidence
    back = assess(folded(evidence, told(2_000, 200, 90, 1), plan=tight), tight, weight=10).guardrails[0]
    assert back.phase is CheckPhase.INCONCLUSIVE, "what was given up is not remembered"


def test_a_guardrail_that_is_added_counts_from_then_on_and_leaves_the_others() -> None:
    both_plans = AnalysisPlan(guardrails=(GuardrailPlan("errors"), *slow(2.0).guardrails))
    evidence = folded(folded(None, START), both((1_000, 3), (100, 1)))
    evidence = folded(evidence, both((1_000, 3), (100, 1)), plan=both_plans)
    evidence = folded(evidence, both((1_500, 3), (150, 1)), plan=both_plans)
    errors, added = assess(evidence, both_plans, weight=10).guardrails
    assert (errors.n, errors.failures) == (
        PerArm(stable=1_500, candidate=150),
        PerArm(stable=3, candidate=1),
    )
    assert added.n == PerArm(stable=500, candidate=50)


def test_equal_rates_are_no_proof() -> None:
    check = guardrail(((9_000, 180), (1_000, 20)))
    assert check.phase is CheckPhase.SUCCESSFUL
    assert check.estimate == pytest.approx(1.0, abs=0.05)


def test_the_shadow_is_judged_before_any_user_is_served() -> None:
    evidence = folded(folded(None, START), answer(
        arm_counters(Arm.STABLE, requests=500, errors=5), arm_counters(Arm.SHADOW, requests=100, errors=30)
    ), weight=0.0)  # fmt: skip
    check = assess(evidence, AnalysisPlan(), weight=0.0).guardrails[0]
    assert (check.phase, check.n) == (CheckPhase.FAILED, PerArm(stable=500, candidate=100))


def test_guardrails_share_alpha_and_dry_runs_take_no_part_of_it() -> None:
    three = tuple(GuardrailPlan(name=name) for name in ("errors", "slow", "empty"))
    checks = assess(folded(None, START), AnalysisPlan(guardrails=three), weight=10.0).guardrails
    assert [check.threshold for check in checks] == [300, 300, 300]
    plan = AnalysisPlan(guardrails=three, dry_run=frozenset({"slow"}))
    checks = assess(folded(None, START, plan=plan), plan, weight=10.0).guardrails
    assert [(check.threshold, check.dry_run) for check in checks] == [(200, None), (200, True), (200, None)]


def test_the_time_before_the_candidate_answered_is_not_compared() -> None:
    """Stable failed a lot before, and little since: over all of it the candidate would look good."""
    evidence = folded(folded(None, START), both((10_000, 5_000), (0, 0)), weight=0.0)
    evidence = folded(evidence, both((10_900, 5_009), (100, 4)), weight=10.0)
    check = assess(evidence, AnalysisPlan(), weight=10.0).guardrails[0]
    assert (check.n, check.failures) == (PerArm(stable=900, candidate=100), PerArm(stable=9, candidate=4))
    assert check.estimate == pytest.approx((4.5 / 100) / (9.5 / 900), rel=1e-4)


def moments(values: Sequence[float]) -> Moments:
    return Moments(n=len(values), sum=sum(values), sum_squares=sum(value * value for value in values))


def feedback(stable: Sequence[float], candidate: Sequence[float], plan: ObjectivePlan) -> Check:
    told = answer(
        arm_counters(Arm.STABLE, scores={"helpful": moments(stable)}),
        arm_counters(Arm.CANDIDATE, scores={"helpful": moments(candidate)}),
    )
    analysis = AnalysisPlan(objectives=(plan,))
    evidence = folded(folded(None, START, plan=analysis), told, plan=analysis)
    return assess(evidence, analysis, weight=10.0).objectives[0]


def latency(stable: Sequence[float], candidate: Sequence[float], plan: ObjectivePlan) -> Check:
    told = answer(
        arm_counters(Arm.STABLE, seconds=moments(stable)),
        arm_counters(Arm.CANDIDATE, seconds=moments(candidate)),
    )
    analysis = AnalysisPlan(objectives=(plan,))
    evidence = folded(folded(None, START, plan=analysis), told, plan=analysis)
    return assess(evidence, analysis, weight=10.0).objectives[0]


def votes(rate: float, n: int) -> list[float]:
    return [1.0] * round(rate * n) + [0.0] * (n - round(rate * n))


HELPFUL = ObjectivePlan(name="thumbs", metric="helpful")
FASTER = ObjectivePlan(
    name="seconds", metric="seconds", source=ObjectiveSource.ROUTER, direction=Direction.DECREASE, margin=0.1
)


@pytest.mark.parametrize(
    ("stable", "candidate", "changes", "phase"),
    [
        (0.8, 0.8, {"margin": 0.05}, CheckPhase.SUCCESSFUL),
        (0.8, 0.7, {"margin": 0.05}, CheckPhase.FAILED),
        (0.8, 0.8, {"margin": 0.001}, CheckPhase.INCONCLUSIVE),
        (0.8, 0.85, {"test": ObjectiveTest.SUPERIORITY, "margin": 0.0}, CheckPhase.SUCCESSFUL),
        (0.8, 0.85, {"test": ObjectiveTest.SUPERIORITY, "margin": 0.1}, CheckPhase.FAILED),
        (0.2, 0.3, {"direction": Direction.DECREASE, "margin": 0.02}, CheckPhase.FAILED),
        (0.2, 0.1, {"direction": Direction.DECREASE, "margin": 0.02}, CheckPhase.SUCCESSFUL),
        (0.8, 0.76, {"margin": 0.1, "relative": True}, CheckPhase.SUCCESSFUL),
        (0.8, 0.7, {"margin": 0.1, "relative": True}, CheckPhase.FAILED),
        (0.5, 0.6, {"direction": Direction.DECREASE, "margin": 0.1, "relative": True}, CheckPhase.FAILED),
        (
            0.5,
            0.52,
            {"direction": Direction.DECREASE, "margin": 0.1, "relative": True},
            CheckPhase.SUCCESSFUL,
        ),
    ],
)
def test_an_objective_is_decided_by_its_margin(
    stable: float, candidate: float, changes: dict[str, Any], phase: CheckPhase
) -> None:
    check = feedback(votes(stable, 20_000), votes(candidate, 20_000), replace(HELPFUL, **changes))
    assert check.phase is phase, check.message
    assert check.estimate == pytest.approx(candidate - stable, abs=1e-4)
    assert check.interval is not None
    assert check.interval.low is not None
    assert check.interval.high is not None
    assert check.interval.low < candidate - stable < check.interval.high


def test_an_objective_waits_for_its_least_samples() -> None:
    check = feedback(votes(0.9, 5_000), votes(0.1, 199), HELPFUL)
    assert (check.phase, check.message) == (
        CheckPhase.INCONCLUSIVE,
        "helpful has 5000 values of stable and 199 of the candidate; each side needs 200",
    )
    assert feedback(votes(0.9, 5_000), votes(0.1, 200), HELPFUL).phase is CheckPhase.FAILED


def by_users(rates: Sequence[float], groups: Sequence[int], *, each: int) -> Moments:
    """Yes-or-no votes, `each` of a user, of whom each has a rate and a group."""
    sums = [[0, 0.0] for _ in range(GROUPS)]
    for rate, group in zip(rates, groups, strict=True):
        sums[group][0] += each
        sums[group][1] += round(rate * each)
    total = sum(yes for _, yes in sums)
    return Moments(
        n=each * len(rates),
        sum=total,
        sum_squares=total,
        groups=tuple((int(n), yes) for n, yes in sums),
    )


def test_many_votes_of_few_users_prove_little_and_the_message_says_why() -> None:
    """Each of 32 users on each side likes everything or nothing; four more of the candidate's like nothing."""
    stable, candidate = [1.0, 0.0] * 16, [1.0, 1.0, 0.0, 0.0] * 7 + [0.0] * 4

    def check(groups: bool) -> Check:
        moments = [by_users(rates, range(32), each=500) for rates in (stable, candidate)]
        if not groups:
            moments = [each.model_copy(update={"groups": ()}) for each in moments]
        plan = AnalysisPlan(objectives=(HELPFUL,))
        told = answer(
            arm_counters(Arm.STABLE, scores={"helpful": moments[0]}),
            arm_counters(Arm.CANDIDATE, scores={"helpful": moments[1]}),
        )
        evidence = folded(folded(None, START, plan=plan), told, plan=plan)
        assert from_json(to_json(evidence)) == evidence
        return assess(evidence, plan, weight=10.0).objectives[0]

    assert check(groups=False).phase is CheckPhase.FAILED
    found = check(groups=True)
    assert found.phase is CheckPhase.INCONCLUSIVE
    assert found.n == PerArm(stable=16_000, candidate=16_000)
    assert found.message is not None
    said = re.search(
        r"too early to say .*; values of one user are alike, and these say as much as (\d+) independent ones$",
        found.message,
    )
    assert said
    assert int(said[1]) == pytest.approx(64, rel=0.1), "as many as there are users"


def test_values_of_a_single_user_prove_nothing() -> None:
    plan = AnalysisPlan(objectives=(HELPFUL,))
    told = answer(
        arm_counters(Arm.STABLE, scores={"helpful": by_users([0.9, 0.8] * 16, range(32), each=500)}),
        arm_counters(Arm.CANDIDATE, scores={"helpful": by_users([0.2], [5], each=500)}),
    )
    evidence = folded(folded(None, START, plan=plan), told, plan=plan)
    check = assess(evidence, plan, weight=10.0).objectives[0]
    assert (check.phase, check.interval, check.message) == (
        CheckPhase.INCONCLUSIVE,
        None,
        "helpful has 16000 values of stable and 500 of the candidate; on one side a single user, or very few, gave all "
        "of them: nothing tells users and revisions apart",
    )


def test_a_mean_that_moves_over_many_steps_is_no_effect() -> None:
    """32 steps of 3 percent each, while votes fall from 0.9 to 0.7 on both sides alike: more spans than are kept."""
    plan = AnalysisPlan(objectives=(ObjectivePlan(name="thumbs", metric="helpful"),))
    votes = dict.fromkeys((Arm.STABLE, Arm.CANDIDATE), (0, 0.0))
    evidence = folded(None, START, plan=plan)
    for step in range(1, 33):
        weight = 3 * step
        for arm, given in ((Arm.STABLE, 100 - weight), (Arm.CANDIDATE, weight)):
            n, total = votes[arm]
            votes[arm] = n + 10 * given, total + 10 * given * (0.9 - step / 160)
        told = answer(
            *(
                arm_counters(arm, scores={"helpful": Moments(n=n, sum=total, sum_squares=total)})
                for arm, (n, total) in votes.items()
            )
        )
        evidence = folded(evidence, told, plan=plan, weight=weight)
    assert assess(evidence, plan, weight=96).objectives[0].estimate == pytest.approx(0, abs=0.005)


def test_latency_of_the_router_is_an_objective() -> None:
    rng = np.random.default_rng(51)
    stable, same = rng.lognormal(0, 0.5, 20_000).tolist(), rng.lognormal(0, 0.5, 20_000).tolist()
    slower = rng.lognormal(0.3, 0.5, 20_000).tolist()
    assert latency(stable, same, FASTER).phase is CheckPhase.SUCCESSFUL
    check = latency(stable, slower, FASTER)
    assert check.phase is CheckPhase.FAILED
    assert check.message is not None
    assert check.message.endswith("proved not worse by less than 0.1")


def test_a_relative_margin_needs_a_mean_above_zero() -> None:
    check = feedback([-1.0, 0.0] * 500, [-1.0, 0.0] * 500, replace(HELPFUL, relative=True))
    assert check.phase is CheckPhase.INCONCLUSIVE
    assert check.message is not None
    assert "use an absolute margin" in check.message


def test_a_non_inferior_candidate_is_rarely_rejected_and_an_inferior_one_rarely_accepted() -> None:
    """At the very margin, looked at every 500 values: each error at most alpha, promoted or rejected."""
    seed, rollouts = 52, 150
    rng = np.random.default_rng(seed)
    plan = AnalysisPlan(objectives=(replace(HELPFUL, margin=0.05),))
    verdicts = []
    for _ in range(rollouts):
        evidence = folded(None, START, plan=plan)
        sums = np.cumsum(rng.binomial(500, [0.8, 0.75], (20, 2)), axis=0).tolist()
        for look, (stable, candidate) in enumerate(sums, start=1):
            told = answer(
                arm_counters(
                    Arm.STABLE, scores={"helpful": Moments(n=500 * look, sum=stable, sum_squares=stable)}
                ),
                arm_counters(
                    Arm.CANDIDATE,
                    scores={"helpful": Moments(n=500 * look, sum=candidate, sum_squares=candidate)},
                ),
            )
            evidence = folded(evidence, told, plan=plan)
            phase = assess(evidence, plan, weight=50.0).objectives[0].phase
            if phase is not CheckPhase.INCONCLUSIVE:
                break
        verdicts.append(phase)
    wrong = {phase: verdicts.count(phase) / rollouts for phase in (CheckPhase.SUCCESSFUL, CheckPhase.FAILED)}
    print(f"seed {seed}: at the margin {wrong}")
    assert sum(wrong.values()) <= 0.05 + 3 * (0.05 * 0.95 / rollouts) ** 0.5


def test_a_plan_is_what_the_spec_says() -> None:
    spec = AnalysisSpec.model_validate(
        {
            "guardrails": [
                {"name": "errors", "event": "error", "alpha": 0.02},
                {"name": "slow", "event": "ttft_over", "threshold": "800ms"},
                {"name": "says-no", "event": "refusal"},
            ],
            "objectives": [{"name": "thumbs", "metric": "helpful", "test": "Superiority", "margin": 0.01}],
            "drift": {"maxPsi": 0.3},
            "dryRun": ["slow"],
        }
    )
    plan = plan_analysis(spec, sticky=False)
    assert [(g.name, g.threshold, g.alpha) for g in plan.guardrails] == [
        ("errors", None, 0.02), ("slow", 0.8, 0.01), ("says-no", None, 0.01),
    ]  # fmt: skip
    assert plan.objectives == (replace(HELPFUL, test=ObjectiveTest.SUPERIORITY, margin=0.01),)
    assert plan.drift is not None
    assert (plan.drift.max_psi, plan.drift.signals) == (0.3, ("truncated", "says-no:refusal"))
    assert (plan.sample_ratio.sticky, plan.sample_ratio.alpha) == (False, 0.001)
    assert plan.dry_run == {"slow"}
    assert plan_analysis(AnalysisSpec()).drift is None


@pytest.mark.parametrize("text", ["2", "2m", "-1s", "1.5s", "", "s", "٣s"])
def test_times_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="write it as 800ms or 2s"):
        analysis_plans.parse_seconds(text)


def test_all_checks_have_names_of_their_own() -> None:
    plan = AnalysisPlan(objectives=(HELPFUL,), drift=DriftPlan())
    checks = assess(folded(None, START), plan, weight=10.0).checks
    assert [check.name for check in checks] == ["errors", "thumbs", "sample-ratio", "drift"]
    assert all(check.phase is CheckPhase.INCONCLUSIVE for check in checks)

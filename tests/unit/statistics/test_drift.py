"""Answers that look other than before raise a moderate alarm, and chance does not."""

from __future__ import annotations

import math

import numpy as np
import pytest

from finetune_operator.api.adapterdeployment_status import Check, CheckPhase
from finetune_operator.api.routes import Arm
from finetune_operator.core import drift
from finetune_operator.core.statistics import AnalysisPlan, DriftPlan, assess
from tests.unit.statistics.fleets import answer, arm_counters, folded, key_sample

PLAN = AnalysisPlan(drift=DriftPlan())


def lengths(rng: np.random.Generator, n: int, *, mean: float = 4.5, sigma: float = 0.7) -> list[int]:
    """Histogram of log-normal token counts, in the router's bins."""
    tokens = np.exp(rng.normal(mean, sigma, n)).astype(int).tolist()
    bins = [min(int(count).bit_length(), 15) for count in tokens]
    return [bins.count(index) for index in range(16)]


def check_of(
    stable: list[int],
    candidate: list[int],
    *,
    events: tuple[dict[str, int], dict[str, int]] = ({}, {}),
    arm: Arm = Arm.CANDIDATE,
    keys: int = 0,
) -> Check:
    evidence = folded(None, answer(), plan=PLAN)
    told = answer(
        arm_counters(Arm.STABLE, requests=sum(stable), lengths=stable, events=events[0]),
        arm_counters(arm, requests=sum(candidate), lengths=candidate, events=events[1]),
        samples=[key_sample(range(10_000, 10_000 + keys), range(keys))] if keys else [],
    )
    check = assess(folded(evidence, told, plan=PLAN), PLAN, weight=10.0).drift
    assert check is not None
    return check


# The sum by hand for (50, 50) and (30, 70), with half an answer more in each bin.
def test_the_index_by_hand() -> None:
    p, q = 30.5 / 101, 70.5 / 101
    assert drift.stability_index([50, 50], [30, 70]) == pytest.approx(
        (p - 0.5) * math.log(p / 0.5) + (q - 0.5) * math.log(q / 0.5)
    )
    assert drift.stability_index([10, 0, 20], [10, 0, 20]) == 0


# scipy 1.17.1: chi2.ppf(0.999, 15) and chi2.ppf(0.999, 4).
@pytest.mark.parametrize(("bins", "quantile"), [(16, 37.69729821835383), (5, 18.46682695290317)])
def test_what_chance_can_do_follows_chi_square(bins: int, quantile: float) -> None:
    found = drift.chance_index(bins, stable_n=1_000, candidate_n=1_000, alpha=0.001)
    assert found == pytest.approx(quantile * 2 / 1_000, rel=0.02)


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_independent_answers_raise_no_alarm_at_any_look(share: float) -> None:
    seed, rollouts, alarms = 41, 40, 0
    rng = np.random.default_rng(seed)
    for _ in range(rollouts):
        stable, candidate = np.zeros(16, int), np.zeros(16, int)
        for _ in range(25):
            stable += lengths(rng, int(400 * (1 - share)))
            candidate += lengths(rng, int(400 * share))
            check = check_of(stable.tolist(), candidate.tolist())
            if check.phase is CheckPhase.FAILED:
                alarms += 1
                break
    print(f"seed {seed}, share {share:.0%}: {alarms} alarms in {rollouts} rollouts")
    assert alarms == 0


def test_a_candidate_that_answers_half_as_long_raises_the_alarm() -> None:
    rng = np.random.default_rng(42)
    check = check_of(lengths(rng, 5_000), lengths(rng, 600, mean=4.5 - math.log(2)))
    assert check.phase is CheckPhase.FAILED
    assert check.message is not None
    assert "other lengths" in check.message


def test_the_shadow_is_looked_at_before_any_user_is() -> None:
    rng = np.random.default_rng(43)
    assert check_of(lengths(rng, 900), lengths(rng, 900, mean=6.0), arm=Arm.SHADOW).phase is CheckPhase.FAILED


def test_other_shares_of_refusals_raise_the_alarm_and_small_changes_do_not() -> None:
    rng = np.random.default_rng(44)
    stable, candidate = lengths(rng, 5_000), lengths(rng, 1_000)
    alarm = check_of(stable, candidate, events=({"refusal": 100}, {"refusal": 120}))
    assert alarm.phase is CheckPhase.FAILED
    assert alarm.message == (
        "the candidate answers otherwise: refusal in 12.0% of its answers, 2.0% of the stable ones"
    )
    assert (
        check_of(stable, candidate, events=({"refusal": 100}, {"refusal": 60})).phase is CheckPhase.SUCCESSFUL
    )


def test_too_few_answers_or_users_say_nothing() -> None:
    rng = np.random.default_rng(45)
    few = check_of(lengths(rng, 5_000), lengths(rng, 400, mean=6.0))
    assert (few.phase, few.message) == (
        CheckPhase.INCONCLUSIVE,
        "5000 answers of stable and 400 of the candidate; each side needs 500",
    )
    users = check_of(lengths(rng, 5_000), lengths(rng, 600, mean=6.0), keys=12)
    assert users.phase is CheckPhase.INCONCLUSIVE
    assert users.message is not None
    assert "12 users" in users.message


def test_lengths_that_change_with_the_hour_are_no_drift() -> None:
    """Short answers at 5 percent, long ones at 50: pooled, the candidate would look like night."""
    rng = np.random.default_rng(46)
    short = (lengths(rng, 9_500), lengths(rng, 500))
    long = (lengths(rng, 5_000, mean=6.0), lengths(rng, 5_000, mean=6.0))
    pooled = [[a + b for a, b in zip(short[i], long[i], strict=True)] for i in range(2)]
    assert drift.stability_index(pooled[0], pooled[1]) > 0.25
    stable, candidate = drift.standardize([short, long])
    assert drift.stability_index(stable, candidate) < 0.02
    assert sum(stable) < 14_500

"""Answers that look other than before raise a moderate alarm, and chance does not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from finetune_operator.api.adapterdeployment_status import Check, CheckPhase
from finetune_operator.api.routes import GROUPS, Arm, ArmCounters, Moments
from finetune_operator.core import drift
from finetune_operator.core.statistics import AnalysisPlan, DriftPlan, assess
from tests.unit.statistics.fleets import ALIAS, REVISIONS, answer, arm_counters, folded

Ints = NDArray[np.int64]
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
) -> Check:
    evidence = folded(None, answer(), plan=PLAN)
    told = answer(
        arm_counters(Arm.STABLE, requests=sum(stable), lengths=stable, events=events[0]),
        arm_counters(arm, requests=sum(candidate), lengths=candidate, events=events[1]),
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


def test_too_few_answers_say_nothing() -> None:
    rng = np.random.default_rng(45)
    few = check_of(lengths(rng, 5_000), lengths(rng, 400, mean=6.0))
    assert (few.phase, few.message) == (
        CheckPhase.INCONCLUSIVE,
        "5000 answers of stable and 400 of the candidate; each side needs 500",
    )


@pytest.mark.parametrize(
    ("seed", "users", "exponent", "shorter", "alarms"),
    [(47, 200, 1.2, 1.0, (0, 1)), (48, 12, 0.0, 1.0, (0, 1)), (49, 2_000, 0.0, 0.5, (20, 20))],
    ids=["few ask most", "a dozen", "half as long"],
)
def test_styles_of_users_are_no_drift(
    seed: int, users: int, exponent: float, shorter: float, alarms: tuple[int, int]
) -> None:
    """Means per user that differ by 0.5 on the log scale; without sums by group, chance would look like drift."""
    rng, rollouts, requests = np.random.default_rng(seed), 20, 10_000
    found = dict.fromkeys((GROUPS, 1), 0)
    frequencies = 1.0 / np.arange(1, users + 1) ** exponent
    for _ in range(rollouts):
        who = rng.choice(users, requests, p=frequencies / frequencies.sum())
        is_candidate = (rng.random(users) < 0.25)[who]
        lasting = rng.lognormal(5.0, 0.5, users)[who] * rng.lognormal(0.0, 0.5, requests)
        tokens = np.where(is_candidate, lasting * shorter, lasting).astype(int) + 1
        for groups in found:
            arms = (
                answers_of(arm, tokens[part], who[part] % groups if groups > 1 else None)
                for arm, part in ((Arm.STABLE, ~is_candidate), (Arm.CANDIDATE, is_candidate))
            )
            evidence = folded(folded(None, answer(), plan=PLAN), answer(*arms), plan=PLAN)
            check = assess(evidence, PLAN, weight=25.0).drift
            assert check is not None
            found[groups] += check.phase is CheckPhase.FAILED
    print(f"seed {seed}: {found[GROUPS]} alarms in {rollouts} rollouts, {found[1]} without sums by group")
    least, most = alarms
    assert least <= found[GROUPS] <= most
    assert found[1] >= 3


@pytest.mark.parametrize(
    ("seed", "users", "change", "alarms"),
    [
        (50, 2_000, 0.0, (0, 0)),
        (51, 200, 0.0, (0, 1)),
        (52, 2_000, 0.4, (10, 10)),
        (53, 20_000, 1.0, (10, 10)),
    ],
    ids=["topics of users", "few users", "every third word is another", "another language"],
)
def test_other_words_are_drift_and_topics_of_users_are_not(
    seed: int, users: int, change: float, alarms: tuple[int, int]
) -> None:
    """Words by Zipf's law, three in ten of the user's own topic; `change` is the share of words from another list."""
    rng, rollouts, requests, words = np.random.default_rng(seed), 10, 6_000, 32
    frequencies = 1.0 / np.arange(1, users + 1) ** 1.2
    found, message = 0, ""
    for _ in range(rollouts):
        who = rng.choice(users, requests, p=frequencies / frequencies.sum())
        candidate = (rng.random(users) < 0.25)[who]
        shape = (requests, words)
        text = np.minimum(rng.zipf(1.3, shape), 3_000)
        topic = who[:, None] * 50 + rng.integers(0, 50, shape) + 10_000
        text = np.where(rng.random(shape) < 0.3, topic, text)
        other = candidate[:, None] & (rng.random(shape) < change)
        text = np.where(other, np.minimum(rng.zipf(1.3, shape), 3_000) + 5_000_000, text)
        bins = text * 2_654_435_761 % 2**32 // 2**26
        arms = []
        for arm, part in ((Arm.STABLE, ~candidate), (Arm.CANDIDATE, candidate)):
            counters = answers_of(arm, np.full(int(part.sum()), 40), who[part] % GROUPS)
            histogram = np.bincount(bins[part].ravel(), minlength=64).tolist()
            arms.append(counters.model_copy(update={"word_histogram": tuple(histogram)}))
        evidence = folded(folded(None, answer(), plan=PLAN), answer(*arms), plan=PLAN)
        check = assess(evidence, PLAN, weight=25.0).drift
        assert check is not None
        message = check.message or ""
        found += check.phase is CheckPhase.FAILED
        assert check.phase is not CheckPhase.FAILED or "other words" in message
    print(f"seed {seed}: {found} alarms in {rollouts} rollouts, the last one: {message}")
    assert alarms[0] <= found <= alarms[1]


def answers_of(arm: Arm, tokens: Ints, groups: Ints | None) -> ArmCounters:
    bins = [min(int(count).bit_length(), 15) for count in tokens.tolist()]
    sums = [] if groups is None else [tokens[groups == group] for group in range(GROUPS)]
    return ArmCounters(
        alias=ALIAS,
        arm=arm,
        revision=REVISIONS[arm],
        requests=len(tokens),
        length_histogram=tuple(bins.count(index) for index in range(16)),
        completion_tokens=Moments(
            n=len(tokens),
            sum=int(tokens.sum()),
            sum_squares=int((tokens**2).sum()),
            groups=tuple((len(part), float(part.sum())) for part in sums),
        ),
    )


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

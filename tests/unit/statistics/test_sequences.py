"""Confidence sequences: published numbers and cases by hand. That they cover is in tests/calibration."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from finetune_operator.api.routes import GROUPS
from finetune_operator.core import sequences
from finetune_operator.core.sequences import Moments
from tests.unit.statistics.traffic import Flags, Floats

Ints = NDArray[np.int64]

ALPHA = 0.05


# gbstats 0.8.0: SequentialTwoSidedTTest(stat_a, stat_b, SequentialConfig(alpha, sequential_tuning_parameter)) over
# SampleMeanStatistic(n, sum, sum_squares) (1000, 500, 500) and (500, 280, 280); (1800, 1710, 1710) and (200, 188, 188);
# (20000, 41000, 120000) and (5000, 10500, 31000). Its `variance`, the sum of n, and half its interval.
@pytest.mark.parametrize(
    ("variance", "n", "alpha", "tuning", "half"),
    [
        (0.003230805956256858, 1_500, 0.05, 5_000, 0.181868620252051),
        (0.0003426788966115752, 2_000, 0.05, 2_000, 0.05618653884266909),
        (0.00010764757685424973, 25_000, 0.01, 5_000, 0.038139153904332865),
    ],
)
def test_the_radius_is_gbstats(variance: float, n: int, alpha: float, tuning: float, half: float) -> None:
    assert sequences.radius(math.sqrt(variance), n=n, alpha=alpha, tuning=tuning) == pytest.approx(
        half, rel=1e-9
    )


def of(values: list[float]) -> Moments:
    return Moments(len(values), sum(values), sum(value * value for value in values))


def test_a_mean_that_moves_while_the_weight_grows_is_no_effect() -> None:
    """Simpson's paradox of a ramp: both arms 1.0 by day and 2.0 by night, the candidate mostly there at night."""
    rng = np.random.default_rng(26)

    def span(mean: float, stable: int, candidate: int) -> tuple[Moments, Moments]:
        first, second = rng.normal(mean, 0.3, stable).tolist(), rng.normal(mean, 0.3, candidate).tolist()
        return of(first), of(second)

    spans = [span(1.0, 9_500, 500), span(2.0, 5_000, 5_000)]
    strata = sequences.compare(spans)
    pooled = sequences.compare(
        [
            (
                Moments(14_500, sum(s.total for s, _ in spans), sum(s.squares for s, _ in spans)),
                Moments(5_500, sum(c.total for _, c in spans), sum(c.squares for _, c in spans)),
            )
        ]
    )
    assert strata is not None
    assert pooled is not None
    assert pooled.estimate > 0.5
    assert abs(strata.estimate) < sequences.radius(strata.standard_error, n=strata.effective_n, alpha=ALPHA)
    assert sequences.radius(strata.standard_error, n=strata.effective_n, alpha=ALPHA) < 0.05


def test_the_difference_by_hand() -> None:
    found = sequences.compare([(of([1, 2, 3, 2]), of([2, 4])), (of([5, 5]), of([6, 8]))])
    assert found is not None
    first, second = 1 / (1 / 4 + 1 / 2), 1 / (1 / 2 + 1 / 2)
    assert found.effective_n == pytest.approx(first + second)
    assert found.estimate == pytest.approx((first * (3 - 2) + second * (7 - 5)) / (first + second))
    assert (found.stable_n, found.candidate_n) == (6, 4)


def test_strata_without_one_of_the_arms_say_nothing() -> None:
    assert sequences.compare([(of([1, 2, 3]), Moments()), (Moments(), of([1, 2, 3]))]) is None
    assert sequences.compare([]) is None
    assert sequences.compare([(of([1]), of([1]))]) is None
    assert sequences.compare([(of([1, 2]), of([1])), (of([1, 2]), of([1]))]) is None
    both = (of([1, 2, 3, 2]), of([2, 4]))
    assert sequences.compare([(of([7, 8]), Moments()), both, (Moments(), of([7]))]) == sequences.compare(
        [both]
    )


def grouped(values: Floats, who: Ints) -> Moments:
    """Values of users, whose groups are their numbers modulo GROUPS."""
    sums = [values[who % GROUPS == group] for group in range(GROUPS)]
    return Moments(
        len(values),
        float(values.sum()),
        float((values**2).sum()),
        groups=tuple((len(part), float(part.sum())) for part in sums),
    )


def effect_of(values: Floats, who: Ints, candidate: Flags) -> float:
    found = sequences.compare(
        [(grouped(values[~candidate], who[~candidate]), grouped(values[candidate], who[candidate]))]
    )
    assert found is not None
    return found.design_effect


def test_the_design_effect_is_that_of_clusters() -> None:
    """Of m values per user with correlation rho it is 1 + (m - 1) rho (Kish 1965)."""
    rng = np.random.default_rng(31)
    users, each = 4_000, 10
    who = np.repeat(np.arange(users), each)
    candidate = rng.random(users)[who] < 0.5
    own, fresh = rng.normal(0, 1, users)[who], rng.normal(0, 2, users * each)
    assert effect_of(fresh, who, candidate) < 2
    assert effect_of(own + fresh, who, candidate) == pytest.approx(1 + 9 * 1 / 5, rel=0.4)
    assert effect_of(own, who, candidate) == pytest.approx(10, rel=0.4)
    assert effect_of(own, who, rng.random(users * each) < 0.5) < 2, "each request is assigned anew"


def test_the_design_effect_widens_the_interval_and_slows_the_clock() -> None:
    rng = np.random.default_rng(32)
    who = np.repeat(np.arange(400), 20)
    values, candidate = rng.normal(5, 1, 400)[who], who % 2 == 1
    stable, other = grouped(values[~candidate], who[~candidate]), grouped(values[candidate], who[candidate])
    found = sequences.compare([(stable, other)])
    plain = sequences.compare([(replace(stable, groups=()), replace(other, groups=()))])
    assert plain is not None
    assert found is not None
    effect = found.design_effect
    assert (plain.design_effect, plain.estimate) == (1.0, found.estimate)
    assert found.standard_error == pytest.approx(plain.standard_error * effect**0.5)
    assert found.effective_n == pytest.approx(plain.effective_n / effect)
    assert effect > 8


def test_a_user_who_changes_sides_leaves_both_at_once() -> None:
    """At 10 percent a heavy user was stable's, at 50 the candidate's: what is wrong twice cancels out."""
    rng = np.random.default_rng(33)
    who = rng.integers(0, 64, 8_000)
    values = rng.normal(0, 1, 8_000) + np.where(who == 0, 10.0, 0.0)
    low, high = (grouped(values[part], who[part]) for part in (who < 32, who >= 32))
    changed, kept = sequences.compare([(low, high), (high, low)]), sequences.compare([(low, high)] * 2)
    assert changed is not None
    assert kept is not None
    assert changed.design_effect < 2
    assert kept.design_effect > 100


def test_values_of_one_group_of_users_are_no_comparison() -> None:
    values = np.tile([1.0, 2.0], 100)
    many, one = np.arange(200), np.full(200, 5)
    found = sequences.compare([(grouped(values, many), grouped(values, one))])
    assert found is not None
    assert math.isinf(found.design_effect)


def test_values_whose_groups_are_not_known_change_no_design_effect() -> None:
    """A rollout that was under way when its routers or its objectives became younger."""
    rng = np.random.default_rng(34)
    who = np.repeat(np.arange(400), 20)
    values, candidate = rng.normal(5, 1, 400)[who], who % 2 == 1
    pair = (grouped(values[~candidate], who[~candidate]), grouped(values[candidate], who[candidate]))
    older = (Moments(500, 2_500.0, 13_000.0), Moments(500, 2_500.0, 13_000.0))
    whole, partial = sequences.compare([pair]), sequences.compare([older, pair])
    assert whole is not None
    assert partial is not None
    assert partial.design_effect == pytest.approx(whole.design_effect, rel=0.1)


@pytest.mark.parametrize("value", [0.0, 0.7, 1.0, 1234.5])
def test_values_that_never_vary_do_not_prove_everything(value: float) -> None:
    """200 of 200 may still be 199 of 200 in truth."""
    constant = Moments(200, 200 * value, 200 * value * value)
    found = sequences.compare([(constant, constant)])
    assert found is not None
    half = sequences.radius(found.standard_error, n=found.effective_n, alpha=ALPHA)
    assert half > 0.005 * (value or 1.0)

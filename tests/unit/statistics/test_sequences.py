"""Confidence sequences: published numbers, and coverage at all times at once."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from finetune_operator.core import sequences
from finetune_operator.core.sequences import Moments
from tests.unit.statistics.traffic import Floats

Values = Callable[[np.random.Generator, int], Floats]

ALPHA, LEAST = 0.05, 200


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


def uncovered(seed: int, draw: Values, *, share: float, rollouts: int) -> float:
    """Part of null rollouts of 8,000 values in which the sequence misses zero at any look from the least samples on."""
    rng = np.random.default_rng(seed)
    missed = 0
    for _ in range(rollouts):
        values, candidate = draw(rng, 8_000), rng.random(8_000) < share
        sums = [
            np.cumsum(np.where(arm, power, 0.0))[99::100]
            for arm in (~candidate, candidate)
            for power in (1.0, values, values * values)
        ]
        for n, total, squares, m, other, other_squares in np.stack(sums, 1).tolist():
            if min(n, m) < LEAST:
                continue
            found = sequences.compare(
                [(Moments(int(n), total, squares), Moments(int(m), other, other_squares))]
            )
            assert found is not None
            if abs(found.estimate) > sequences.radius(found.standard_error, n=found.effective_n, alpha=ALPHA):
                missed += 1
                break
    return missed / rollouts


def yes_or_no(rate: float) -> Values:
    return lambda rng, n: (rng.random(n) < rate).astype(float)


def log_normal(sigma: float) -> Values:
    return lambda rng, n: rng.lognormal(0.0, sigma, n)


@pytest.mark.parametrize("share", [0.05, 0.5])
@pytest.mark.parametrize(
    ("seed", "draw"),
    [
        (21, yes_or_no(0.8)),
        (22, yes_or_no(0.95)),
        (23, yes_or_no(0.995)),
        (24, log_normal(0.5)),
        (25, log_normal(1.5)),
    ],
    ids=["yes in 80%", "yes in 95%", "yes in 99.5%", "latency", "latency with a long tail"],
)
def test_sequences_cover_at_all_times_at_once(seed: int, draw: Values, share: float) -> None:
    rollouts = 300
    missed = uncovered(seed, draw, share=share, rollouts=rollouts)
    print(
        f"seed {seed}, share {share:.0%}: {missed:.3f} of {rollouts} rollouts left uncovered, alpha {ALPHA}"
    )
    # Three standard errors of a share of alpha in 300 rollouts.
    assert missed <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / rollouts)


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


@pytest.mark.parametrize("value", [0.0, 0.7, 1.0, 1234.5])
def test_values_that_never_vary_do_not_prove_everything(value: float) -> None:
    """200 of 200 may still be 199 of 200 in truth."""
    constant = Moments(200, 200 * value, 200 * value * value)
    found = sequences.compare([(constant, constant)])
    assert found is not None
    half = sequences.radius(found.standard_error, n=found.effective_n, alpha=ALPHA)
    assert half > 0.005 * (value or 1.0)

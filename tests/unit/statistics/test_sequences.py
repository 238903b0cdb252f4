"""Confidence sequences: published numbers and cases by hand. That they cover is in tests/calibration."""

from __future__ import annotations

import math

import numpy as np
import pytest

from finetune_operator.core import sequences
from finetune_operator.core.sequences import Moments

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


@pytest.mark.parametrize("value", [0.0, 0.7, 1.0, 1234.5])
def test_values_that_never_vary_do_not_prove_everything(value: float) -> None:
    """200 of 200 may still be 199 of 200 in truth."""
    constant = Moments(200, 200 * value, 200 * value * value)
    found = sequences.compare([(constant, constant)])
    assert found is not None
    half = sequences.radius(found.standard_error, n=found.effective_n, alpha=ALPHA)
    assert half > 0.005 * (value or 1.0)

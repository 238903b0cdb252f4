"""Confidence sequences cover the truth at all times at once."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest

from finetune_operator.core import sequences
from finetune_operator.core.sequences import Moments
from tests.unit.statistics.traffic import Flags, Floats

Values = Callable[[np.random.Generator, int], Floats]

ALPHA, LEAST = 0.05, 200


def uncovered(seed: int, draw: Values, *, share: float, rollouts: int) -> float:
    """Part of null rollouts of 8,000 values in which the sequence misses zero at any look from the least samples on."""
    rng = np.random.default_rng(seed)
    missed = sum(is_missed(draw(rng, 8_000), rng.random(8_000) < share) for _ in range(rollouts))
    return missed / rollouts


def is_missed(values: Floats, candidate: Flags) -> bool:
    """Whether the sequence ever excludes zero, looked at after every 100 values."""
    sums = [
        np.cumsum(np.where(arm, power, 0.0))[99::100]
        for arm in (~candidate, candidate)
        for power in (1.0, values, values * values)
    ]
    for n, total, squares, m, other, other_squares in np.stack(sums, 1).tolist():
        if min(n, m) < LEAST:
            continue
        found = sequences.compare([(Moments(int(n), total, squares), Moments(int(m), other, other_squares))])
        assert found is not None
        if abs(found.estimate) > sequences.radius(found.standard_error, n=found.effective_n, alpha=ALPHA):
            return True
    return False


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


def test_values_of_sticky_users_who_differ_are_outside_of_the_promise() -> None:
    """What docs/statistics.md says of a few heavy users: assigned anew with each request, they are inside."""
    seed, users, requests, rollouts = 26, 2_000, 8_000, 60
    rng = np.random.default_rng(seed)
    frequencies = 1.0 / np.arange(1, users + 1) ** 1.2
    missed = {"sticky": 0, "each anew": 0}
    for _ in range(rollouts):
        who = rng.choice(users, requests, p=frequencies / frequencies.sum())
        values = rng.lognormal(0.0, 0.5, users)[who] * rng.lognormal(0.0, 0.5, requests)
        missed["sticky"] += is_missed(values, rng.random(users)[who] < 0.25)
        missed["each anew"] += is_missed(values, rng.random(requests) < 0.25)
    print(f"seed {seed}: uncovered of {rollouts} rollouts: {missed}")
    assert missed["sticky"] > rollouts / 2
    assert missed["each anew"] <= rollouts * (ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / rollouts))

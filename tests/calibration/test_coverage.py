"""Confidence sequences cover the truth at all times at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from numpy.typing import NDArray

from finetune_operator.api.routes import GROUPS
from finetune_operator.core import sequences
from finetune_operator.core.sequences import Moments
from tests.unit.statistics.traffic import Flags, Floats

Ints = NDArray[np.int64]
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


@dataclass(frozen=True)
class Population:
    """Users who keep their side, and what their values are like."""

    users: int
    exponent: float
    """Of the Zipf law of how often they ask; 0: equally often."""
    votes: bool
    """True: yes or no, with a rate per user of Beta(8, 2). False: log-normal seconds about a mean per user."""
    spread: float = 0.5
    """Of the means, on the log scale."""

    def draw(self, rng: np.random.Generator, requests: int) -> tuple[Ints, Floats]:
        """User and value of each request."""
        frequencies = 1.0 / np.arange(1, self.users + 1) ** self.exponent
        who = rng.choice(self.users, requests, p=frequencies / frequencies.sum())
        if self.votes:
            return who, (rng.random(requests) < rng.beta(8, 2, self.users)[who]).astype(float)
        means = rng.lognormal(0.0, self.spread, self.users)
        return who, means[who] * rng.lognormal(0.0, 0.5, requests)


def pairs_by_group(
    values: Floats, candidate: Flags, groups: Ints, *, every: int
) -> Iterator[tuple[Moments, Moments]]:
    """(stable, candidate) after each `every` values."""
    looks = len(values) // every
    place = (np.arange(len(values)) // every, candidate.astype(int), groups)
    counts, sums = np.zeros((looks, 2, GROUPS)), np.zeros((looks, 2, GROUPS))
    squares = np.zeros((looks, 2))
    np.add.at(counts, place, 1.0)
    np.add.at(sums, place, values)
    np.add.at(squares, place[:2], values * values)
    totals = (np.cumsum(counts, 0).astype(int), np.cumsum(sums, 0), np.cumsum(squares, 0))
    for n, total, square in zip(*(total.tolist() for total in totals), strict=True):
        stable, other = (
            Moments(sum(n[arm]), sum(total[arm]), square[arm], tuple(zip(n[arm], total[arm], strict=True)))
            for arm in (0, 1)
        )
        yield stable, other


def is_missed_by_group(pairs: Iterable[tuple[Moments, Moments]]) -> bool:
    """Whether the sequence ever excludes zero."""
    for stable, candidate in pairs:
        if min(stable.n, candidate.n) < LEAST:
            continue
        found = sequences.compare([(stable, candidate)])
        assert found is not None
        if not math.isinf(found.design_effect) and abs(found.estimate) > sequences.radius(
            found.standard_error, n=found.effective_n, alpha=ALPHA
        ):
            return True
    return False


@pytest.mark.parametrize(
    ("seed", "population"),
    [
        (26, Population(2_000, 1.2, votes=False)),
        (27, Population(200, 1.2, votes=False)),
        (28, Population(2_000, 1.2, votes=True)),
        (29, Population(2_000, 0.0, votes=False)),
        (30, Population(20, 0.0, votes=True)),
        (31, Population(20_000, 0.0, votes=False, spread=0.0)),
    ],
    ids=[
        "few ask most",
        "few ask most of 200",
        "votes",
        "equal traffic",
        "twenty users",
        "no user is like another",
    ],
)
def test_sequences_cover_for_sticky_users_who_differ(seed: int, population: Population) -> None:
    """Whoever takes values of one user as independent is wrong far more often: the second number."""
    requests, rollouts = 8_000, 150
    rng = np.random.default_rng(seed)
    missed = plain = 0
    for _ in range(rollouts):
        who, values = population.draw(rng, requests)
        candidate = rng.random(population.users)[who] < 0.25
        groups = rng.integers(0, GROUPS, population.users)[who]
        missed += is_missed_by_group(pairs_by_group(values, candidate, groups, every=400))
        plain += is_missed(values, candidate)
    print(
        f"seed {seed}: {missed / rollouts:.3f} of {rollouts} rollouts left uncovered, "
        f"{plain / rollouts:.3f} where values are taken as independent"
    )
    assert missed / rollouts <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / rollouts)

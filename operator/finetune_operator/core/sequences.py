"""Confidence sequences for a difference of means: intervals that hold at all times at once.

The arms are compared within strata (spans of one traffic weight) and the differences averaged, because a mean that
changes with the hour while the weight grows would otherwise look like an effect of the candidate. Values of one user
are alike, so many of few users say less than as many of different ones: the design effect tells by how much.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# Effective sample size (harmonic, see `Difference`) at which the sequence is tightest: two arms of 1,000.
TUNING = 500.0

# Values by which the variance of both arms counts in the variance of each. With it the sequences hold from 200 values
# on for rare events (0.5 %) and for long tails (log-normal with sigma 1.5), where they fail without: see the tests.
BORROWED = 400.0


Sums = tuple[int, float]
"""Count and sum."""


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of squares of one arm's values in one stratum."""

    n: int = 0
    total: float = 0.0
    squares: float = 0.0
    groups: tuple[Sums, ...] = ()
    """Of each group of users, or nothing; may be of a part of the values. A user's group is the same everywhere."""

    @property
    def mean(self) -> float:
        return self.total / self.n if self.n else 0.0

    @property
    def scatter(self) -> float:
        """Sum of squared deviations from the mean; 0 where it is no more than sums of ten digits can tell from 0."""
        scatter = self.squares - self.total * self.mean
        return scatter if scatter > 1e-8 * self.squares else 0.0


@dataclass(frozen=True)
class Difference:
    """Candidate minus `scale` times stable, averaged over the strata that have both."""

    stable_n: int
    candidate_n: int
    estimate: float
    standard_error: float
    effective_n: float
    """Sum over strata of 1/(1/n_stable + 1/n_candidate), by the design effect: the clock of the sequence."""
    design_effect: float
    """Variance of the estimate, as a multiple of what it were if all values were independent (Kish 1965); at least 1.
    Infinite where an arm has values of one group only."""
    stable_mean: float
    candidate_mean: float
    """Means with the strata's weights."""


def compare(strata: Sequence[tuple[Moments, Moments]], *, scale: float = 1.0) -> Difference | None:
    """The difference over (stable, candidate) pairs, or None while there are not two values per arm beside one another.

    Strata weigh by their effective sample size, which is best when the variance is the same in all.
    """
    both = [(stable, candidate) for stable, candidate in strata if stable.n and candidate.n]
    stable_n, candidate_n = sum(s.n for s, _ in both), sum(c.n for _, c in both)
    if not both or stable_n <= len(both) or candidate_n <= len(both):
        return None
    weights = [_weight(s.n, c.n) for s, c in both]
    effective = math.fsum(weights)
    stable_mean = math.fsum(w * s.mean for w, (s, _) in zip(weights, both, strict=True)) / effective
    candidate_mean = math.fsum(w * c.mean for w, (_, c) in zip(weights, both, strict=True)) / effective
    spread = _variances(both, borrowed=BORROWED, distance=max(abs(stable_mean), abs(candidate_mean)))
    variance = _variance_of_difference([(s.n, c.n) for s, c in both], spread, scale=scale)
    effect = _design_effect(both, scale=scale)
    return Difference(
        stable_n=stable_n,
        candidate_n=candidate_n,
        estimate=candidate_mean - scale * stable_mean,
        standard_error=math.sqrt(variance * effect),
        effective_n=effective / effect,
        design_effect=effect,
        stable_mean=stable_mean,
        candidate_mean=candidate_mean,
    )


def _weight(stable_n: int, candidate_n: int) -> float:
    return 1.0 / (1.0 / stable_n + 1.0 / candidate_n)


def _variances(
    both: Sequence[tuple[Moments, Moments]], *, borrowed: float, distance: float = 0.0
) -> tuple[float, float]:
    """Variance of a value per arm, within strata, each arm borrowing so many values from both.

    An arm of 200 yes-or-no values may hold not one "no", and would look as if it could not vary. Where nothing
    varies at all, one value more at `distance` (1 where all are 0) is assumed to have gone unseen.
    """
    scatters = math.fsum(s.scatter for s, _ in both), math.fsum(c.scatter for _, c in both)
    freedoms = sum(s.n for s, _ in both) - len(both), sum(c.n for _, c in both) - len(both)
    pooled = (sum(scatters) or (distance or 1.0) ** 2) / sum(freedoms)
    stable, candidate = (
        (scatter + borrowed * pooled) / (freedom + borrowed)
        for scatter, freedom in zip(scatters, freedoms, strict=True)
    )
    return stable, candidate


def _variance_of_difference(
    counts: Sequence[tuple[int, int]], variances: tuple[float, float], *, scale: float
) -> float:
    """Of so many independent (stable, candidate) values per stratum."""
    weights = [_weight(n, m) for n, m in counts]
    stable, candidate = variances
    squares = math.fsum(
        w * w * (scale * scale * stable / n + candidate / m)
        for w, (n, m) in zip(weights, counts, strict=True)
    )
    return squares / math.fsum(weights) ** 2


def _design_effect(both: Sequence[tuple[Moments, Moments]], *, scale: float) -> float:
    """See `Difference`. The variance is the delete-a-group jackknife's (Kott 2001, "The delete-a-group jackknife",
    Journal of Official Statistics 17): the users of a group leave both arms and all strata at once, so it does not
    matter how many values each of them has, nor whether they have changed sides.
    """
    grouped = [(s.groups, c.groups) for s, c in both if _sum_of(s.groups)[0] and _sum_of(c.groups)[0]]
    if not grouped:
        return 1.0
    whole = [(_sum_of(stable), _sum_of(candidate)) for stable, candidate in grouped]
    counts = [(stable[0], candidate[0]) for stable, candidate in whole]
    independent = _variance_of_difference(counts, _variances(both, borrowed=0.0), scale=scale)
    if not independent:
        return 1.0
    estimate = _estimate(whole, scale=scale)
    groups = len(grouped[0][0])
    squares = 0.0
    for group in range(groups):
        left = [
            (_less(sums[0], stable[group]), _less(sums[1], candidate[group]))
            for sums, (stable, candidate) in zip(whole, grouped, strict=True)
        ]
        squares += (_estimate(left, scale=scale) - estimate) ** 2
    return max(1.0, (groups - 1) / groups * squares / independent)


def _estimate(spans: Iterable[tuple[Sums, Sums]], *, scale: float) -> float:
    """The difference over strata of (stable, candidate) sums; infinite where none has both."""
    total = weights = 0.0
    for (n, stable), (m, candidate) in spans:
        if n and m:
            weight = _weight(n, m)
            weights += weight
            total += weight * (candidate / m - scale * stable / n)
    return total / weights if weights else math.inf


def _sum_of(groups: Sequence[Sums]) -> Sums:
    return sum(n for n, _ in groups), math.fsum(total for _, total in groups)


def _less(whole: Sums, part: Sums) -> Sums:
    return whole[0] - part[0], whole[1] - part[1]


def radius(standard_error: float, *, n: float, alpha: float, tuning: float = TUNING) -> float:
    """Half width at sample size `n` of the two-sided 1 - alpha sequence that is tightest about size `tuning`.

    Robbins' normal mixture in its asymptotic form (Waudby-Smith et al. 2024, "Time-uniform central limit theory and
    asymptotic confidence sequences", Annals of Statistics 52), as GrowthBook uses it too.
    """
    ratio = n * (-2.0 * math.log(alpha) + math.log(-2.0 * math.log(alpha) + 1.0)) / tuning
    return standard_error * math.sqrt((ratio + 1.0) / ratio * (math.log(ratio + 1.0) - 2.0 * math.log(alpha)))

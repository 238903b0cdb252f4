"""Confidence sequences for a difference of means: intervals that hold at all times at once.

The arms are compared within strata (spans of one traffic weight) and the differences averaged, because a mean that
changes with the hour while the weight grows would otherwise look like an effect of the candidate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Effective sample size (harmonic, see `Difference`) at which the sequence is tightest: two arms of 1,000.
TUNING = 500.0

# Values by which the variance of both arms counts in the variance of each. With it the sequences hold from 200 values
# on for rare events (0.5 %) and for long tails (log-normal with sigma 1.5), where they fail without: see the tests.
BORROWED = 400.0


@dataclass(frozen=True)
class Moments:
    """Count, sum and sum of squares of one arm's values in one stratum."""

    n: int = 0
    total: float = 0.0
    squares: float = 0.0

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
    """Sum over strata of 1/(1/n_stable + 1/n_candidate): the clock of the sequence."""
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
    weights = [1.0 / (1.0 / s.n + 1.0 / c.n) for s, c in both]
    effective = math.fsum(weights)
    stable_mean = math.fsum(w * s.mean for w, (s, _) in zip(weights, both, strict=True)) / effective
    candidate_mean = math.fsum(w * c.mean for w, (_, c) in zip(weights, both, strict=True)) / effective
    stable_variance, candidate_variance = _variances(
        both, distance=max(abs(stable_mean), abs(candidate_mean))
    )
    variance = math.fsum(
        w * w * (scale * scale * stable_variance / s.n + candidate_variance / c.n)
        for w, (s, c) in zip(weights, both, strict=True)
    )
    return Difference(
        stable_n=stable_n,
        candidate_n=candidate_n,
        estimate=candidate_mean - scale * stable_mean,
        standard_error=math.sqrt(variance) / effective,
        effective_n=effective,
        stable_mean=stable_mean,
        candidate_mean=candidate_mean,
    )


def _variances(both: Sequence[tuple[Moments, Moments]], *, distance: float) -> tuple[float, float]:
    """Variance of a value per arm, within strata, each arm borrowing from both.

    An arm of 200 yes-or-no values may hold not one "no", and would look as if it could not vary. Where nothing
    varies at all, one value more at `distance` (1 where all are 0) is assumed to have gone unseen.
    """
    scatters = math.fsum(s.scatter for s, _ in both), math.fsum(c.scatter for _, c in both)
    freedoms = sum(s.n for s, _ in both) - len(both), sum(c.n for _, c in both) - len(both)
    pooled = (sum(scatters) or (distance or 1.0) ** 2) / sum(freedoms)
    stable, candidate = (
        (scatter + BORROWED * pooled) / (freedom + BORROWED)
        for scatter, freedom in zip(scatters, freedoms, strict=True)
    )
    return stable, candidate


def radius(standard_error: float, *, n: float, alpha: float, tuning: float = TUNING) -> float:
    """Half width at sample size `n` of the two-sided 1 - alpha sequence that is tightest about size `tuning`.

    Robbins' normal mixture in its asymptotic form (Waudby-Smith et al. 2024, "Time-uniform central limit theory and
    asymptotic confidence sequences", Annals of Statistics 52), as GrowthBook uses it too.
    """
    ratio = n * (-2.0 * math.log(alpha) + math.log(-2.0 * math.log(alpha) + 1.0)) / tuning
    return standard_error * math.sqrt((ratio + 1.0) / ratio * (math.log(ratio + 1.0) - 2.0 * math.log(alpha)))

"""Whether the candidate's answers look other than the stable revision's: lengths, truncations, refusals.

These are moderate signals, for a person to look at: a better adapter may well answer shorter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

SMOOTHING = 0.5  # responses added to each bin, so that an empty one does not make the index infinite


def stability_index(stable: Sequence[float], candidate: Sequence[float]) -> float:
    """Population stability index of two histograms over the same bins: sum of (q - p) ln(q / p).

    Bins that are empty in both are left out. By convention below 0.1 is stable, and 0.25 is a major shift
    (Siddiqi 2006, "Credit Risk Scorecards").
    """
    bins = [(s + SMOOTHING, c + SMOOTHING) for s, c in zip(stable, candidate, strict=True) if s or c]
    stable_total, candidate_total = sum(s for s, _ in bins), sum(c for _, c in bins)
    shares = [(s / stable_total, c / candidate_total) for s, c in bins]
    return math.fsum((q - p) * math.log(q / p) for p, q in shares)


def chance_index(bins: int, *, stable_n: float, candidate_n: float, alpha: float) -> float:
    """Index that equal arms exceed by chance with probability alpha at one look, when answers are independent.

    The index times the harmonic sample size is about chi-square with bins - 1 degrees of freedom (Yurdakul and
    Naranjo 2020, "Statistical properties of the population stability index", Journal of Risk Model Validation 14);
    its quantile by Wilson and Hilferty 1931.
    """
    freedom = max(bins - 1, 1)
    spread = 2.0 / (9.0 * freedom)
    quantile = freedom * (1.0 - spread + NormalDist().inv_cdf(1.0 - alpha) * math.sqrt(spread)) ** 3
    return quantile * (1.0 / stable_n + 1.0 / candidate_n)


def standardize(strata: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[list[float], list[float]]:
    """The stable and the candidate's histograms, the stable one weighted as the candidate's answers came.

    So a length that changes with the hour while the weight grows is no drift (direct standardization). The stable
    histogram is scaled to the answers that it is worth: the harmonic sample size with weights (Kish 1965).
    """
    both = [(stable, candidate) for stable, candidate in strata if sum(stable) and sum(candidate)]
    if not both:
        return [], []
    candidate_total = [float(sum(column)) for column in zip(*(c for _, c in both), strict=True)]
    weights = [sum(candidate) / sum(stable) for stable, candidate in both]
    weighted = [
        math.fsum(w * stable[index] for w, (stable, _) in zip(weights, both, strict=True))
        for index in range(len(candidate_total))
    ]
    mass = math.fsum(weighted)
    worth = mass * mass / math.fsum(w * w * sum(stable) for w, (stable, _) in zip(weights, both, strict=True))
    return [number * worth / mass for number in weighted], candidate_total

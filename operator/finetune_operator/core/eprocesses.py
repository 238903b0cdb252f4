"""Evidence that may be looked at as often as one likes: e-processes for harm and for wrong shares of users.

An e-process has an expectation of at most 1 at every stopping time while the null hypothesis holds, so by Ville's
inequality it ever reaches 1/alpha with probability alpha at most (Ramdas et al. 2023, "Game-theoretic statistics and
safe anytime-valid inference", Statistical Science 38).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

# The harm that is looked for: the candidate fails this many times as often as the stable revision.
RELATIVE_RISKS = (1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 30.0)

# Requests that are judged together at least. A block of n requests holds 1 - 1/n of the information that the same
# requests would hold in one large block, so 10 costs a tenth of the power and delays nothing by more than 10 requests.
BLOCK_REQUESTS = 10

# Weight of the prior on the nominal share, in keys: shares that are off by a tenth are found soonest.
SHARE_PRIOR_KEYS = 100.0


@dataclass(frozen=True)
class HarmProcess:
    """E-process of "the candidate fails no more often than the stable revision", block of requests by block.

    It is a mixture over relative risks and over the block in which the harm begins, so a candidate that breaks after
    hours of good service does not have to work off the good hours first.
    """

    blocks: int = 0
    """Blocks so far that could tell anything: with a failure in them, and with requests of both sides."""
    log_evidence: tuple[float, ...] = ()
    """Per relative risk: log of the mixture over the beginnings so far. Empty before the first block."""
    log_peak: float = 0.0
    """Largest `log_e` so far; what once was proof stays proof."""

    @property
    def log_e(self) -> float:
        """Natural logarithm of the e-value now."""
        if not self.log_evidence:
            return 0.0
        not_begun = -math.log(self.blocks + 1)
        return _log_add(_log_sum(self.log_evidence) - math.log(len(RELATIVE_RISKS)), not_begun)

    def after(self, *, failures: int, exposed_failures: int, share: float) -> HarmProcess:
        """The process after one block.

        `failures` of both sides, `exposed_failures` of them on the candidate's, `share` = the candidate's part of the
        block's own requests, in [0, 1]. Valid because, when the arm does not matter and the block's requests and
        its failures in all are given, the candidate's failures are hypergeometric, and a convex function of those
        has at most its binomial expectation (Hoeffding 1963, theorem 4), which for this likelihood ratio is 1.
        Whatever the rate does between blocks, and whatever the weight does, is therefore harmless.
        """
        if not 0 <= exposed_failures <= failures or not 0.0 <= share <= 1.0:
            raise ValueError(
                f"a block of {failures} failures cannot have {exposed_failures} at the candidate with share {share}"
            )
        if failures == 0 or share in (0.0, 1.0):
            return self
        # Prior of harm that begins in the block of index b: 1/((b+1)(b+2)), half of it at the very start.
        begins_here = -math.log((self.blocks + 1) * (self.blocks + 2))
        before = self.log_evidence or (-math.inf,) * len(RELATIVE_RISKS)
        evidence = tuple(
            _log_add(log, begins_here)
            + exposed_failures * math.log(risk)
            - failures * math.log1p(share * (risk - 1.0))
            for risk, log in zip(RELATIVE_RISKS, before, strict=True)
        )
        new = replace(self, blocks=self.blocks + 1, log_evidence=evidence)
        return replace(new, log_peak=max(self.log_peak, new.log_e))


def log_threshold(alpha: float, *, tests: int = 1) -> float:
    """Logarithm of the e-value that counts as proof when `tests` share alpha (Bonferroni). alpha in (0, 1)."""
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha is {alpha}; it is a probability between 0 and 1, for example 0.01")
    return math.log(max(tests, 1) / alpha)


def log_share_evidence(stable: int, candidate: int, *, share: float) -> float:
    """Logarithm of the Dirichlet-multinomial e-value of "each key is the candidate's with probability `share`".

    Valid at any time for keys that came one after the other (Lindon and Malek 2022, "Anytime-valid inference for
    multinomial count data", NeurIPS). 0 where the share is not strictly between 0 and 1: then nothing is random.
    """
    if not 0.0 < share < 1.0 or stable + candidate == 0:
        return 0.0
    for_candidate, for_stable = SHARE_PRIOR_KEYS * share, SHARE_PRIOR_KEYS * (1.0 - share)
    return (
        _log_beta(for_candidate + candidate, for_stable + stable)
        - _log_beta(for_candidate, for_stable)
        - candidate * math.log(share)
        - stable * math.log1p(-share)
    )


def e_value(log_e: float) -> float:
    """The e-value itself, cut off at 1e300: what a status can hold and a reader can grasp."""
    return math.exp(min(log_e, math.log(1e300)))


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _log_add(a: float, b: float) -> float:
    high, low = (a, b) if a >= b else (b, a)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


def _log_sum(logs: Sequence[float] | Iterable[float]) -> float:
    values = tuple(logs)
    high = max(values)
    return high if high == -math.inf else high + math.log(math.fsum(math.exp(v - high) for v in values))

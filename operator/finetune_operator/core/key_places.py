"""Where sampled users must lie on the line of the router's assignment, and how often that came out as it should.

A key lies somewhere on [0, 100), uniformly, and is the candidate's at weight w when it lies at 100 - w or above. Each
sight of a key narrows its place down; at another weight, its side is a coin with a known chance again. Counting these
coins, and each only once, keeps the sample ratio valid for users who come back over many weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace

from finetune_operator.core.eprocesses import log_share_evidence

MAX_KEYS = 1024  # as the routers' own samples
WHOLE = (0.0, 100.0)
CHANCE_DIGITS = 6

Place = tuple[float, float]


@dataclass(frozen=True)
class KeyPlaces:
    """The known keys with the smallest hashes, and all coins so far."""

    places: Mapping[int, Place] = field(default_factory=dict)
    """Hash -> part of the line in which the key lies, from (inclusive) and to (exclusive)."""
    coins: Mapping[float, tuple[int, int]] = field(default_factory=dict)
    """Chance of the candidate's side -> how often it was (stable, candidate)."""

    def after(
        self, stable: Set[int], candidate: Set[int], *, weight: float, only_new: bool, counted: bool
    ) -> KeyPlaces:
        """With keys that were seen on the two sides at this weight.

        `only_new`: the sample is older than the weight, so of a known key nobody knows when it was on its side.
        `counted` is False where the same is true of new keys. A key on both sides tells nothing.
        """
        threshold = 100.0 - weight
        known = self.places
        seen = stable | candidate
        kept = set(sorted(known.keys() | seen)[:MAX_KEYS])
        places = {key: place for key, place in known.items() if key in kept}
        coins = dict(self.coins)
        for key in seen & kept:
            if only_new and key in known:
                continue
            low, high = known.get(key, WHOLE)
            is_candidate = key in candidate
            if not counted or (is_candidate and key in stable):
                places[key] = (low, high)
                continue
            if not low < threshold < high:  # no coin: it could only be on one side
                places[key] = (low, high)
                continue
            _toss(
                coins,
                (high - threshold) / (high - low),
                stable=int(not is_candidate),
                candidate=int(is_candidate),
            )
            places[key] = (threshold, high) if is_candidate else (low, threshold)
        if coins == self.coins and places == known:
            return self
        return KeyPlaces(places, coins)

    def with_requests(self, stable: int, candidate: int, *, weight: float) -> KeyPlaces:
        """With requests that were each assigned anew."""
        if not 0.0 < weight < 100.0 or stable + candidate == 0:
            return self
        coins = dict(self.coins)
        _toss(coins, weight / 100.0, stable=stable, candidate=candidate)
        return replace(self, coins=coins)

    @property
    def stable(self) -> int:
        """Coins that came out stable."""
        return sum(stable for stable, _ in self.coins.values())

    @property
    def candidate(self) -> int:
        return sum(candidate for _, candidate in self.coins.values())

    @property
    def expected_candidate(self) -> float:
        """How many of the coins should have come out as the candidate's."""
        return math.fsum(chance * sum(outcomes) for chance, outcomes in self.coins.items())

    @property
    def log_evidence(self) -> float:
        """Log e-value of the coins having other chances than they should."""
        return math.fsum(
            log_share_evidence(stable, candidate, share=chance)
            for chance, (stable, candidate) in self.coins.items()
        )


def _toss(coins: dict[float, tuple[int, int]], chance: float, *, stable: int, candidate: int) -> None:
    chance = round(chance, CHANCE_DIGITS)
    before = coins.get(chance, (0, 0))
    coins[chance] = (before[0] + stable, before[1] + candidate)

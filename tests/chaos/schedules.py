"""Which faults, when and on whom: a list that follows from a seed alone."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Happening:
    after: float
    """Seconds since the one before."""
    fault: str
    pick: float
    """0 to 1: which of those that it may happen to."""


def draw(seed: int, weights: Mapping[str, float], *, count: int, pause: float) -> list[Happening]:
    """`count` faults, each drawn by its weight, with exponential pauses of `pause` seconds on average."""
    dice = random.Random(seed)
    names = list(weights)
    return [
        Happening(
            after=dice.expovariate(1 / pause),
            fault=dice.choices(names, [weights[name] for name in names])[0],
            pick=dice.random(),
        )
        for _ in range(count)
    ]

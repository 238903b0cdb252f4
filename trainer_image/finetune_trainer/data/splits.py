"""Which rows are held out. Deterministic: the same rows and seed give the same split on every machine."""

from __future__ import annotations

import random
from collections.abc import Hashable, Sequence

from finetune_trainer.failures import BadData


def split_rows(keys: Sequence[Hashable], *, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Returns the indices of training rows (shuffled) and of held-out rows.

    Rows with equal keys stay on one side, so that no held-out row was seen in training. With a fraction above 0 at
    least one row is held out and at least one stays. Raises BadData when there are not enough different rows for that.
    """
    generator = random.Random(seed)  # noqa: S311  repeatable, not secret
    groups: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    order = list(groups.values())
    generator.shuffle(order)
    held_out: list[int] = []
    if fraction > 0:
        if len(order) < 2:
            raise BadData(
                f"dataset.split.eval is {fraction}, but there is only one different row; "
                "add rows, or set dataset.split.eval to 0 to train without evaluation"
            )
        wanted = max(1, round(fraction * len(keys)))
        while len(held_out) < wanted and len(order) > 1:
            held_out += order.pop()
    train = [index for group in order for index in group]
    generator.shuffle(train)
    return train, sorted(held_out)

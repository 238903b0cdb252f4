"""The split: repeatable, never empty on either side, and no held-out row was trained on."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_trainer.data.splits import split_rows
from finetune_trainer.failures import BadData


@given(
    keys=st.lists(st.integers(0, 30), min_size=2, max_size=80).filter(lambda keys: len(set(keys)) > 1),
    fraction=st.floats(0.001, 0.5),
    seed=st.integers(0, 2**31 - 1),
)
def test_both_sides_have_rows_and_share_no_content(keys: list[int], fraction: float, seed: int) -> None:
    train, held_out = split_rows(keys, fraction=fraction, seed=seed)
    assert sorted(train + held_out) == list(range(len(keys)))
    assert train
    assert held_out
    assert not {keys[index] for index in train} & {keys[index] for index in held_out}


def test_the_same_seed_gives_the_same_split_and_another_seed_another() -> None:
    keys = list(range(100))
    assert split_rows(keys, fraction=0.1, seed=42) == split_rows(keys, fraction=0.1, seed=42)
    assert split_rows(keys, fraction=0.1, seed=42) != split_rows(keys, fraction=0.1, seed=43)
    assert len(split_rows(keys, fraction=0.1, seed=42)[1]) == 10


def test_fraction_zero_holds_nothing_out() -> None:
    train, held_out = split_rows(["a", "a"], fraction=0, seed=1)
    assert sorted(train) == [0, 1]
    assert held_out == []


def test_one_different_row_cannot_be_split() -> None:
    with pytest.raises(BadData, match=r"dataset.split.eval is 0.1, but there is only one different row"):
        split_rows(["a", "a"], fraction=0.1, seed=1)

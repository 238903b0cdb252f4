"""The memory of what each life of each router process told last, where there are more than it has room for."""

from __future__ import annotations

import pytest

from finetune_operator.api.routes import Arm
from finetune_operator.core import epochs
from finetune_operator.core.epochs import MAX_EPOCHS, MAX_RETIRED, Epochs

TEN, TWELVE = {Arm.STABLE: {"requests": 10.0}}, {Arm.STABLE: {"requests": 12.0}}


def heard(names: range, memory: Epochs | None = None) -> Epochs:
    memory = memory or Epochs()
    for number in names:
        memory, _ = memory.after(f"e{number}", TEN, counts_from_zero=True)
        memory = memory.pruned()
    return memory


def test_an_epoch_of_which_only_a_fingerprint_is_left_is_not_counted_twice() -> None:
    memory = heard(range(MAX_EPOCHS + 1))
    assert set(memory.retired) == {epochs.short_name("e0")}
    same, gain = memory.after("e0", TEN, counts_from_zero=True)
    assert (same, gain) == (memory, {})
    changed, gain = memory.after("e0", TWELVE, counts_from_zero=True)
    assert (gain, set(changed.retired)) == ({}, set()), "how much came to it is not known"
    assert changed.after("e0", {Arm.STABLE: {"requests": 15.0}}, counts_from_zero=True)[1] == {
        Arm.STABLE: {"requests": 3.0}
    }


@pytest.mark.parametrize("over", [0, 1])
def test_once_a_fingerprint_was_given_up_an_unknown_epoch_may_be_an_old_one(over: int) -> None:
    many = {f"{number:08x}": "" for number in range(MAX_RETIRED - 1 + over)}
    memory = heard(range(MAX_EPOCHS + 1), Epochs(retired=many))
    assert (memory.forgetful, len(memory.retired)) == (bool(over), MAX_RETIRED)
    assert ("00000000" in memory.retired) is not bool(over), "the oldest goes"
    _, gain = memory.after("new", TEN, counts_from_zero=True)
    assert gain == ({} if over else TEN)
    assert heard(range(9999, 10_001), memory).forgetful or not over

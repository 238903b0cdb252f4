"""A clock that is set by somebody does not move deadlines."""

from __future__ import annotations

import pytest

from finetune_operator.reconcile.clocks import SteadyClock

START = 1_800_000_000.0


class World:
    """Time passes; `step` is what somebody has set the machine's clock off by."""

    def __init__(self) -> None:
        self.passed = 0.0
        self.step = 0.0
        self.clock = SteadyClock(wall=lambda: START + self.passed + self.step, steady=lambda: self.passed)

    def after(self, seconds: float) -> float:
        """What the clock says then, in seconds since the start."""
        for _ in range(100):
            self.passed += seconds / 100
            self.clock()
        return self.clock().timestamp() - START


@pytest.mark.parametrize("step", [3600.0, -3600.0])
def test_a_step_of_the_clock_is_hardly_noticed(step: float) -> None:
    world = World()
    assert world.after(60) == pytest.approx(60)
    world.step = step
    assert world.clock().timestamp() - START == pytest.approx(60)
    assert abs(world.after(60) - 120) <= 3.1


def test_in_the_end_it_is_right_again() -> None:
    world = World()
    world.step = 10.0
    assert world.after(1000) == pytest.approx(1010)
    world.step = -10.0
    before = world.after(1)
    assert world.after(1) > before, "it never goes back"
    assert world.after(10_000) == pytest.approx(world.passed - 10)

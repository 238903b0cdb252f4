"""What a rollout does, told as stories."""

from __future__ import annotations

from finetune_operator.api.adapterdeployment_status import RolloutPhase, Stage
from tests.unit.rollouts.world import World, reached, revision, serving


def test_the_first_deployment_skips_what_needs_a_comparison() -> None:
    world = World(spec=None).deploy("a")
    world.run(60, until=lambda status: status.stage is Stage.SUCCEEDED)
    status = world.status
    assert (status.phase, status.stable_revision, status.candidate_revision) == (
        "Healthy",
        revision("a"),
        None,
    )
    assert world.everybody_gets() == revision("a")
    assert world.condition("Promoted") == ("True", "Promoted")
    assert world.condition("Available")[0] == "True"
    assert world.history() == [("a", "Promoted")]


def test_a_better_adapter_is_promoted_step_by_step() -> None:
    world = serving().deploy("b")
    weights: list[float] = []
    world.run(1, until=lambda status: status.stage is Stage.LOADING)
    assert world.condition("Promoted")[0] == "False"
    while world.status.stage is not Stage.SUCCEEDED and world.now.hour < 14:
        world.run(2)
        weight = world.routing.weight()
        if not weights or weights[-1] != weight:
            weights.append(weight)
    assert weights == [0, 5, 50, 100, 0]
    assert world.everybody_gets() == revision("b")
    assert world.history() == [("b", "Promoted"), ("a", "Promoted")]
    assert world.condition("Promoted") == ("True", "Promoted")
    assert [adapter.revision for adapter in world.status.adapters] == [revision("b")]


def test_a_bad_adapter_is_rolled_back() -> None:
    world = serving().deploy("b")
    world.evidence.bad = {revision("b")}
    world.run(120)
    status = world.status
    assert (status.phase, status.stage, status.reason) == (
        RolloutPhase.DEGRADED,
        Stage.FAILED,
        "GuardrailBreached",
    )
    assert world.everybody_gets() == revision("a")
    assert status.abort is not None
    assert (status.abort.revision, status.abort.weight) == (revision("b"), 5)
    assert world.history() == [("b", "Aborted"), ("a", "Promoted")]
    assert [adapter.revision for adapter in status.adapters] == [revision("a")]
    assert [item.severity for item in world.announced if item.reason == "GuardrailBreached"] == ["error"]


def test_reached_waits_for_the_routers() -> None:
    world = serving().deploy("b")
    world.run(60, until=reached(Stage.CANARY, 1))
    assert world.routing.weight() == 5

"""Times that run, stand still and never begin anew."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from finetune_operator.api.adapterdeployment_status import Check, CheckKind, CheckPhase, Measurements, Stage
from finetune_operator.core import rollout_metrics
from tests.unit.rollouts.world import World, reached, revision, serving

STEPS: list[dict[str, Any]] = [
    {"setWeight": 10},
    {"pause": {"duration": "1m"}},
    {"setWeight": 50},
    {"pause": {}},
]


def canary(steps: list[dict[str, Any]] | None = None) -> World:
    world = serving(steps=steps or STEPS).deploy("b")
    world.run(30, until=lambda status: status.current_step_index == 1 and status.step_start_time is not None)
    return world


def seconds_until_left(world: World) -> float:
    began = world.now
    world.run(600, until=lambda status: status.current_step_index != 1 or status.stage is not Stage.CANARY)
    return (world.now - began).total_seconds()


@pytest.mark.parametrize("by", ["verb", "spec"])
def test_a_pause_by_a_user_stops_the_clock_of_a_timed_step(by: str) -> None:
    world = canary()
    world.run(20)
    if by == "verb":
        world.say("pause").run(500)
        world.say("resume")
    else:
        world.edit(lambda spec: spec.update(paused=True)).run(500)
        world.edit(lambda spec: spec.update(paused=False))
    assert world.routing.weight() == 10
    assert 33 <= seconds_until_left(world) <= 44


def test_a_pause_by_a_user_stops_the_clock_of_an_approval() -> None:
    world = canary([{"setWeight": 10}, {"approval": {"timeout": "1m", "onTimeout": "Abort"}}])
    world.run(20)
    world.say("pause").run(500)
    assert world.status.abort is None
    world.say("resume").run(20)
    assert world.status.abort is None
    world.run(40)
    assert world.status.reason == "ApprovalTimedOut"


def test_pauses_that_overlap_count_once() -> None:
    world = canary()
    world.run(10)
    world.evidence.skewed = True
    world.run(30)
    assert {pause.reason for pause in world.status.pause_conditions} >= {"SampleRatioMismatch"}
    world.edit(lambda spec: spec.update(paused=True)).run(100)
    world.edit(lambda spec: spec.update(paused=False)).run(50)
    world.say("resume")
    assert 25 <= seconds_until_left(world) <= 52, "ten to twenty seconds had counted"


def test_a_killed_operator_restarts_no_clock() -> None:
    """As if it died in every single pass, for the whole step."""
    world = canary()
    began, start = world.now, world.status.step_start_time
    while world.status.current_step_index == 1:
        assert world.status.step_start_time == start
        world.evidence.heard = world.now
        world.killed = lambda point: point == "route"
        world.step()
        world.advance(3)
    assert 57 <= (world.now - began).total_seconds() <= 66


def test_waits_of_a_gate_and_of_a_step_have_their_own_deadlines() -> None:
    """A pause longer than the deadline is no lack of progress, and the gate after it has all its time."""
    hook = {"name": "gate", "type": "confirm-traffic-increase", "url": "http://hooks"}
    steps: list[dict[str, Any]] = [{"setWeight": 10}, {"pause": {"duration": "5m"}}, {"setWeight": 50}]
    world = serving(steps=steps, progressDeadlineSeconds=60)
    world.edit(lambda spec: spec.update(webhooks=[hook]))
    allowed = True
    world.answers = lambda name, kind: allowed
    world.deploy("b").run(60, until=reached(Stage.CANARY, 1))
    allowed = False
    world.run(300)
    world.run(40)
    assert world.status.abort is None
    assert world.status.step == "3/3 setWeight 50"
    world.run(40)
    assert world.status.reason == "ProgressDeadlineExceeded"


def test_the_former_revision_is_unloaded_when_its_time_has_come() -> None:
    world = serving(steps=[], canary={"scaleDownDelaySeconds": 100}).deploy("b")
    world.run(60, until=lambda status: status.stable_revision == revision("b"))
    promoted = world.now
    former = world.status.adapters[0]
    assert former.unload_at is not None
    assert abs(former.unload_at - promoted - timedelta(seconds=100)) < timedelta(seconds=2)
    assert world.status.stage is Stage.FINALISING
    world.run(90)
    assert all(len(engine.held) == 2 for engine in world.engines)
    world.run(20)
    assert all(set(engine.held) == {f"bot--{revision('b')}"} for engine in world.engines)
    assert world.status.stage.value == "Succeeded"


def test_a_clock_that_was_set_back_keeps_no_former_revision_loaded_for_longer() -> None:
    world = serving(steps=[], canary={"scaleDownDelaySeconds": 100}).deploy("b")
    world.run(60, until=lambda status: status.stable_revision == revision("b"))
    world.run(5)
    world.now -= timedelta(days=1)
    world.run(130)
    assert all(set(engine.held) == {f"bot--{revision('b')}"} for engine in world.engines)
    assert world.status.stage is Stage.SUCCEEDED


@pytest.mark.parametrize("is_paused", [False, True])
def test_a_clock_that_was_set_back_makes_no_wait_longer(is_paused: bool) -> None:
    """The next operator may run on a machine whose clock is behind."""
    world = canary().run(20)
    if is_paused:
        world.say("pause").run(5)
    world.now -= timedelta(hours=1)
    world.evidence.heard = world.now
    world.run(5)
    if is_paused:
        assert world.status.pause_conditions[0].start_time <= world.now
        world.run(200)
        assert world.routing.weight() == 10, "its pause is no time of the step"
        world.say("resume")
    assert 50 <= seconds_until_left(world) <= 66, "all of the step at most"


def test_a_clock_that_was_set_back_keeps_no_metric_from_being_measured() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    for ago, due in ((-3600, True), (0, False), (20, False), (30, True)):
        measured = Measurements(last_time=now - timedelta(seconds=ago))
        check = Check(name="m", kind=CheckKind.METRIC, phase=CheckPhase.SUCCESSFUL, measurements=measured)
        assert rollout_metrics.due(check, interval=30, now=now) is due


def test_a_quiet_status_is_not_written_again_and_again() -> None:
    """Nothing in a status changes by itself: pauses, holds and waits name times, not ages."""
    world = canary([{"setWeight": 10}, {"pause": {}}])
    world.run(30)
    world.evidence.seconds_to_proof = 1e9
    for change in (
        lambda: None,
        lambda: setattr(world.evidence, "mode", "missing"),
        lambda: setattr(world.engines[1], "reachable", False),
        lambda: world.say("pause"),
    ):
        change()
        world.run(40)
        stored = []
        for _ in range(10):  # time passes and nothing else
            world.now += timedelta(seconds=1)
            world.step()
            stored.append(world.stored)
        assert len(set(stored[2:])) == 1, world.status.message

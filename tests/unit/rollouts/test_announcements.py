"""What is told is told once, whatever the operator dies of; and what is alarming is told at all."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.api.adapterdeployment_status import Stage
from finetune_operator.core import rollout_events
from tests.unit.rollouts.world import World, reached, revision, serving

STEPS: list[dict[str, Any]] = [{"setWeight": 25}, {"pause": {"duration": "1m"}}]


def reasons(world: World) -> list[str]:
    return [item.reason for item in world.announced]


@pytest.mark.parametrize("bad", [False, True], ids=["promoted", "rolled back"])
@pytest.mark.parametrize("point", ["status", "route", "action"])
def test_each_transition_is_told_once_however_often_the_operator_is_killed(point: str, bad: bool) -> None:
    def story(dies: bool) -> World:
        world = serving(steps=STEPS)
        world.announced = []
        world.evidence.bad = {revision("b")} if bad else set()
        passes = [0]

        def killed(where: str) -> bool:
            passes[0] += where == "status"
            return dies and where.startswith(point) and passes[0] % 2 == 1

        world.killed = killed
        return world.deploy("b").run(200)

    undisturbed, disturbed = story(dies=False), story(dies=True)
    assert disturbed.kills
    assert reasons(undisturbed)
    assert reasons(disturbed) == reasons(undisturbed)
    names = [item.name for item in disturbed.announced]
    assert len(set(names)) == len(names)


def test_the_status_keeps_an_announcement_until_it_is_told() -> None:
    world = serving(steps=STEPS)
    world.killed = lambda where: where == "status"
    world.deploy("b").step()
    (waiting,) = world.status.announcements
    assert (waiting.reason, waiting.time) == ("RolloutStarted", world.now.replace(microsecond=0))
    assert waiting.name.startswith("bot.")
    world.killed = lambda where: False
    world.run(5)
    assert "RolloutStarted" not in [item.reason for item in world.status.announcements]


def test_what_nobody_can_tell_does_not_fill_the_status() -> None:
    world = serving(steps=[])
    world.killed = lambda where: where == "status"
    for number in range(40):
        world.say(f"dance/{number}").step()
        world.annotation = None
        world.advance(1)
        world.step()
    assert len(world.status.announcements) == rollout_events.MAX_ANNOUNCEMENTS
    assert "dance/39" in world.status.announcements[-1].message


# ---------------------------------------------------------------- routers that are behind


def test_a_router_that_stays_behind_is_told_by_name_and_one_that_takes_a_moment_is_not() -> None:
    world = serving(steps=STEPS)
    world.announced = []
    world.routing.delay_seconds = 10
    world.deploy("b").run(60, until=reached(Stage.CANARY, 1))
    assert "RoutersBehind" not in reasons(world)
    world.routing.routers[1].reachable = False
    world.say("abort").run(60)
    alarms = [item for item in world.announced if item.reason == "RoutersBehind"]
    assert [item.severity for item in alarms] == ["warn"]
    assert "http://r1:8081" in alarms[0].message
    assert world.status.weights is not None
    assert world.status.weights.pending_since is not None
    world.routing.routers[1].reachable = True
    world.run(30)
    assert world.status.stage is Stage.FAILED
    assert world.status.weights is not None
    assert world.status.weights.pending_since is None
    assert reasons(world).count("RoutersBehind") == 1


def test_routes_that_cannot_be_stored_are_said_and_hold_nothing() -> None:
    world = serving(steps=STEPS)
    world.announced = []
    world.not_stored = "the routes take 1200000 bytes and the ConfigMap holds 1048576"
    world.run(5)
    assert world.condition("RoutesStored") == ("False", "NotStored")
    assert [item.severity for item in world.announced if item.reason == "NotStored"] == ["warn"]
    world.deploy("b").run(200)
    assert world.everybody_gets() == revision("b")
    world.not_stored = None
    world.run(5)
    assert world.condition("RoutesStored") == ("True", "Stored")

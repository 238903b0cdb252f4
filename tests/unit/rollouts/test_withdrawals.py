"""While the status cannot be written: harm leaves the route, nothing else moves, and it is recorded afterwards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from finetune_operator.api.adapterdeployment_status import AbortReason, Stage
from finetune_operator.core import rollouts
from finetune_operator.core.rollout_facts import Observed
from tests.unit.rollouts.world import World, reached, revision, serving

STEPS: list[dict[str, Any]] = [{"setWeight": 25}, {"pause": {"duration": "1m"}}, {"setWeight": 50}]
AWAY = "they are not looked at while the status cannot be written"


def canary() -> World:
    world = serving(steps=STEPS).deploy("b")
    world.run(30, until=reached(Stage.CANARY, 1))
    return world.run(5)


def from_memory(world: World) -> Observed:
    """What is known when the API server is away: no engine is looked at, no artifact, no verb."""
    seen = world.observe()
    return replace(seen, engines=(), engines_problem=AWAY, deployment=replace(seen.deployment, action=None))


def test_a_good_candidate_stays_as_it_is() -> None:
    world = canary()
    for _ in range(100):  # the pause is long over: what needs a record waits for it
        world.advance(1)
        assert rollouts.withdraw(from_memory(world), now=world.now) is None


def test_harm_leaves_the_route_and_is_recorded_when_that_is_possible() -> None:
    world = canary()
    world.evidence.bad = {revision("b")}
    world.advance(20)
    found = rollouts.withdraw(from_memory(world), now=world.now)
    assert found is not None
    withdrawal, route = found
    assert (route.weight, route.mirror, route.candidate) == (0, 0, None)
    assert route.stable == (world.routing.route and world.routing.route.stable), "the same engines as before"
    assert withdrawal.reason is AbortReason.GUARDRAIL_BREACHED

    world.routing.publish(route, now=world.now)
    world.withdrawal = withdrawal
    world.advance(20)
    version = world.routing.version
    again = rollouts.withdraw(from_memory(world), now=world.now)
    assert again is not None
    assert again[1] == route, "it does not flap"

    world.evidence.bad = set()  # what was found counts, also where it could not be found a second time
    world.run(30)
    assert world.status.stage is Stage.FAILED
    assert world.status.abort is not None
    assert world.status.abort.reason is AbortReason.GUARDRAIL_BREACHED
    assert "when the status could not be written" in world.status.abort.message
    assert world.status.abort.weight == 25
    assert world.routing.version == version, "the route that is recorded is the one that is published"


def test_nothing_is_withdrawn_from_a_route_that_is_not_ours_to_change() -> None:
    world = canary()
    world.evidence.bad = {revision("b")}
    world.advance(20)
    seen = from_memory(world)
    for other in (
        replace(seen, deployment=replace(seen.deployment, deleting=True)),
        replace(seen, deployment=replace(seen.deployment, spec=None)),
        replace(seen, routing=replace(seen.routing, alias_taken_by="team/other")),
    ):
        assert rollouts.withdraw(other, now=world.now) is None


def test_a_withdrawal_is_of_one_rollout_only() -> None:
    world = canary()
    world.evidence.bad = {revision("b")}
    world.advance(20)
    found = rollouts.withdraw(from_memory(world), now=world.now)
    assert found is not None
    world.evidence.bad = set()
    world.run(20)
    world.withdrawal = found[0]
    world.deploy("c").run(200)
    assert world.status.stable_revision == revision("c")


def test_nothing_is_withdrawn_that_has_no_requests() -> None:
    world = serving(steps=STEPS)
    world.evidence.bad = {revision("a"), revision("b")}
    assert rollouts.withdraw(from_memory(world), now=world.now) is None
    world.deploy("b").step()
    assert rollouts.withdraw(from_memory(world), now=world.now) is None


# ---------------------------------------------------------------- engines that may not be asked


def test_engines_that_are_not_allowed_are_said_and_what_serves_goes_on() -> None:
    world = serving(steps=STEPS)
    world.refusal = world.engines_problem = "spec.serving.endpoint: http://evil:1 is not among the engines"
    engines, world.engines = world.engines, []
    world.run(30)
    assert world.condition("InvalidSpec") == ("True", "EndpointNotAllowed")
    assert "http://evil:1" in (world.status.message or "")
    assert world.everybody_gets() == revision("a")
    assert [item.severity for item in world.announced if item.reason == "EndpointNotAllowed"] == ["warn"]
    world.deploy("b").run(30)
    assert world.status.reason == "EndpointNotAllowed"
    assert world.everybody_gets() == revision("a")
    world.refusal = world.engines_problem = None
    world.engines = engines
    world.run(300)
    assert world.everybody_gets() == revision("b")
    assert world.condition("InvalidSpec") == ("False", "Accepted")

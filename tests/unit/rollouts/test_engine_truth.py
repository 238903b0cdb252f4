"""Engines that lose, refuse, restart, come and fall silent: only what they say they have is routed to."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from finetune_operator.api.adapterdeployment_status import Stage
from finetune_operator.core.rollout_facts import Load
from tests.unit.rollouts.engines import SimulatedEngine
from tests.unit.rollouts.world import World, reached, revision, serving

A, B = f"bot--{revision('a')}", f"bot--{revision('b')}"
STEPS: list[dict[str, Any]] = [
    {"setWeight": 10},
    {"pause": {"duration": "1m"}},
    {"setWeight": 50},
    {"pause": {}},
]


def canary(**more: Any) -> World:
    world = serving(steps=STEPS, **more).deploy("b")
    world.run(30, until=reached(Stage.CANARY, 1))
    return world.run(2)


def targets(world: World) -> tuple[set[str], set[str]]:
    """Hosts that get requests for the stable revision and for the candidate."""
    route = world.routing.route
    assert route is not None
    stable = route.stable.upstreams if route.stable else ()
    candidate = route.candidate.upstreams if route.candidate else ()
    return {url[7:9] for url in stable}, {url[7:9] for url in candidate}


# ---------------------------------------------------------------- lost


def test_an_engine_that_lost_the_candidate_gets_none_of_its_requests_and_the_weight_is_held() -> None:
    world = canary()
    world.engines[1].held.pop(B)
    world.engines[1].load_seconds = 120
    world.run(100)
    assert targets(world) == ({"e1", "e2"}, {"e1"})
    assert world.routing.weight() == 10
    assert world.status.reason == "AdapterMissing"
    assert "1 of 2 engines have bot--bbbbbbbb" in (world.status.message or "")
    assert world.condition("AdaptersLoaded")[0] == "False"
    world.run(30)
    assert targets(world)[1] == {"e1", "e2"}
    assert world.routing.weight() == 50, "its minute was over meanwhile"


def test_a_candidate_that_all_engines_lost_gets_no_requests_and_its_time_does_not_count() -> None:
    world = canary()
    world.run(18)
    began = world.status.step_start_time
    assert began is not None
    for engine in world.engines:
        engine.load_seconds = 100
        engine.restart(world.now)
        engine.held[A].state = "Loaded"
    world.run(60)
    assert targets(world) == ({"e1", "e2"}, set())
    assert world.routing.weight() == 0
    assert world.status.weights is not None
    assert world.status.weights.candidate == 10, "what is meant is kept"
    assert world.condition("TrafficRouted") == ("False", "CandidateLost")
    assert any(item.reason == "CandidateLost" for item in world.announced)
    world.run(50)
    assert world.routing.weight() == 10
    moved = world.status.step_start_time
    assert moved is not None
    assert 98 <= (moved - began).total_seconds() <= 110
    world.run(15)
    assert world.routing.weight() == 10, "forty seconds were left"
    world.run(30)
    assert world.routing.weight() == 50


def test_a_candidate_that_does_not_come_back_is_rolled_back_at_the_deadline() -> None:
    world = canary(progressDeadlineSeconds=60)
    world.run(30)
    for engine in world.engines:
        engine.held.pop(B)
        engine.refusals[B] = "LoadFailed"
    world.run(50)
    assert world.status.stage is Stage.CANARY, "the deadline counts from the loss"
    world.run(30)
    assert world.status.reason == "AdapterLoadFailed"
    assert "LoadFailed by design" in (world.status.message or "")


def test_a_stable_revision_on_no_engine_is_said_loudly_and_nobody_else_answers_for_it() -> None:
    world = canary(progressDeadlineSeconds=60)
    for engine in world.engines:
        engine.held.pop(A)
        engine.load_seconds = 200
    world.run(150)
    assert targets(world) == (set(), {"e1", "e2"})
    assert world.routing.weight() == 10
    assert (world.status.phase, world.status.reason) == ("Degraded", "StableLost")
    assert world.condition("Available") == ("False", "StableLost")
    assert "503" in (world.status.message or "")
    assert [item.severity for item in world.announced if item.reason == "StableLost"] == ["error"]
    assert world.status.abort is None, "there is nothing to go back to"
    world.run(60)
    assert targets(world) == ({"e1", "e2"}, {"e1", "e2"})
    assert world.status.phase != "Degraded"


def test_harm_goes_back_even_when_stable_is_on_no_engine() -> None:
    world = canary()
    for engine in world.engines:
        engine.held.pop(A)
        engine.load_seconds = 30
    world.evidence.bad = {revision("b")}
    world.run(20)
    assert world.status.abort is not None
    world.run(60)
    assert world.everybody_gets() == revision("a")


def test_an_engine_restart_while_serving_is_noticed_and_mended() -> None:
    world = serving()
    world.engines[0].replace()
    world.run(20)
    assert targets(world)[0] == {"e1", "e2"}
    assert world.status.phase == "Healthy"
    assert any(plan.status.phase == "Degraded" for plan in world.plans[-40:])


# ---------------------------------------------------------------- silence


def test_a_silent_agent_is_no_proof_of_a_loss_but_holds_the_weight() -> None:
    world = canary(progressDeadlineSeconds=60)
    for engine in world.engines:
        engine.reachable = False
    world.run(300)
    assert targets(world) == ({"e1", "e2"}, {"e1", "e2"}), "what is published stays"
    assert world.routing.weight() == 10
    assert world.status.reason == "AgentSilent"
    assert "the agent of http://e1:8000 (connection refused) and 1 more does not" in (
        world.status.message or ""
    )
    assert world.status.abort is None
    for engine in world.engines:
        engine.reachable = True
    world.run(30)
    assert world.routing.weight() == 50


def test_without_any_known_engine_the_route_stays_while_the_reason_lasts() -> None:
    world = canary()
    gone, world.engines, world.engines_problem = world.engines, [], "the name engine does not resolve"
    world.run(100)
    assert targets(world) == ({"e1", "e2"}, {"e1", "e2"})
    assert world.routing.weight() == 10
    assert world.status.reason == "NoEngines"
    assert ": the name engine does not resolve; what is published stays" in (world.status.message or "")
    world.engines, world.engines_problem = gone, None
    world.run(30)
    assert world.routing.weight() == 50


def test_an_engine_that_is_gone_leaves_the_route() -> None:
    world = serving()
    world.engines.pop()
    world.run(20)
    assert targets(world)[0] == {"e1"}
    assert world.status.phase == "Healthy"


# ---------------------------------------------------------------- new engines


def test_a_new_engine_loads_before_it_counts() -> None:
    world = canary()
    world.engines.append(SimulatedEngine("http://e3:8000", load_seconds=90))
    world.run(80)
    assert targets(world) == ({"e1", "e2"}, {"e1", "e2"})
    assert world.routing.weight() == 10, "held until it has both"
    world.run(30)
    assert targets(world) == ({"e1", "e2", "e3"}, {"e1", "e2", "e3"})
    assert world.routing.weight() == 50


def test_engines_that_are_replaced_serve_until_one_of_the_new_ones_has_it() -> None:
    world = canary()
    world.engines = [SimulatedEngine("http://e3:8000", load_seconds=30)]
    world.run(20)
    assert targets(world) == ({"e1", "e2"}, {"e1", "e2"})
    assert world.routing.weight() == 10
    assert world.condition("Available") == ("Unknown", "EnginesReplaced")
    assert world.condition("AdaptersLoaded") == ("False", "Loading")
    for part in ("http://e1:8000, http://e2:8000 until an engine", "http://e3:8000: Loading"):
        assert part in (world.status.message or "")
    world.run(30)
    assert targets(world) == ({"e3"}, {"e3"})
    assert world.condition("Available") == ("True", "Serving")
    world.run(60)
    assert world.routing.weight() == 50


def test_engines_that_nothing_replaces_are_told_once_and_within_a_minute_or_two() -> None:
    """They may be dead, and users get 502: nobody but the routers knows."""
    world = serving(steps=[])
    world.engines = [SimulatedEngine("http://e3:8000", refusals={A: "LoadFailed"})]
    world.announced = []
    world.run(50)
    assert world.condition("Available") == ("Unknown", "EnginesReplaced")
    assert world.announced == []
    world.run(600)
    assert world.condition("Available") == ("Unknown", "EnginesNotReplaced")
    (told,) = world.announced
    assert (told.severity, told.reason) == ("warn", "EnginesNotReplaced")
    for part in ("http://e1:8000, http://e2:8000", "502", "http://e3:8000: Failed (LoadFailed"):
        assert part in told.message
    world.engines[0].refusals.clear()
    world.run(60)
    assert world.condition("Available") == ("True", "Serving")


def test_a_candidate_leaves_a_replaced_pod_with_stable_so_that_a_dead_one_is_no_failure_of_its_own() -> None:
    world = canary()
    new = SimulatedEngine("http://e3:8000", refusals={B: "CapacityFull"})
    world.engines = [new]
    world.run(20)
    assert targets(world) == ({"e3"}, set())
    new.refusals.clear()
    world.run(60)
    assert targets(world) == ({"e3"}, {"e3"})


def test_a_weight_does_not_rise_while_replaced_engines_serve_and_the_new_ones_are_not_ready() -> None:
    world = canary()
    world.engines = [SimulatedEngine("http://e3:8000", ready=False)]
    world.run(100)
    assert targets(world) == ({"e1", "e2"}, {"e1", "e2"})
    assert world.routing.weight() == 10
    assert world.status.reason == "AdapterMissing"
    assert "none of them is ready" in (world.status.message or "")


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize("reason", ["DigestMismatch", "IncompatibleBase", "RankTooLarge"])
def test_what_no_engine_will_ever_load_is_rolled_back_at_once_and_retry_tries_anew(reason: str) -> None:
    world = serving(steps=STEPS)
    for engine in world.engines:
        engine.refusals[B] = reason
    world.deploy("b").run(10)
    assert world.status.reason == "AdapterLoadFailed"
    assert reason in (world.status.message or "")
    for engine in world.engines:
        engine.refusals = {}
    world.say("retry").run(20)
    assert world.routing.weight() == 10


def test_a_load_that_fails_is_tried_again_until_the_deadline() -> None:
    world = serving(steps=STEPS, progressDeadlineSeconds=60)
    world.engines[0].refusals[B] = "DownloadFailed"
    world.deploy("b").run(40)
    assert world.status.stage is Stage.LOADING
    assert "DownloadFailed by design" in (world.status.message or "")
    assert world.engines[0].loads > 5
    world.run(40)
    assert world.status.reason == "AdapterLoadFailed"
    assert world.everybody_gets() == revision("a")


def test_an_adapter_with_too_high_a_rank_is_not_even_sent() -> None:
    world = serving(steps=STEPS)
    world.deploy("b", rank=128).run(10)
    assert (world.status.stage, world.status.reason) == (Stage.LOADING, "RankTooLarge")
    assert "--max-lora-rank 128" in (world.status.message or "")
    assert world.condition("BaseModelCompatible") == ("False", "RankTooLarge")
    assert not any(isinstance(a, Load) and a.served_name == B for plan in world.plans for a in plan.actions)
    for engine in world.engines:
        engine.max_rank = 128
    world.run(15)
    assert world.routing.weight() == 10, "goes on by itself"


def test_engines_with_another_base_model_are_named() -> None:
    world = World(spec=None)
    for engine in world.engines:
        engine.base_models = ("other",)
        engine.refusals[A] = "LoadFailed"
    world.deploy("a").run(10)
    assert world.condition("BaseModelCompatible") == ("False", "IncompatibleBase")
    assert "serves other and not tiny" in (world.status.message or "")


def test_without_engines_the_first_deployment_waits_and_says_so() -> None:
    world = World(spec=None)
    world.engines = []
    world.deploy("a", progressDeadlineSeconds=60).run(30)
    assert world.status.reason == "NoEngines"
    world.run(60)
    assert world.status.reason == "ProgressDeadlineExceeded"
    assert world.status.phase == "Degraded"


# ---------------------------------------------------------------- room


def test_full_engines_are_named_with_their_numbers_and_stable_is_not_evicted() -> None:
    world = serving(steps=STEPS, progressDeadlineSeconds=60)
    for engine in world.engines:
        engine.max_loras = 1
    world.deploy("b").run(30)
    assert world.condition("CapacityOK") == ("False", "CapacityFull")
    assert "1 of 1 adapters loaded and no room for bot--bbbbbbbb" in (world.status.message or "")
    assert targets(world)[0] == {"e1", "e2"}
    world.engines[0].max_loras = world.engines[1].max_loras = 2
    world.run(20)
    assert world.routing.weight() == 10


def test_a_former_revision_makes_room_before_its_time() -> None:
    world = serving(steps=[])
    for engine in world.engines:
        engine.max_loras = 2
    world.deploy("b").run(20)
    assert all(set(engine.held) == {A, B} for engine in world.engines)
    world.deploy("c").run(20)
    assert world.everybody_gets() == revision("c")
    assert all(A not in engine.held for engine in world.engines)


# ---------------------------------------------------------------- unloading


def test_an_unload_waits_for_every_router() -> None:
    world = canary()
    world.routing.routers[0].reachable = False
    world.say("abort").run(100)
    assert world.condition("TrafficRouted") == ("False", "RoutersBehind")
    assert all(B in engine.held for engine in world.engines), (
        "the silent router may still send requests there"
    )
    world.routing.routers[0].reachable = True
    world.run(20)
    assert world.status.stage is Stage.FAILED
    assert all(B not in engine.held for engine in world.engines)


def test_the_deadline_does_not_count_while_somebody_paused() -> None:
    world = serving(steps=STEPS, progressDeadlineSeconds=60)
    for engine in world.engines:
        engine.refusals[B] = "DownloadFailed"
    world.deploy("b").run(30)
    world.say("pause").run(300)
    assert world.status.stage is Stage.LOADING
    paused = world.status.last_progress_time
    world.say("resume").run(2)
    assert world.status.last_progress_time is not None
    assert paused is not None
    assert world.status.last_progress_time - paused >= timedelta(seconds=295)
    world.run(20)
    assert world.status.stage is Stage.LOADING
    world.run(30)
    assert world.status.reason == "AdapterLoadFailed"

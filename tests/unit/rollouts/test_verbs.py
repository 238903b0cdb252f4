"""What people say, obeyed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from finetune_operator.api.adapterdeployment_status import Stage, TakenAction
from finetune_operator.core.rollout_facts import ClearAction, Wanted
from tests.unit.rollouts.world import World, reached, revision, serving

WAITING: list[dict[str, Any]] = [
    {"setWeight": 5},
    {"pause": {}},
    {"setWeight": 25},
    {"pause": {}},
    {"setWeight": 50},
    {"pause": {}},
]


def paused_at_five(**more: Any) -> World:
    world = serving(steps=WAITING, canary={"scaleDownDelaySeconds": 20}, **more).deploy("b")
    world.run(30, until=reached(Stage.CANARY, 1))
    world.run(5)
    assert world.routing.weight() == 5
    return world


def taken(world: World) -> TakenAction:
    action = world.status.last_action
    assert action is not None
    return action


# ---------------------------------------------------------------- once


def test_a_verb_is_recorded_with_what_it_did_and_then_the_annotation_goes() -> None:
    world = paused_at_five().say("promote/3fa4c1d2")
    plan = world.step()
    assert plan is not None
    assert ClearAction("promote/3fa4c1d2") in plan.actions
    assert (taken(world).value, taken(world).pending, taken(world).refused) == (
        "promote/3fa4c1d2",
        True,
        False,
    )
    assert world.annotation is None
    world.step()
    assert taken(world).pending is False
    world.run(10)
    assert world.status.current_step_index == 3, "one step, not two"


@pytest.mark.parametrize("point", ["status", "route", "action"])
def test_a_verb_is_obeyed_once_though_the_operator_dies_before_the_annotation_is_gone(point: str) -> None:
    world = paused_at_five()
    world.edit(lambda spec: spec["strategy"]["canary"].update(steps=[{"setWeight": 5}, *[{"pause": {}}] * 6]))
    world.run(10)
    assert world.status.current_step_index == 1
    world.say("promote")
    deaths = iter(range(3))
    world.killed = lambda where: where.startswith(point) and next(deaths, None) is not None
    world.run(20)
    assert world.kills >= 1
    assert world.status.current_step_index == 2
    assert world.annotation is None


def test_the_same_verb_counts_again_when_it_is_said_again() -> None:
    world = paused_at_five()
    for index in (3, 5):
        world.say("promote").run(10)
        assert world.status.current_step_index == index


def test_several_verbs_in_sequence() -> None:
    world = paused_at_five()
    for verb in ("pause/1", "resume/2", "pause/3", "abort/4", "retry/5"):
        world.say(verb).run(3)
    world.run(20)
    assert taken(world).value == "retry/5"
    assert world.status.stage is Stage.CANARY
    assert world.history() == [("b", "Aborted"), ("a", "Promoted")]
    assert world.routing.weight() == 5


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "verb", ["promote", "promote-full", "abort", "pause", "resume", "retry", "dance", "rollback"]
)
def test_a_verb_that_makes_no_sense_is_refused_with_a_reason(verb: str) -> None:
    world = serving().say(verb)
    before = world.status
    world.run(3)
    assert taken(world).refused
    assert taken(world).message
    assert world.annotation is None
    changed = {"last_action", "conditions", "announcements"}
    assert world.status.model_dump(exclude=changed) == before.model_dump(exclude=changed)
    assert any(item.reason == "ActionRefused" and item.severity == "warn" for item in world.announced)


def test_promote_is_refused_while_the_spec_says_paused() -> None:
    world = paused_at_five()
    world.edit(lambda spec: spec.update(paused=True))
    for verb in ("promote", "promote-full", "resume"):
        world.say(verb).run(2)
        assert taken(world).refused
        assert "spec.paused" in (taken(world).message or "")
    assert world.routing.weight() == 5


# ---------------------------------------------------------------- what they do


def test_promote_full_leaves_out_all_steps() -> None:
    world = paused_at_five().say("promote-full").run(10)
    assert world.everybody_gets() == revision("b")
    assert world.history()[0] == ("b", "FastPromoted")


def test_promote_full_while_loading_waits_for_the_engines_only() -> None:
    world = serving(steps=WAITING).deploy("b")
    world.run(5, until=reached(Stage.LOADING))
    world.say("promote").run(1)
    assert taken(world).refused
    assert "no step to leave in stage Loading; `promote-full` leaves all" in (taken(world).message or "")
    world.say("promote-full").run(20)
    assert world.everybody_gets() == revision("b")
    assert world.history()[0] == ("b", "FastPromoted")


def test_abort_and_retry() -> None:
    world = paused_at_five().say("abort").run(120)
    assert world.status.reason == "UserAbort"
    assert world.everybody_gets() == revision("a")
    assert all(f"bot--{revision('b')}" not in engine.held for engine in world.engines), (
        "unloaded after its delay"
    )
    began = world.status.rollout_start_time
    world.say("retry").run(20)
    assert world.routing.weight() == 5
    assert world.status.abort is None
    assert world.status.rollout_start_time != began, "its evidence begins anew"


def test_a_retry_in_the_very_second_of_the_first_try_is_another_rollout() -> None:
    """Revision and start name the evidence, and times are stored as whole seconds."""
    world = serving(steps=WAITING).deploy("b")
    world.step()
    began = world.status.rollout_start_time
    world.say("abort/1").step()
    world.say("retry/2").step()
    assert world.status.rollout_start_time != began
    assert world.status.stage is Stage.LOADING


def test_rollback_during_a_rollout_aborts_it() -> None:
    world = paused_at_five().say("rollback").run(10)
    assert world.history()[0] == ("b", "Aborted")
    assert world.everybody_gets() == revision("a")


@pytest.mark.parametrize("wait", [5, 120])
def test_rollback_returns_to_the_revision_that_served_before_and_stays_there(wait: float) -> None:
    """Within scaleDownDelaySeconds it is loaded still; later it is loaded first."""
    world = paused_at_five().say("promote-full").run(10 + wait)
    loads = sum(engine.loads for engine in world.engines)
    said = world.now
    world.say("rollback")
    world.run(60, until=lambda status: status.stable_revision == revision("a"))
    assert (world.now - said).total_seconds() < (4 if wait == 5 else 12)
    assert (sum(engine.loads for engine in world.engines) == loads) is (wait == 5)
    world.run(300)
    assert world.everybody_gets() == revision("a"), "though spec names b"
    assert world.history()[0] == ("a", "FastRolledBack")
    assert (world.status.phase, world.status.reason) == ("Degraded", "UserAbort")
    assert world.condition("Promoted") == ("False", "UserAbort")
    world.say("retry").run(60)
    assert world.everybody_gets() == revision("b")
    world.deploy("a").run(60)
    assert world.status.phase == "Healthy"


def test_a_rollback_that_fails_leaves_what_spec_names_barred() -> None:
    world = paused_at_five(progressDeadlineSeconds=30).say("promote-full").run(60)
    world.deploy("c").run(20)
    world.say("abort").run(60)
    assert world.status.stable_revision == revision("b")
    for engine in world.engines:
        engine.refusals[f"bot--{revision('a')}"] = "DownloadFailed"
    world.say("rollback").run(120)
    status = world.status
    assert status.stable_revision == revision("b")
    assert status.abort is not None
    assert status.abort.revision == revision("c"), "c does not come back by itself"
    assert "the return to aaaaaaaa failed" in status.abort.message
    assert status.phase == "Degraded"


def test_a_second_rollback_brings_back_what_spec_names_and_says_so() -> None:
    world = serving(steps=[], canary={"scaleDownDelaySeconds": 600}).deploy("b")
    world.run(20)
    world.say("rollback/1").run(20)
    assert (world.status.phase, world.everybody_gets()) == ("Degraded", revision("a"))
    world.say("rollback/2").run(20)
    assert (world.status.phase, world.everybody_gets()) == ("Healthy", revision("b"))
    assert world.status.abort is None
    assert world.condition("Promoted")[0] == "True"


def test_after_a_rollback_a_job_that_is_still_running_is_what_is_waited_for() -> None:
    world = serving(steps=[], canary={"scaleDownDelaySeconds": 600}).deploy("b")
    world.run(20)
    world.say("rollback").run(20)
    world.deploy("c")
    world.wanted = Wanted(reason="WaitingForFineTuneJob", message="FineTuneJob job-c is Running")
    world.run(20)
    assert (world.status.phase, world.status.reason) == ("Progressing", "WaitingForFineTuneJob")
    world.say("retry").run(10)
    assert taken(world).refused, "the revision that was left is no longer named by spec"
    assert world.everybody_gets() == revision("a")


def test_a_return_that_was_cut_short_can_be_asked_for_again() -> None:
    world = serving(steps=[], canary={"scaleDownDelaySeconds": 600}).deploy("b")
    world.run(20)
    world.deploy("a").run(2, until=lambda status: status.candidate_revision == revision("a"))
    world.deploy("b").run(20)
    assert world.history()[0] == ("a", "RolledBack")
    world.say("rollback").run(20)
    assert world.everybody_gets() == revision("a")


def test_rollback_without_a_former_revision_is_refused() -> None:
    world = serving().say("rollback").run(3)
    assert taken(world).refused
    assert "no revision served before" in (taken(world).message or "")


def test_pause_by_hand_and_by_spec() -> None:
    world = paused_at_five().say("pause").run(2)
    assert world.status.reason in ("UserPause", "CanaryPauseStep")
    world.say("promote").run(10)
    assert world.routing.weight() == 25, "promote goes on after a pause by hand"
    world.say("pause").run(3)
    assert world.condition("Paused")[0] == "True"
    world.say("resume").run(3)
    assert [pause.reason for pause in world.status.pause_conditions] == ["CanaryPauseStep"]
    world.edit(lambda spec: spec.update(paused=True)).run(3)
    assert "UserPause" in [pause.reason for pause in world.status.pause_conditions]
    world.edit(lambda spec: spec.update(paused=False)).run(3)
    assert [pause.reason for pause in world.status.pause_conditions] == ["CanaryPauseStep"]


@pytest.mark.parametrize("first", ["hand", "spec"])
def test_a_pause_by_hand_outlasts_one_by_spec(first: str) -> None:
    world = paused_at_five()
    if first == "hand":
        world.say("pause").run(3)
    world.edit(lambda spec: spec.update(paused=True)).run(3)
    if first == "spec":
        world.say("pause").run(3)
    assert "set it to false and say `resume`" in (world.status.message or "")
    world.edit(lambda spec: spec.update(paused=False)).run(3)
    assert (world.status.reason, world.routing.weight()) == ("UserPause", 5)
    assert "paused by hand" in (world.status.message or "")
    world.say("resume").run(3)
    assert [pause.reason for pause in world.status.pause_conditions] == ["CanaryPauseStep"]


def test_resume_names_what_still_holds_the_rollout() -> None:
    world = paused_at_five()
    world.say("pause").run(2)
    world.say("resume").run(2)
    assert taken(world).message == "resumed after UserPause; CanaryPauseStep still holds it"
    assert [pause.reason for pause in world.status.pause_conditions] == ["CanaryPauseStep"]


def test_guardrails_stay_armed_during_every_pause() -> None:
    for said in ("pause", None):
        world = paused_at_five()
        if said:
            world.say(said).run(2)
        world.evidence.bad = {revision("b")}
        world.run(20)
        assert world.status.reason == "GuardrailBreached"
        assert world.status.pause_conditions == []


def test_promote_overrides_an_open_gate() -> None:
    world = serving(steps=[{"setWeight": 5}, {"pause": {}}])
    hook = {"name": "gate", "type": "confirm-traffic-increase", "url": "http://hooks"}
    world.edit(lambda spec: spec.update(webhooks=[hook]))
    world.answers = lambda name, kind: False
    world.deploy("b").run(20)
    assert world.routing.weight() == 0
    world.say("promote").run(10)
    assert world.routing.weight() == 5


def _without_an_adapter(world: World) -> None:
    world.engines[0].replace()
    world.engines[0].refusals = {f"bot--{revision('b')}": "DownloadFailed"}


def _without_counters(world: World) -> None:
    world.evidence.mode, world.evidence.heard = "missing", None


@pytest.mark.parametrize(
    ("trouble", "why"),
    [
        (_without_an_adapter, "1 of 2 engines have bot--bbbbbbbb"),
        (_without_counters, "not every router has told its counters"),
    ],
)
def test_promote_raises_no_weight_while_engines_or_counters_are_missing(
    trouble: Callable[[World], None], why: str
) -> None:
    world = paused_at_five()
    trouble(world)
    world.run(40)
    world.say("promote/1").run(5)
    assert world.status.step == "3/6 setWeight 25"
    world.say("promote/2").run(5)
    assert world.routing.weight() == 5
    assert taken(world).refused
    assert f"promote was refused: step 3/6 setWeight 25 has to wait: {why}" in (taken(world).message or "")


def test_promote_at_a_weight_that_is_given_tells_what_is_waited_for() -> None:
    world = paused_at_five()
    world.routing.routers[0].reachable = False
    world.say("promote/1").run(5)
    assert world.status.step == "3/6 setWeight 25"
    world.say("promote/2").run(5)
    assert taken(world).refused
    assert "setWeight 25 has to wait: the weights are being published: 1 of 2" in (taken(world).message or "")


def test_promote_goes_on_without_a_prometheus_that_does_not_answer() -> None:
    metric = {
        "name": "m",
        "prometheus": {"address": "http://p", "query": "q"},
        "successCondition": "result < 1",
    }
    world = serving(steps=WAITING, analysis={"metrics": [metric]})
    world.metric = lambda: (None, "HTTP 503")
    world.deploy("b").run(120)
    assert (world.status.step, world.status.reason) == ("1/6 setWeight 5", "MetricsUnavailable")
    world.say("promote").run(3)
    assert not taken(world).refused
    assert world.status.step == "2/6 pause"

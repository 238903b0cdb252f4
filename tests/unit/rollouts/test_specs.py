"""What spec names: not there yet, gone, taken, unreadable, deleted, edited in the middle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_operator.api.adapterdeployment_status import Stage
from finetune_operator.core import rollouts
from finetune_operator.core.rollout_facts import Wanted
from finetune_operator.reconcile import deployment_facts
from tests.unit.rollouts.world import World, artifact, reached, revision, serving, spec_of

STEPS: list[dict[str, Any]] = [{"setWeight": 10}, {"pause": {"duration": "1m"}}]
RUNNING = Wanted(reason="WaitingForFineTuneJob", message="FineTuneJob job-b is Running")


def canary() -> World:
    world = serving(steps=STEPS, canary={"scaleDownDelaySeconds": 20}).deploy("b")
    world.run(30, until=reached(Stage.CANARY, 1))
    return world


# ---------------------------------------------------------------- not there


def test_the_first_deployment_waits_for_its_job() -> None:
    world = World(spec=spec_of("b"), wanted=RUNNING).run(60)
    status = world.status
    assert (status.phase, status.stage, status.reason) == ("Pending", "Initializing", "WaitingForFineTuneJob")
    assert status.message == "FineTuneJob job-b is Running"
    assert [item.reason for item in world.announced] == ["WaitingForFineTuneJob"]
    world.wanted = Wanted(reason="FineTuneJobFailed", message="FineTuneJob job-b is Failed: no data")
    world.run(10)
    assert world.status.reason == "FineTuneJobFailed"
    world.wanted = Wanted(artifact=artifact("b"))
    world.run(20)
    assert world.everybody_gets() == revision("b")


def test_what_serves_goes_on_while_the_next_job_is_running() -> None:
    world = serving(steps=STEPS).deploy("b")
    world.wanted = RUNNING
    world.run(60)
    assert (world.status.phase, world.status.reason) == ("Progressing", "WaitingForFineTuneJob")
    assert world.everybody_gets() == revision("a")
    assert world.condition("Promoted")[0] == "False"
    assert world.condition("Available")[0] == "True"


def test_a_candidate_that_spec_no_longer_names_loses_its_users_at_once() -> None:
    world = canary().deploy("c")
    world.wanted = Wanted(reason="WaitingForFineTuneJob", message="FineTuneJob job-c is Running")
    world.run(5)
    assert world.everybody_gets() == revision("a")
    assert world.history()[0] == ("b", "Superseded")
    world.wanted = Wanted(artifact=artifact("c"))
    world.run(120)
    assert world.everybody_gets() == revision("c")


def test_an_artifact_that_vanished_goes_on_serving_and_rolling_out() -> None:
    world = canary()
    world.wanted = Wanted(reason="FineTuneJobNotFound", message="FineTuneJob job-b does not exist")
    world.run(120)
    assert world.everybody_gets() == revision("b"), "the rollout went on with what was recorded"
    status = world.status
    assert (status.phase, status.reason) == ("Healthy", "FineTuneJobNotFound")
    assert status.message == "bbbbbbbb goes on serving; FineTuneJob job-b does not exist"
    world.engines[0].replace()
    world.run(30)
    assert world.engines[0].loaded(f"bot--{revision('b')}"), "loaded again from where it was"


def test_a_rolled_back_artifact_that_vanished_stays_rolled_back() -> None:
    world = canary()
    world.evidence.bad = {revision("b")}
    world.run(60)
    world.wanted = Wanted(reason="FineTuneJobNotFound", message="FineTuneJob job-b does not exist")
    world.run(60)
    assert (world.status.stage, world.status.reason) == (Stage.FAILED, "GuardrailBreached")


def test_a_job_that_ran_again_under_its_name_is_another_revision() -> None:
    world = canary()
    world.wanted = Wanted(artifact=replace(artifact("c"), fine_tune_job="job-b"))
    world.run(120)
    assert world.everybody_gets() == revision("c")
    assert world.history()[:2] == [("c", "Promoted"), ("b", "Superseded")]


# ---------------------------------------------------------------- edits


def test_only_the_last_revisions_return_without_steps() -> None:
    world = serving(steps=[], canary={"scaleDownDelaySeconds": 5})
    for letter in "bcde":
        world.deploy(letter).run(20)
    assert world.status.stable_revision == revision("e")
    world.edit(lambda spec: spec["strategy"]["canary"].update(steps=STEPS))
    world.edit(lambda spec: spec.update(rollbackWindow={"revisions": 2}))
    world.deploy("b").run(15)
    assert world.routing.weight() == 10, "b is the third last"
    world.deploy("c").run(20)
    assert world.everybody_gets() == revision("c")
    assert world.history()[:2] == [("c", "FastRolledBack"), ("b", "Superseded")]


def test_a_revision_that_was_rolled_back_since_has_no_short_way() -> None:
    world = serving(steps=[], canary={"scaleDownDelaySeconds": 5})
    world.deploy("b").run(20)
    world.deploy("a").run(20)
    assert world.history()[0] == ("a", "FastRolledBack")
    world.edit(lambda spec: spec.update(rollbackWindow={"revisions": 0}))
    world.edit(lambda spec: spec["strategy"]["canary"].update(steps=STEPS))
    world.evidence.bad = {revision("b")}
    world.deploy("b").run(60)
    assert world.history()[0] == ("b", "Aborted")
    world.edit(lambda spec: spec.update(rollbackWindow={"revisions": 3}))
    world.evidence.bad = set()
    world.deploy("c").run(120)
    world.deploy("b").run(20)
    assert world.status.stage is Stage.CANARY
    assert world.routing.weight() == 10


def test_a_return_within_the_window_is_a_pointer_flip_though_evidence_is_missing() -> None:
    world = serving(steps=STEPS, canary={"scaleDownDelaySeconds": 600}).deploy("b")
    world.run(200)
    world.evidence.mode = "missing"
    world.evidence.heard = None
    loads = [engine.loads for engine in world.engines]
    began = world.now
    world.deploy("a").run(60, until=lambda status: status.stable_revision == revision("a"))
    assert (world.now - began).total_seconds() < 5
    assert [engine.loads for engine in world.engines] == loads


def test_edited_steps_begin_anew_with_the_same_users() -> None:
    world = canary()
    began = world.status.rollout_start_time
    salt = world.routing.route.salt if world.routing.route else ""
    world.edit(lambda spec: spec["strategy"]["canary"].update(steps=[{"setWeight": 30}, {"pause": {}}]))
    plan = world.step()
    assert plan is not None
    assert plan.route is not None
    assert plan.route.weight == 0
    world.run(20)
    assert world.routing.weight() == 30
    assert world.routing.route is not None
    assert world.routing.route.salt == salt
    assert world.status.rollout_start_time == began
    assert world.history() == [("a", "Promoted")]


def test_other_edits_of_the_spec_disturb_no_rollout() -> None:
    world = canary().run(2)
    before = (world.status.current_step_index, world.status.step_start_time)
    world.edit(
        lambda spec: spec.update(alerts=[{"providerRef": {"name": "slack"}}], progressDeadlineSeconds=99)
    )
    world.run(5)
    assert (world.status.current_step_index, world.status.step_start_time) == before


# ---------------------------------------------------------------- no sense


def test_an_alias_that_another_one_has_is_not_routed() -> None:
    world = World(spec=spec_of("a"), wanted=Wanted(artifact=artifact("a")), alias_taken_by="team/first")
    plan = world.step()
    assert plan is not None
    assert (plan.route, list(plan.actions)) == (None, [])
    assert world.status.phase == "Pending"
    assert world.condition("InvalidSpec") == ("True", "AliasConflict")
    assert "team/first" in (world.status.message or "")
    assert [item.reason for item in plan.announcements] == ["AliasConflict"]
    again = world.step()
    assert again is not None
    assert again.announcements == []
    world.alias_taken_by = None
    world.run(30)
    assert world.everybody_gets() == revision("a")
    assert world.condition("InvalidSpec") == ("False", "Accepted")


def test_a_spec_that_cannot_be_read_changes_nothing_for_users() -> None:
    world = canary()
    spec, world.spec, world.problem = world.spec, None, "spec.traffic: unknown field"
    route = world.routing.route
    world.run(300)
    assert world.routing.route == route
    assert world.condition("InvalidSpec") == ("True", "InvalidSpec")
    assert world.status.phase == "Paused"
    for condition, says in (("Paused", "True"), ("Progressing", "False"), ("Promoted", "False")):
        assert world.condition(condition) == (says, "InvalidSpec")
    assert "spec.traffic: unknown field" in (world.status.message or "")
    world.engines[0].held.pop(f"bot--{revision('b')}")
    world.run(5)
    assert world.routing.route is not None
    assert world.routing.route.candidate is not None
    assert world.routing.route.candidate.upstreams == ("http://e2:8000",)
    world.spec, world.problem = spec, None
    world.run(120)
    assert world.everybody_gets() == revision("b")


@pytest.mark.parametrize("verb", ["abort", "rollback"])
def test_a_spec_of_which_nothing_is_known_lets_people_take_the_candidate_back(verb: str) -> None:
    world = canary()
    spec, world.spec, world.problem = world.spec, None, "spec.traffic: unknown field"
    world.say("promote").run(5)
    taken = world.status.last_action
    assert taken is not None
    assert taken.refused
    assert world.routing.weight() == 10
    world.say("pause").run(5)
    assert [pause.reason for pause in world.status.pause_conditions] == ["UserPause"]
    world.say(verb).run(10)
    assert world.everybody_gets() == revision("a")
    assert world.status.stage is Stage.FAILED
    assert world.status.abort is not None
    assert (world.status.abort.reason, world.status.abort.weight) == ("UserAbort", 10)
    assert world.condition("InvalidSpec") == ("True", "InvalidSpec")
    world.run(300)
    assert world.everybody_gets() == revision("a")
    world.spec, world.problem = spec, None
    world.run(300)
    assert (world.everybody_gets(), world.status.reason) == (revision("a"), "UserAbort")


def test_a_candidate_is_rolled_back_though_the_spec_cannot_be_read_any_more() -> None:
    world = canary()
    world.problem = "spec.traffic: unknown field"
    world.run(300)
    assert world.routing.weight() == 10, "the step's time stands still"
    assert (world.status.phase, world.status.reason) == ("Paused", "InvalidSpec")
    for condition, says in (("Paused", "True"), ("Progressing", "False"), ("Promoted", "False")):
        assert world.condition(condition) == (says, "InvalidSpec")
    assert "spec.traffic: unknown field; correct it" in (world.status.message or "")
    assert world.condition("InvalidSpec") == ("True", "InvalidSpec")
    assert [item.severity for item in world.announced if item.reason == "InvalidSpec"] == ["warn"]
    world.evidence.bad = {revision("b")}
    world.run(30)
    assert world.status.reason == "GuardrailBreached"
    assert world.everybody_gets() == revision("a")
    assert world.status.stage is Stage.FAILED


def test_a_spec_that_can_be_read_again_goes_on_where_it_was() -> None:
    world = canary().run(20)
    world.problem = "spec.traffic: unknown field"
    world.run(300)
    world.problem = None
    world.run(20)
    assert world.routing.weight() == 10, "half a minute of its pause is left"
    world.run(60)
    assert world.everybody_gets() == revision("b")


def body(**changes: Any) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "baseModelRef": {"name": "tiny"},
        "adapter": {"fineTuneJobRef": {"name": "job-a"}},
        "analysis": {"guardrails": [{"name": "json", "event": "schema_invalid"}]},
        **changes,
    }
    return {"metadata": {"namespace": "team", "name": "bot", "uid": "u"}, "spec": spec}


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"shadow": {"new": 1}}, ["json"]),
        ({"traffic": {"newThing": 1, "stickiness": {"salt": "s"}}}, ["json"]),
        (
            {"analysis": {"guardrails": [{"name": "json", "event": "schema_invalid", "newThing": 1}]}},
            ["json"],
        ),
        ({"strategy": {"canary": {"steps": "many"}}}, ["json"]),
        ({"strategy": {"canary": {"steps": [{"setWeight": 5}, {"setHeader": {}}]}}}, ["json"]),
        ({"analysis": {"guardrails": [{"name": "json", "event": "unheard_of"}]}}, ["errors"]),
        (
            {
                "analysis": {
                    "interval": 5,
                    "guardrails": [
                        {"name": "toxic", "event": "toxicity", "level": 1},
                        {"name": "json", "event": "schema_invalid"},
                        {"name": "rude", "event": "rudeness"},
                    ],
                    "objectives": [{"name": "votes", "metric": "votes", "test": "Equivalence"}],
                }
            },
            ["json"],
        ),
        ({"serving": {"port": "any"}}, None),
        ({"serving": "any"}, None),
        ({"baseModelRef": "tiny"}, None),
        ({"traffic": {"stickiness": {"type": "Moon"}}}, None),
        ({"baseModelRef": {}}, None),
    ],
)
def test_of_a_spec_that_cannot_be_read_the_guardrails_are_kept(
    changes: dict[str, Any], names: list[str] | None
) -> None:
    found = deployment_facts.deployment_facts(body(**changes))
    assert found.problem is not None
    assert (None if found.spec is None else [g.name for g in found.spec.analysis.guardrails]) == names
    known = spec_of("z")
    assert deployment_facts.deployment_facts(body(**changes), known=known).spec is known


@pytest.mark.parametrize("spec", [None, "any", [], {"alias": 5}, {"baseModelRef": "tiny", "serving": None}])
def test_an_object_without_a_readable_spec_hinders_no_other_one(spec: Any) -> None:
    stored = {**body(), "spec": spec}
    assert deployment_facts.deployment_facts(stored).spec is None
    claim = deployment_facts.claim(stored)
    assert (claim.alias, claim.base) == ("bot", "")


PROMETHEUS = {"address": "http://p", "query": "q"}


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"strategy": {"canary": {"steps": [{"pause": {"duration": "5 minutes"}}]}}},
            "spec.strategy.canary.steps.0.pause.duration: must be a duration",
        ),
        (
            {"strategy": {"canary": {"maxStepDuration": "1d"}}},
            "spec.strategy.canary.maxStepDuration: must be a duration",
        ),
        (
            {"strategy": {"canary": {"steps": [{"setWeight": 5}, {}]}}},
            "spec.strategy.canary.steps.1: name exactly one of",
        ),
        ({"analysis": {"interval": "5"}}, "spec.analysis.interval: must be a duration"),
        (
            {"analysis": {"guardrails": [{"name": "slow", "event": "ttft_over", "threshold": "2m"}]}},
            "spec.analysis.guardrails.0.threshold: must be a time above zero",
        ),
        (
            {"analysis": {"metrics": [{"name": "m", "prometheus": PROMETHEUS, "successCondition": "v < 1"}]}},
            "spec.analysis.metrics.0.successCondition: must compare result with numbers",
        ),
    ],
)
def test_what_was_stored_before_there_was_a_rule_is_told_and_costs_no_pass(
    changes: dict[str, Any], problem: str
) -> None:
    world = canary()
    found = deployment_facts.deployment_facts(body(adapter={"fineTuneJobRef": {"name": "job-b"}}, **changes))
    world.spec, world.problem = found.spec, found.problem
    world.evidence.bad = {revision("b")}
    world.run(1)
    assert (world.status.message or "").startswith(problem)
    world.run(30)
    assert world.status.reason == "GuardrailBreached"
    assert world.everybody_gets() == revision("a")


def test_of_steps_that_cannot_be_read_none_is_taken() -> None:
    world = canary()
    stored = body(
        adapter={"fineTuneJobRef": {"name": "job-b"}},
        strategy={"canary": {"steps": [{"setWeight": 10}, {"setHeader": {}}]}},
    )
    found = deployment_facts.deployment_facts(stored)
    world.spec, world.problem = found.spec, found.problem
    world.run(5)
    assert world.status.step == "2/2 pause", "as it was"
    for verb in ("promote", "promote-full", "resume", "retry"):
        world.say(verb).run(5)
        taken = world.status.last_action
        assert taken is not None
        assert taken.refused
        assert "the spec cannot be read (spec.strategy.canary.steps.1.setHeader" in (taken.message or "")
    assert (world.status.phase, world.routing.weight()) == ("Paused", 10)
    world.say("abort").run(10)
    assert world.status.stage is Stage.FAILED
    assert world.everybody_gets() == revision("a")


def test_a_deleted_object_has_no_route() -> None:
    world = canary()
    world.deleting = True
    plan = rollouts.decide(world.observe(), now=world.now)
    assert (plan.route, list(plan.actions), plan.status) == (None, [], world.status)


@pytest.mark.parametrize("stage", [Stage.LOADING, Stage.CANARY, Stage.PROMOTING])
def test_a_third_revision_in_any_stage_starts_from_the_same_stable_one(stage: Stage) -> None:
    world = serving(steps=STEPS, canary={"scaleDownDelaySeconds": 20}).deploy("b")
    world.run(200, until=lambda status: status.stage is stage)
    world.deploy("c").run(2)
    assert world.status.stable_revision == revision("a")
    assert world.history()[0] == ("b", "Superseded")
    world.run(200)
    assert world.everybody_gets() == revision("c")

"""What each kind of step waits for."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.api.adapterdeployment_status import Stage
from finetune_operator.api.adapterdeployment_strategy import WebhookType
from finetune_operator.core.rollout_facts import Evaluate
from tests.unit.rollouts.world import World, reached, revision, serving

GATE: dict[str, Any] = {
    "steps": [{"evalGate": {"evalRef": "golden", "minScore": 0.8, "maxRegression": 0.02}}, {"setWeight": 10}],
    "evaluations": [{"name": "golden", "uri": "file:///golden.jsonl"}],
}
OBJECTIVE = {"objectives": [{"name": "helpful", "metric": "helpful", "minSamplesPerArm": 200}]}


def over(world: World) -> bool:
    return world.status.stage in (Stage.SUCCEEDED, Stage.FAILED)


# ---------------------------------------------------------------- evalGate


@pytest.mark.parametrize(
    ("candidate", "stable", "passes", "words"),
    [
        (0.9, 0.91, True, "candidate 0.900"),
        (0.79, 0.79, False, "below minScore 0.8"),
        (0.85, 0.88, False, "more than maxRegression 0.02 below 0.880"),
        (0.86, 0.88, True, "candidate 0.860"),
    ],
)
def test_an_eval_gate_compares_with_the_stable_revision(
    candidate: float, stable: float, passes: bool, words: str
) -> None:
    world = serving(**GATE)
    world.scores = {f"bot--{revision('a')}": stable, f"bot--{revision('b')}": candidate}
    world.deploy("b").run(30)
    status = world.status
    assert status.evaluation is not None
    assert status.evaluation.phase == ("Successful" if passes else "Failed")
    assert words in (status.evaluation.message or "")
    assert (status.abort is None) is passes
    if not passes:
        assert status.reason == "EvalGateFailed"
        assert not any(plan.route and plan.route.candidate for plan in world.plans), "no user met it"


def test_a_first_deployment_is_compared_with_the_base_model() -> None:
    world = World(spec=None)
    world.scores = {"tiny": 0.95, f"bot--{revision('a')}": 0.9}
    world.deploy("a", **GATE).run(30)
    assert world.status.reason == "EvalGateFailed"
    assert world.status.phase == "Degraded"
    assert world.everybody_gets() is None
    orders = [action for plan in world.plans for action in plan.actions if isinstance(action, Evaluate)]
    assert set(orders[0].served_names) == {"tiny", f"bot--{revision('a')}"}


def test_an_evaluation_is_ordered_again_until_an_agent_knows_it_and_only_then_judged() -> None:
    world = serving(**GATE).deploy("b")
    world.killed = lambda point: point.endswith("Evaluate") and world.kills < 3
    world.run(60, until=reached(Stage.CANARY))
    identities = {a.id for plan in world.plans for a in plan.actions if isinstance(a, Evaluate)}
    assert len(identities) <= 1, "every order has the same identity"
    assert world.status.evaluation is not None
    assert world.status.evaluation.phase == "Successful"


def test_an_evaluation_that_could_not_run_is_tried_again_within_the_deadline() -> None:
    world = serving(**GATE).deploy("b")
    world.evaluation_fails = 2
    world.run(60, until=reached(Stage.CANARY))
    assert world.status.evaluation is not None
    assert world.status.evaluation.id.endswith(".3")
    world = serving(progressDeadlineSeconds=30, **GATE).deploy("b")
    world.evaluation_fails = 1000
    world.run(120)
    assert world.status.reason == "EvalGateFailed"
    assert "could not run: by design" in (world.status.message or "")


def test_a_gate_whose_agents_are_silent_meets_the_deadline() -> None:
    steps = [{"setWeight": 10}, {"evalGate": {"evalRef": "golden", "minScore": 0.8}}]
    world = serving(**{**GATE, "steps": steps}, progressDeadlineSeconds=60)
    world.evaluation_fails = 100
    world.deploy("b").run(30, until=reached(Stage.VALIDATING, 1))
    for engine in world.engines:
        engine.reachable = False
    world.run(90)
    assert world.status.reason == "EvalGateFailed"


def test_users_keep_their_side_while_a_gate_after_a_weight_is_evaluated() -> None:
    gate = {"evalGate": {"evalRef": "golden", "minScore": 0.8}}
    steps = [{"setWeight": 10}, gate, {"setWeight": 50}, {"pause": {}}]
    world = serving(steps=steps, evaluations=GATE["evaluations"])
    world.evaluation_fails = 3
    world.deploy("b").run(20, until=reached(Stage.VALIDATING, 1))
    for _ in range(20):
        world.run(1)
        assert (world.routing.weight() >= 10) is True, world.status.message
        assert world.condition("TrafficRouted")[0] == "True" or world.routing.weight() == 50
    world.run(60, until=reached(Stage.CANARY, 3))
    assert world.routing.weight() == 50
    assert world.status.step == "4/4 pause"


def test_a_guardrail_counts_while_a_gate_after_a_weight_is_evaluated() -> None:
    gate = {"evalGate": {"evalRef": "golden", "minScore": 0.8}}
    world = serving(steps=[{"setWeight": 10}, gate, {"pause": {}}], evaluations=GATE["evaluations"])
    world.evaluation_fails = 1000
    world.evidence.bad = {revision("b")}
    world.deploy("b").run(60)
    assert world.status.reason == "GuardrailBreached"


def test_weights_that_never_get_into_the_routes_are_told_and_given_up() -> None:
    world = serving(progressDeadlineSeconds=60, steps=[{"setWeight": 10}, {"pause": {}}])
    publish = world.routing.publish
    world.routing.publish = lambda route, *, now: (  # type: ignore[method-assign]
        None if route and route.weight else publish(route, now=now)
    )
    world.deploy("b").run(40)
    assert world.status.reason == "NotPublished"
    assert "operator's log" in (world.status.message or "")
    assert [item.severity for item in world.announced if item.reason == "NotPublished"] == ["warn"]
    world.run(60)
    assert world.status.reason == "ProgressDeadlineExceeded"
    assert world.everybody_gets() == revision("a")
    assert world.status.stage is Stage.FAILED


def test_steps_that_are_edited_and_edited_back_pass_a_gate_that_was_passed() -> None:
    world = serving(**GATE)
    world.edit(lambda spec: spec["strategy"]["canary"]["steps"].append({"pause": {}}))
    world.deploy("b").run(30, until=reached(Stage.CANARY, 2))
    world.edit(lambda spec: spec["strategy"]["canary"].update(steps=[{"setWeight": 1}, {"pause": {}}])).run(
        10
    )
    steps = [*GATE["steps"], {"pause": {}}]
    world.edit(lambda spec: spec["strategy"]["canary"].update(steps=steps)).run(15)
    assert world.routing.weight() == 10


# ---------------------------------------------------------------- mirror, pause, approval


def test_a_mirror_step_copies_for_its_time_and_then_stops() -> None:
    world = serving(
        steps=[{"setMirror": {"percent": 20, "duration": "30s"}}, {"setWeight": 5}, {"pause": {}}]
    )
    world.deploy("b").run(30, until=lambda status: status.step_start_time is not None)
    began = world.status.step_start_time or world.now
    assert world.routing.mirror() == 20
    assert world.routing.weight() == 0
    world.run(60, until=lambda status: status.current_step_index == 1)
    assert 30 <= (world.now - began).total_seconds() < 40
    world.run(5)
    assert (world.routing.mirror(), world.routing.weight()) == (0, 5)


def test_a_mirror_ends_with_its_step_whatever_follows() -> None:
    world = serving(steps=[{"setMirror": {"percent": 20, "duration": "10s"}}, {"pause": {}}])
    world.deploy("b").run(40)
    assert world.status.step == "2/2 pause"
    assert world.routing.mirror() == 0


def test_a_mirrored_candidate_that_fails_is_rolled_back_before_any_user_meets_it() -> None:
    world = serving(steps=[{"setMirror": {"percent": 20, "duration": "10m"}}, {"setWeight": 5}])
    world.evidence.bad = {revision("b")}
    world.deploy("b").run(60)
    assert world.status.reason == "GuardrailBreached"
    assert world.status.abort is not None
    assert world.status.abort.weight == 0


def test_a_pause_without_duration_waits_for_somebody() -> None:
    world = serving(steps=[{"setWeight": 5}, {"pause": {}}, {"setWeight": 50}, {"pause": {}}])
    world.deploy("b").run(900)
    assert world.status.phase == "Paused"
    assert world.status.reason == "CanaryPauseStep"
    assert world.status.step == "2/4 pause"
    world.say("resume").run(10)
    assert world.routing.weight() == 50
    world.say("promote").run(10)
    assert world.everybody_gets() == revision("b")


def test_a_timed_pause_takes_its_time_from_when_the_routers_have_the_weight() -> None:
    world = serving(steps=[{"setWeight": 5}, {"pause": {"duration": "1m"}}, {"setWeight": 50}, {"pause": {}}])
    world.routing.delay_seconds = 20
    world.deploy("b").run(120, until=lambda status: status.step_start_time is not None)
    assert world.routing.weight() == 5
    began = world.now
    world.run(120, until=lambda status: status.weights is not None and status.weights.candidate == 50)
    assert 60 <= (world.now - began).total_seconds() < 66


@pytest.mark.parametrize(
    ("approval", "then", "ending"),
    [
        ({}, "promote", "SUCCEEDED"),
        ({}, "abort", "UserAbort"),
        ({"timeout": "1m"}, None, "ApprovalTimedOut"),
        ({"timeout": "1m", "onTimeout": "Promote"}, None, "SUCCEEDED"),
    ],
)
def test_an_approval_step(approval: dict[str, Any], then: str | None, ending: str) -> None:
    world = serving(steps=[{"setWeight": 50}, {"approval": approval}])
    world.deploy("b").run(30, until=reached(Stage.CANARY, 1))
    world.run(20)
    assert world.status.reason == "AwaitingApproval"
    assert "promote" in (world.status.message or "")
    if then is None:
        world.run(30)
        assert world.status.phase == "Paused", "not before its time"
    else:
        world.say(then)
    world.run(60)
    assert world.everybody_gets() == revision("b" if ending == "SUCCEEDED" else "a")
    if ending != "SUCCEEDED":
        assert world.status.reason == ending


# ---------------------------------------------------------------- analysis


def analysed(**more: Any) -> World:
    return serving(
        steps=[{"setWeight": 5}, {"analysis": more.pop("step", {})}, {"setWeight": 50}, {"pause": {}}],
        canary={"maxStepDuration": "2m"},
        analysis=OBJECTIVE | more,
    )


def test_an_analysis_step_goes_on_as_soon_as_everything_is_successful() -> None:
    world = analysed().deploy("b")
    world.run(60, until=lambda status: status.weights is not None and status.weights.candidate == 50)
    assert world.status.weights is not None
    assert world.status.weights.candidate == 50
    world = analysed(step={"duration": "1m"}).deploy("b")
    world.run(20, until=reached(Stage.CANARY, 1))
    world.run(50)
    assert world.routing.weight() == 5, "not before its least time"
    world.run(20)
    assert world.routing.weight() == 50


def test_a_worse_objective_rolls_back() -> None:
    world = analysed().deploy("b")
    world.evidence.worse = {revision("b")}
    world.run(60)
    assert world.status.reason == "NonInferiorityRejected"
    assert "helpful" in (world.status.message or "")


def test_an_analysis_without_verdict_pauses_and_goes_on_by_itself_when_there_is_one() -> None:
    world = analysed().deploy("b")
    world.evidence.mode = "nan"
    world.run(400)
    assert world.status.reason == "InconclusiveAnalysis"
    assert world.status.phase == "Paused"
    assert [item.severity for item in world.announced if item.reason == "InconclusiveAnalysis"] == ["warn"]
    world.evidence.mode = "fine"
    world.run(10)
    assert world.routing.weight() == 50


def test_an_analysis_without_traffic_says_that_samples_are_missing() -> None:
    world = analysed().deploy("b")
    world.evidence.seconds_to_proof = 1e9
    world.run(150)
    assert world.status.reason == "InsufficientSamples"
    for remedy in ("is feedback sent", "send more traffic", "`resume`", "`promote`", "`abort`"):
        assert remedy in (world.status.message or "")
    start = world.status.step_start_time
    world.say("resume").run(20)
    assert world.status.phase == "Progressing", "looks for another maxStepDuration"
    assert world.status.step_start_time != start
    world.run(200)
    assert world.status.phase == "Paused"
    world.say("promote").run(10)
    assert world.routing.weight() == 50


def test_what_is_only_shown_decides_nothing() -> None:
    world = analysed(dryRun=["helpful"]).deploy("b")
    world.evidence.seconds_to_proof = 1e9
    world.run(40)
    assert world.routing.weight() == 50


# ---------------------------------------------------------------- webhooks


def hooked(*kinds: WebhookType) -> World:
    hooks = [{"name": str(kind), "type": kind, "url": "http://hooks"} for kind in kinds]
    steps = [{"setWeight": 5}, {"pause": {"duration": "5s"}}, {"setWeight": 50}, {"setWeight": 20}]
    world = serving(steps=steps)
    world.edit(lambda spec: spec.update(webhooks=hooks, progressDeadlineSeconds=60))
    return world


@pytest.mark.parametrize(
    ("kind", "stage", "weight"),
    [
        (WebhookType.CONFIRM_ROLLOUT, Stage.LOADING, 0),
        (WebhookType.CONFIRM_TRAFFIC_INCREASE, Stage.CANARY, 0),
        (WebhookType.CONFIRM_PROMOTION, Stage.WAITING_PROMOTION, 20),
    ],
)
def test_a_rollout_waits_for_confirmation(kind: WebhookType, stage: Stage, weight: float) -> None:
    world = hooked(kind)
    allowed = False
    world.answers = lambda name, asked: allowed
    world.deploy("b").run(50)
    assert (world.status.stage, world.routing.weight()) == (stage, weight)
    assert world.status.reason == "AwaitingConfirmation"
    assert f"{kind}: because" in (world.status.message or "")
    asked = len(world.asked)
    assert 2 < asked < 20
    allowed = True
    world.run(60)
    assert world.everybody_gets() == revision("b")


def test_a_confirmation_that_never_comes_meets_the_deadline() -> None:
    world = hooked(WebhookType.CONFIRM_PROMOTION)
    world.answers = lambda name, asked: False
    world.deploy("b").run(200)
    assert world.status.reason == "ProgressDeadlineExceeded"
    assert world.everybody_gets() == revision("a")


def test_a_higher_weight_is_asked_for_each_time_and_a_lower_one_is_not() -> None:
    world = hooked(WebhookType.CONFIRM_TRAFFIC_INCREASE)
    world.deploy("b").run(60)
    assert world.asked.count(WebhookType.CONFIRM_TRAFFIC_INCREASE) == 2
    assert world.everybody_gets() == revision("b")


def test_a_rollback_webhook_is_asked_while_the_candidate_has_users_and_brings_it_back() -> None:
    world = hooked(WebhookType.ROLLBACK)
    wanted = False
    world.answers = lambda name, asked: wanted
    world.edit(lambda spec: spec["strategy"]["canary"].update(steps=[{"setWeight": 5}, {"pause": {}}]))
    world.run(5)
    assert world.asked == []
    world.deploy("b").run(60)
    asked = len(world.asked)
    assert 5 <= asked <= 40
    wanted = True
    world.run(15)
    assert world.status.reason == "RollbackWebhook"
    assert world.everybody_gets() == revision("a")

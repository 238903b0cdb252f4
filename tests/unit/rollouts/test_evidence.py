"""Alarms, metrics and evidence that does not come."""

from __future__ import annotations

import math
from typing import Any

import pytest

from finetune_operator.api.adapterdeployment_analysis import MetricSpec
from finetune_operator.api.adapterdeployment_status import CheckPhase, SampleRatio, Stage
from finetune_operator.core import rollout_metrics
from finetune_operator.core.rollout_facts import Measurement
from tests.unit.rollouts.world import START, World, reached, revision, serving

STEPS: list[dict[str, Any]] = [
    {"setWeight": 10},
    {"pause": {"duration": "1m"}},
    {"setWeight": 50},
    {"pause": {}},
]


def canary(**more: Any) -> World:
    world = serving(steps=more.pop("steps", STEPS), **more).deploy("b")
    return world.run(30, until=reached(Stage.CANARY, 1))


def pauses(world: World) -> list[str]:
    return [str(pause.reason) for pause in world.status.pause_conditions if pause.reason != "CanaryPauseStep"]


# ---------------------------------------------------------------- silence of the routers


def test_evidence_that_is_late_holds_the_weight_and_then_it_goes_on() -> None:
    world = canary()
    world.evidence.mode = "missing"
    world.run(120)
    assert world.routing.weight() == 10
    assert world.condition("MetricsAvailable")[0] == "False"
    assert world.status.evidence_missing_since is not None
    assert pauses(world) == []
    world.evidence.mode = "fine"
    world.run(10)
    assert world.routing.weight() == 50


@pytest.mark.parametrize(
    ("policy", "seconds", "reason"),
    [
        ("Hold", 120, "MetricsUnavailable"),
        ("Pause", 45, "MetricsUnavailable"),
        ("Abort", 45, "MetricsUnavailable"),
    ],
)
def test_what_follows_when_no_evidence_comes(policy: str, seconds: float, reason: str) -> None:
    world = canary(analysis={"onMetricsUnavailable": policy}, progressDeadlineSeconds=90)
    world.evidence.mode = "missing"
    world.run(20)
    assert pauses(world) == []
    assert world.status.abort is None
    world.run(seconds)
    if policy == "Abort":
        assert world.status.abort is not None
        assert world.status.abort.reason == reason
        assert world.everybody_gets() == revision("a")
        return
    assert pauses(world) == [reason]
    assert world.status.phase == "Paused"
    assert world.routing.weight() == 10
    world.evidence.mode = "fine"
    world.run(10)
    assert pauses(world) == [], "evidence that is back lets it go on"


def test_a_pause_for_missing_counters_names_the_router_and_what_to_do() -> None:
    world = canary(analysis={"onMetricsUnavailable": "Pause"})
    world.evidence.mode, world.evidence.silent = "missing", ("http://router-2 (HTTP 503)",)
    world.run(60)
    pause = world.status.pause_conditions[-1]
    assert ": http://router-2 (HTTP 503); see its pod (kubectl get pods -A -o wide), restart it" in (
        pause.message or ""
    )


def test_a_restarted_operator_first_hears_from_the_routers() -> None:
    world = canary(analysis={"onMetricsUnavailable": "Pause"})
    world.evidence.heard = None
    world.step()
    assert world.status.evidence_missing_since is not None
    assert pauses(world) == []
    world.run(10)
    assert world.status.evidence_missing_since is None


def test_proof_of_harm_counts_though_evidence_is_missing_now() -> None:
    """What is known is enough: the checks of the last look say Failed."""
    world = canary(analysis={"onMetricsUnavailable": "Pause"}, steps=[{"setWeight": 10}, {"pause": {}}])
    world.run(5)
    world.evidence.bad = {revision("b")}
    world.evidence.heard = START
    world.evidence.mode = "stale"
    world.run(30)
    assert world.status.reason == "GuardrailBreached"


def test_a_guardrail_with_another_threshold_is_another_signal_for_the_routers() -> None:
    guardrails = [{"name": "slow", "event": "ttft_over", "threshold": "100ms"}]
    world = canary(analysis={"guardrails": guardrails, "drift": {}}, steps=[{"setWeight": 10}, {"pause": {}}])

    def signals() -> dict[str, float | None]:
        route = world.routing.route
        return {signal.name: signal.threshold for signal in route.signals} if route else {}

    assert signals() == {"slow:ttft_over:0.1": 0.1, "truncated": None, "refusal": None}
    world.edit(lambda spec: spec["analysis"]["guardrails"][0].update(threshold="60s")).run(5)
    assert signals() == {"slow:ttft_over:60": 60.0, "truncated": None, "refusal": None}


def test_the_routers_sum_by_group_what_objectives_compare() -> None:
    objectives = [
        {"name": "liked", "metric": "helpful"},
        {"name": "much-liked", "metric": "helpful", "margin": 0.2},
        {"name": "fast", "source": "router", "metric": "seconds", "direction": "Decrease"},
    ]
    world = canary(analysis={"objectives": objectives}, steps=[{"setWeight": 10}, {"pause": {}}])

    def asked() -> tuple[list[str], bool]:
        assert world.routing.route is not None
        return list(world.routing.route.grouped), world.routing.route.counts_words

    assert asked() == (["scores/helpful", "seconds"], False)
    world.edit(lambda spec: spec["analysis"].update(drift={})).run(5)
    assert asked() == (["scores/helpful", "seconds", "completion_tokens"], True)


# ---------------------------------------------------------------- alarms


@pytest.mark.parametrize(
    ("alarm", "reason"), [("skewed", "SampleRatioMismatch"), ("drifting", "DriftDetected")]
)
def test_an_alarm_pauses_until_somebody_has_looked(alarm: str, reason: str) -> None:
    world = canary()
    setattr(world.evidence, alarm, True)
    world.run(30)
    assert pauses(world) == [reason]
    assert [item.severity for item in world.announced if item.reason == reason] == ["warn"]
    setattr(world.evidence, alarm, False)
    world.run(200)
    assert pauses(world) == [reason], "not by itself"
    assert world.routing.weight() == 10
    setattr(world.evidence, alarm, True)
    world.say("resume").run(2)
    assert pauses(world) == []
    world.run(120)
    assert pauses(world) == [], "answered for this rollout"
    assert world.routing.weight() == 50
    assert world.condition("SampleRatioOK")[0] == ("False" if alarm == "skewed" else "True")


def test_the_next_rollout_is_alarmed_anew() -> None:
    world = canary()
    world.evidence.skewed = True
    world.run(20)
    world.say("resume").run(5)
    assert world.status.sample_ratio == SampleRatio(expected=0.1, observed=0.3)
    world.deploy("c").run(1)
    assert world.status.sample_ratio is None, "of the rollout before"
    world.run(40)
    assert pauses(world) == ["SampleRatioMismatch"]


# ---------------------------------------------------------------- metrics


def measured(**more: Any) -> World:
    metric: dict[str, Any] = {
        "name": "p95",
        "prometheus": {"address": "http://prometheus:9090", "query": "x"},
        "successCondition": "result <= 1.2",
        "failureCondition": "result > 2",
        "failureLimit": 2,
        "inconclusiveLimit": 3,
        "consecutiveErrorLimit": 2,
        "count": 3,
    }
    steps = [{"setWeight": 10}, {"analysis": {}}, {"setWeight": 50}, {"pause": {}}]
    analysis = {"metrics": [metric | more.pop("metric", {})]} | more.pop("analysis", {})
    return serving(steps=steps, analysis=analysis, **more).deploy("b")


def test_a_metric_must_be_successful_as_often_as_count_says() -> None:
    world = measured().run(60)
    check = next(check for check in world.status.analysis if check.name == "p95")
    assert check.measurements is not None
    assert check.measurements.successful >= 3
    assert world.routing.weight() == 50
    moments = [plan.measure for plan in world.plans]
    assert 5 <= sum(moments) < 20, "once per interval"


def test_a_metric_that_fails_too_often_rolls_back() -> None:
    world = measured()
    world.metric = lambda: (3.0, None)
    world.run(60)
    assert world.status.reason == "MetricFailed"
    assert "3 failed (limit 2)" in (world.status.message or "")


@pytest.mark.parametrize("value", [None, math.nan, 1.5])
def test_a_metric_without_verdict_pauses_after_its_limit_and_resume_bears_as_many_again(
    value: float | None,
) -> None:
    world = measured()
    world.metric = lambda: (value, None)
    world.run(60)
    assert pauses(world) == ["InconclusiveAnalysis"]
    assert world.routing.weight() == 10
    world.say("resume").run(8)
    assert pauses(world) == []
    world.run(40)
    assert pauses(world) == ["InconclusiveAnalysis"]
    world.metric = lambda: (1.0, None)
    world.say("resume").run(30)
    assert world.routing.weight() == 50


@pytest.mark.parametrize(("policy", "aborted"), [("Hold", False), ("Pause", False), ("Abort", True)])
def test_queries_without_answers_pause_after_their_limit(policy: str, aborted: bool) -> None:
    world = measured(analysis={"onMetricsUnavailable": policy})
    world.metric = lambda: (None, "connection refused")
    world.run(12)
    assert world.condition("MetricsAvailable")[0] == "False"
    assert pauses(world) == []
    world.run(30)
    assert (world.status.abort is not None) is aborted
    if not aborted:
        assert pauses(world) == ["MetricsUnavailable"]
        world.metric = lambda: (1.0, None)
        world.run(30)
        assert pauses(world) == []
        assert world.routing.weight() == 50


METRIC = MetricSpec.model_validate(
    {
        "name": "m",
        "prometheus": {"address": "http://p", "query": "q"},
        "successCondition": "result <= 1.2",
        "failureCondition": "result > 2",
    }
)
ONE_SIDED = METRIC.model_copy(update={"failure_condition": None})


@pytest.mark.parametrize(
    ("metric", "value", "error", "phase"),
    [
        (METRIC, 1.2, None, CheckPhase.SUCCESSFUL),
        (METRIC, 1.5, None, CheckPhase.INCONCLUSIVE),
        (METRIC, 2.5, None, CheckPhase.FAILED),
        (METRIC, math.inf, None, CheckPhase.FAILED),
        (METRIC, math.nan, None, CheckPhase.INCONCLUSIVE),
        (METRIC, None, None, CheckPhase.INCONCLUSIVE),
        (METRIC, 1.0, "timeout", CheckPhase.ERROR),
        (ONE_SIDED, 1.5, None, CheckPhase.FAILED),
        (ONE_SIDED, math.nan, None, CheckPhase.INCONCLUSIVE),
    ],
)
def test_the_verdict_on_one_measurement(
    metric: MetricSpec, value: float | None, error: str | None, phase: CheckPhase
) -> None:
    assert rollout_metrics.judge(metric, Measurement("m", value, error))[0] is phase

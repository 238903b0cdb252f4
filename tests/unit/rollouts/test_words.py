"""What people and programs read: phase, message, conditions, events, alerts, steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_operator.api.adapterdeployment_status import AbortReason, PauseReason, RolloutPhase, Stage
from finetune_operator.core.conditions import KStatus
from finetune_operator.core.rollout_conditions import RolloutCondition
from finetune_operator.core.rollout_endings import ADVICE
from tests.unit.rollouts.world import World, reached, revision, serving

STEPS: list[dict[str, Any]] = [{"setWeight": 25}, {"pause": {"duration": "1m"}}]


def canary(**more: Any) -> World:
    world = serving(steps=more.pop("steps", STEPS), **more).deploy("b")
    world.run(30, until=reached(Stage.CANARY, 1))
    return world.run(15)


def test_the_message_has_the_step_and_the_numbers() -> None:
    message = canary().status.message or ""
    assert message.startswith("step 2/2 pause: the step waits for 1m: ")
    assert "stable and " in message
    assert message.endswith("candidate answers, errors e-value 0.4 of 100")
    assert canary().status.step == "2/2 pause"


def test_all_conditions_are_there_with_their_generation() -> None:
    world = canary()
    found = {condition.type: condition for condition in world.status.conditions}
    assert set(found) == {*RolloutCondition, *KStatus}
    assert {condition.observed_generation for condition in found.values()} == {world.generation}
    assert {kind for kind, condition in found.items() if condition.status == "False"} == {
        "Progressing",
        "Promoted",
        "InvalidSpec",
        "Stalled",
    }
    assert world.condition("Paused") == ("True", "CanaryPauseStep")
    assert world.condition("AnalysisPassing")[0] == "True"


def test_promoted_can_be_waited_for_and_starts_anew_with_each_rollout() -> None:
    world = serving(steps=STEPS)
    assert world.condition("Promoted") == ("True", "Promoted")
    world.deploy("b").step()
    assert world.condition("Promoted")[0] == "False"
    moments = []
    for _ in range(200):
        world.run(1)
        moments.append((world.condition("Promoted")[0], world.everybody_gets()))
    assert ("True", revision("b")) in moments
    assert all(given == revision("b") for status, given in moments if status == "True")


def test_a_first_deployment_is_promoted_only_when_every_router_serves_it() -> None:
    world = World(spec=None)
    world.routing.delay_seconds = 20
    world.deploy("a")
    for _ in range(60):
        world.run(1)
        promoted = any(c.type == "Promoted" and c.status == "True" for c in world.status.conditions)
        assert promoted <= (world.everybody_gets() == revision("a"))
    assert world.condition("Promoted")[0] == "True"


def test_each_transition_is_told_once() -> None:
    world = serving(steps=STEPS).deploy("b")
    world.announced = []
    world.run(200)
    told = [item.reason for item in world.announced]
    assert told == [
        "RolloutStarted",
        "Canary",
        "Canary",
        "CanaryPauseStep",
        "Promoting",
        "Promoted",
    ]
    assert {item.severity for item in world.announced} == {"info"}


def test_alerts_have_the_severity_of_what_happened() -> None:
    world = canary()
    world.evidence.skewed = True
    world.run(10)
    world.evidence.bad = {revision("b")}
    world.run(10)
    severities = {item.reason: str(item.severity) for item in world.announced}
    assert severities["SampleRatioMismatch"] == "warn"
    assert severities["GuardrailBreached"] == "error"
    assert severities["RolloutStarted"] == "info"
    reasons = [item.reason for item in world.announced]
    assert reasons.count("GuardrailBreached") == reasons.count("SampleRatioMismatch") == 1


def test_a_rollback_says_what_happened_and_what_to_do() -> None:
    world = canary()
    world.evidence.bad = {revision("b")}
    world.run(30)
    message = world.status.message or ""
    assert message.startswith("guardrail errors: errors 3 times as often")
    assert message.endswith("train a better adapter and set spec.adapter to it")
    assert world.condition("AnalysisPassing") == ("False", "GuardrailBreached")
    assert world.condition("Progressing") == ("False", "Aborted")


def test_a_status_survives_forty_rollouts_within_its_bounds() -> None:
    world = serving(steps=[], canary={"scaleDownDelaySeconds": 604800})
    for engine in world.engines:
        engine.max_loras = 100
    for number in range(40):
        world.deploy("0123456789abcdef"[number % 16]).run(8)
    assert len(world.status.adapters) <= 16
    assert len(world.status.history) == 10
    assert world.status.stable_revision == world.status.history[0].revision


PAGE = Path(__file__).parents[3] / "docs" / "rollouts.md"


@pytest.mark.parametrize(
    "word",
    sorted(
        {str(w) for kind in (Stage, RolloutPhase, PauseReason, AbortReason, RolloutCondition) for w in kind}
    ),
)
def test_the_page_about_rollouts_has_every_word_of_the_status(word: str) -> None:
    assert word in PAGE.read_text(encoding="utf-8")


def test_every_reason_to_go_back_has_advice() -> None:
    assert set(ADVICE) == set(AbortReason)

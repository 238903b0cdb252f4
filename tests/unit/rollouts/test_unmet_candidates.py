"""A candidate that nobody has met: time alone proves nothing of it."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.api.adapterdeployment_status import Stage
from tests.unit.rollouts.world import reached, revision, serving

EVALUATIONS = [{"name": "golden", "uri": "file:///golden.jsonl"}]
MIRROR: dict[str, Any] = {"setMirror": {"percent": 1, "duration": "20s"}}
TIMED: dict[str, list[dict[str, Any]]] = {
    "pause": [{"setWeight": 5}, {"pause": {"duration": "1m"}}, {"setWeight": 50}, {"pause": {}}],
    "analysis": [{"setWeight": 5}, {"analysis": {"duration": "1m"}}, {"setWeight": 50}, {"pause": {}}],
    "approval": [{"setWeight": 5}, {"approval": {"timeout": "1m", "onTimeout": "Promote"}}],
    "mirror": [{"setWeight": 5}, {"setMirror": {"percent": 5, "duration": "1m"}}],
    "last": [MIRROR, {"setWeight": 5}],
    "gate": [MIRROR, {"setWeight": 5}, {"evalGate": {"evalRef": "golden", "minScore": 0.5}}],
}


@pytest.mark.parametrize("kind", TIMED)
def test_time_alone_promotes_nobody_whom_no_user_has_met(kind: str) -> None:
    world = serving(steps=TIMED[kind], evaluations=EVALUATIONS).deploy("b")
    world.evidence.unheard = True
    world.run(600)
    status = world.status
    assert world.routing.weight() == 5, status.message
    assert (status.phase, status.reason) == ("Paused", "InsufficientSamples")
    assert "the candidate none, at 5%" in (status.message or "")
    assert [item.severity for item in world.announced if item.reason == "InsufficientSamples"] == ["warn"]
    world.evidence.unheard = False
    world.run(20)
    assert world.status.reason != "InsufficientSamples"
    assert world.routing.weight() != 5, "it goes on by itself"


@pytest.mark.parametrize("kind", TIMED)
def test_a_person_may_promote_whom_no_user_has_met(kind: str) -> None:
    world = serving(steps=TIMED[kind], evaluations=EVALUATIONS).deploy("b")
    world.evidence.unheard = True
    world.run(200)
    world.say("promote").run(20)
    assert world.routing.weight() != 5, world.status.last_action


def test_a_candidate_is_waited_for_a_while_before_somebody_is_asked() -> None:
    world = serving(steps=TIMED["pause"]).deploy("b")
    world.evidence.unheard = True
    world.run(30, until=reached(Stage.CANARY, 1))
    world.run(64)
    assert (world.status.phase, world.status.reason) == ("Progressing", "InsufficientSamples")
    assert "InsufficientSamples" not in [item.reason for item in world.announced]


def test_without_any_traffic_time_goes_on() -> None:
    world = serving(steps=[{"setWeight": 5}, {"pause": {"duration": "1m"}}]).deploy("b")
    world.evidence.quiet = True
    world.run(200)
    assert world.everybody_gets() == revision("b")

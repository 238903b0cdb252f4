"""The matrix: what is deployed x what the evidence does x where the operator dies.

Each row is a whole rollout in the simulated world; the invariants hold in every pass of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from finetune_operator.api.adapterdeployment_status import AdapterDeploymentStatus, Stage
from tests.unit.rollouts.world import World, reached, revision, serving

STEPS: list[dict[str, Any]] = [
    {"setWeight": 5},
    {"pause": {"duration": "15s"}},
    {"analysis": {}},
    {"setWeight": 50},
    {"pause": {"duration": "15s"}},
]
QUICK: dict[str, Any] = {
    "steps": STEPS,
    "canary": {"maxStepDuration": "1m", "scaleDownDelaySeconds": 20, "abortScaleDownDelaySeconds": 10},
    "analysis": {"objectives": [{"name": "helpful", "metric": "helpful", "minSamplesPerArm": 20}]},
    "progressDeadlineSeconds": 60,
}
OTHER_STEPS: list[dict[str, Any]] = [{"setWeight": 10}, {"pause": {"duration": "15s"}}, {"analysis": {}}]
MINUTES = 8 * 60


@dataclass(frozen=True)
class Outcome:
    serves: str
    """Letter of the revision that everybody gets in the end."""
    stage: Stage
    history: tuple[tuple[str, str], ...]
    """Newest first."""
    pauses: tuple[str, ...] = ()


def promoted(letter: str, *before: tuple[str, str], how: str = "Promoted") -> Outcome:
    return Outcome(letter, Stage.SUCCEEDED, ((letter, how), *before))


def aborted(letter: str, *before: tuple[str, str]) -> Outcome:
    return Outcome("a", Stage.FAILED, ((letter, "Aborted"), *before))


def waiting(*history: tuple[str, str], serves: str = "a", reason: str) -> Outcome:
    return Outcome(serves, Stage.CANARY, history, (reason,))


A = ("a", "Promoted")


def deploy_b(world: World) -> None:
    world.deploy("b")


def bad_b(world: World) -> None:
    world.evidence.bad = {revision("b")}
    world.deploy("b")


def bad_b_then_good_c(world: World) -> None:
    bad_b(world)
    world.run(MINUTES, until=_stuck_or_over)
    world.deploy("c")


def bad_b_then_bad_c(world: World) -> None:
    bad_b_then_good_c(world)
    world.evidence.bad = {revision("b"), revision("c")}


def superseded(world: World) -> None:
    world.deploy("b")
    world.run(60, until=reached(Stage.CANARY, 1))
    world.deploy("c")


def steps_edited(world: World) -> None:
    world.deploy("b")
    world.run(60, until=reached(Stage.CANARY, 1))
    salt = world.routing.route.salt if world.routing.route else ""
    world.edit(lambda spec: spec["strategy"]["canary"].update(steps=OTHER_STEPS))
    world.run(60, until=reached(Stage.CANARY, 1))
    assert world.routing.route is not None
    assert (world.routing.route.salt, world.routing.route.weight) == (salt, 10), (
        "the same users, the new steps"
    )


def spec_reverted(world: World) -> None:
    world.deploy("b")
    world.run(60, until=reached(Stage.CANARY, 1))
    world.deploy("a")


def first_deployment(world: World) -> None:
    """What `serving` did already."""


def return_to_a(world: World) -> None:
    mode, world.evidence.mode = world.evidence.mode, "fine"
    world.deploy("b")
    world.run(MINUTES, until=_over)
    world.evidence.mode = mode
    world.deploy("a")


SCENARIOS: dict[str, tuple[Callable[[World], None], dict[str, Outcome]]] = {
    "good to better": (
        deploy_b,
        {
            "fine": promoted("b", A),
            "late": promoted("b", A),
            "missing": waiting(A, reason="MetricsUnavailable"),
            "nan": waiting(A, reason="InconclusiveAnalysis"),
        },
    ),
    "good to bad": (
        bad_b,
        {
            "fine": aborted("b", A),
            "late": aborted("b", A),
            "missing": waiting(A, reason="MetricsUnavailable"),
            "nan": aborted("b", A),
        },
    ),
    "bad to good": (
        bad_b_then_good_c,
        {
            "fine": promoted("c", ("b", "Aborted"), A),
            "late": promoted("c", ("b", "Aborted"), A),
            "missing": waiting(("b", "Superseded"), A, reason="MetricsUnavailable"),
            "nan": waiting(("b", "Aborted"), A, reason="InconclusiveAnalysis"),
        },
    ),
    "bad to bad": (
        bad_b_then_bad_c,
        {
            "fine": aborted("c", ("b", "Aborted"), A),
            "late": aborted("c", ("b", "Aborted"), A),
            "missing": waiting(("b", "Superseded"), A, reason="MetricsUnavailable"),
            "nan": aborted("c", ("b", "Aborted"), A),
        },
    ),
    "superseded": (
        superseded,
        {
            "fine": promoted("c", ("b", "Superseded"), A),
            "late": promoted("c", ("b", "Superseded"), A),
            "missing": waiting(("b", "Superseded"), A, reason="MetricsUnavailable"),
            "nan": waiting(("b", "Superseded"), A, reason="InconclusiveAnalysis"),
        },
    ),
    "steps edited": (
        steps_edited,
        {
            "fine": promoted("b", A),
            "late": promoted("b", A),
            "missing": waiting(A, reason="MetricsUnavailable"),
            "nan": waiting(A, reason="InconclusiveAnalysis"),
        },
    ),
    "spec reverted": (
        spec_reverted,
        dict.fromkeys(
            ("fine", "late", "missing", "nan"), Outcome("a", Stage.SUCCEEDED, (("b", "RolledBack"), A))
        ),
    ),
    "first deployment": (first_deployment, dict.fromkeys(("fine", "late", "missing", "nan"), promoted("a"))),
    "rollback window": (
        return_to_a,
        dict.fromkeys(
            ("fine", "late", "missing", "nan"), promoted("a", ("b", "Promoted"), A, how="FastRolledBack")
        ),
    ),
}


def never(world: World) -> Callable[[str], bool]:
    return lambda point: False


def everywhere_once(prefix: str) -> Callable[[World], Callable[[str], bool]]:
    """Dies at every place of that kind, once per stage and step: each such pass is repeated from the status alone."""

    def plan(world: World) -> Callable[[str], bool]:
        died: set[tuple[object, ...]] = set()

        def dies(point: str) -> bool:
            status = world.status
            where = (
                point,
                status.rollout_start_time,
                status.stage,
                status.current_step_index,
                status.weights,
            )
            place = tuple(str(part) for part in where)
            if not point.startswith(prefix) or place in died:
                return False
            died.add(place)
            return True

        return dies

    return plan


KILLS = {
    "alive": never,
    "killed after the status": everywhere_once("status"),
    "killed after the route": everywhere_once("route"),
    "killed after each action": everywhere_once("action"),
}


def _over(status: AdapterDeploymentStatus) -> bool:
    return status.stage in (Stage.SUCCEEDED, Stage.FAILED)


def _stuck_or_over(status: AdapterDeploymentStatus) -> bool:
    reasons = {"MetricsUnavailable", "InconclusiveAnalysis", "InsufficientSamples"}
    return _over(status) or any(pause.reason in reasons for pause in status.pause_conditions)


@pytest.mark.parametrize("kill", KILLS)
@pytest.mark.parametrize("evidence", ["fine", "missing", "nan", "late"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_matrix(scenario: str, evidence: str, kill: str) -> None:
    play, outcomes = SCENARIOS[scenario]
    world = World(spec=None)
    world.killed = KILLS[kill](world)
    world.evidence.mode = evidence
    world = serving(world=world, **QUICK)
    play(world)
    world.run(MINUTES, until=lambda status: _stuck_or_over(status) and status.stage != Stage.ABORTING)
    world.run(40)
    expected, status = outcomes[evidence], world.status
    assert status.stage is expected.stage, status.message
    assert tuple(world.history()) == expected.history
    assert tuple(str(pause.reason) for pause in status.pause_conditions) == expected.pauses
    assert status.stable_revision == revision(expected.serves)
    if not expected.pauses:
        assert world.everybody_gets() == revision(expected.serves)
        assert [adapter.revision for adapter in status.adapters] == [revision(expected.serves)]
        assert all(set(engine.held) == {f"bot--{revision(expected.serves)}"} for engine in world.engines)
    else:
        assert world.routing.weight() in (5, 10), "held at the first weight"
    if kill != "alive":
        assert world.kills

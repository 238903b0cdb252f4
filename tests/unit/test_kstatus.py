"""What tools that wait for an object by kstatus (Flux, Helm 4, kpt) see in each phase."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from finetune_operator.api.adapterdeployment_status import RolloutPhase, Stage
from finetune_operator.api.finetunejob import Phase
from finetune_operator.core import statuses
from finetune_operator.core.facts import Observed
from tests.kstatus import computed
from tests.unit.operator.stories import START, Story
from tests.unit.rollouts.world import World, reached, serving

STEPS: list[dict[str, Any]] = [{"setWeight": 25}, {"pause": {"duration": "1m"}}]
RESTING = {"Suspended": "Current", "Succeeded": "Current", "Cancelled": "Current", "Failed": "Failed"}


def waited(status: BaseModel, generation: int) -> str:
    return computed(
        {
            "metadata": {"generation": generation},
            "status": status.model_dump(mode="json", by_alias=True, exclude_none=True),
        }
    )


@pytest.mark.parametrize("phase", Phase)
def test_a_job_is_waited_for_until_it_rests(phase: Phase) -> None:
    seen = Observed(job=Story().job)
    status = statuses.build(seen, phase, "Reason", "so it is", claims=[], now=START)
    assert waited(status, 1) == RESTING.get(phase, "InProgress")
    assert waited(status, 2) == "InProgress"


def rolling() -> World:
    world = serving(steps=STEPS).deploy("b")
    return world.run(30, until=reached(Stage.CANARY, 1)).run(15)


def seen(world: World) -> tuple[str, str]:
    return str(world.status.phase), waited(world.status, world.generation)


def test_a_rollout_is_waited_for_until_the_new_revision_serves() -> None:
    assert seen(World(spec=None).deploy("a").run(1)) == (RolloutPhase.PROGRESSING, "InProgress")
    world = rolling()
    assert seen(world) == (RolloutPhase.PAUSED, "InProgress")
    assert seen(world.run(200)) == (RolloutPhase.HEALTHY, "Current")


def test_a_rollback_is_a_failure_and_another_revision_a_new_try() -> None:
    world = rolling().say("abort").run(30)
    assert seen(world) == (RolloutPhase.DEGRADED, "Failed")
    assert seen(world.deploy("c").run(1)) == (RolloutPhase.PROGRESSING, "InProgress")


def test_engines_that_lost_an_adapter_load_it_again() -> None:
    world = serving()
    world.engines.clear()
    assert seen(world.run(5)) == (RolloutPhase.DEGRADED, "InProgress")


def test_a_spec_that_cannot_be_read_waits_for_nobody() -> None:
    world = rolling()
    world.spec, world.problem = None, "spec.traffic: unknown field"
    assert seen(world.run(5)) == (RolloutPhase.PAUSED, "Failed")

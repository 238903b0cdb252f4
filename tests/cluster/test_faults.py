"""What happens to single jobs in K8sJobMode: no attempt twice, little work lost, and a status that says why."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.cluster import deletions, stories
from tests.cluster.objects import JOB_SECONDS, LONG, delete, head_pod, job
from tests.cluster.stories import Stage, Story, Told


def a_drained_pod_saves_a_checkpoint_first(stage: Stage) -> None:
    """Deleting the pod runs the preStop hook: the attempt ends as Preempted and the next one loses nothing."""
    team = stage.team
    checkpoint = {"uri": "pvc://files/checkpoints/drained", "everySteps": 500}
    team.apply(job("drained", hyperparameters=LONG, checkpoint=checkpoint))
    team.wait_job("drained", lambda s: s.get("progress", {}).get("step", 0) > 20, seconds=JOB_SECONDS)
    team("delete", "pod", head_pod(team, "drained")["metadata"]["name"], "--wait=false")
    status = team.wait_job(
        "drained",
        lambda s: len(s["attempts"]) == 2 and "resumedFromStep" in s["attempts"][1],
        seconds=2 * JOB_SECONDS,
    )["status"]
    first, second = status["attempts"]
    assert first["class"] == "Preempted", json.dumps(status["attempts"], indent=1)
    assert first.get("lostSteps", 0) <= 1
    assert second["resumedFromStep"] % 500 != 0, "it resumed from the checkpoint of the hook"
    stage.runs_once("drained", 2)
    team("annotate", "ftj", "drained", "finetune.dev/action=cancel")
    stories.ended(team.finished("drained", seconds=120), "Cancelled")
    delete(team, "drained")


def a_killed_head_pod_costs_one_interval_at_most(stage: Stage) -> None:
    stories.kill_head(stage, "headless")


def a_killed_trainer_costs_one_interval_at_most(stage: Stage) -> None:
    stories.kill_trainer(stage, "shot")


def a_job_that_fails_at_once_says_so(stage: Stage) -> None:
    stories.fail_at_once(stage, "at-once")


STORIES = (
    a_drained_pod_saves_a_checkpoint_first,
    a_killed_head_pod_costs_one_interval_at_most,
    a_killed_trainer_costs_one_interval_at_most,
    a_job_that_fails_at_once_says_so,
    *deletions.PHASES,
)


@pytest.fixture(scope="module")
def told(request: pytest.FixtureRequest, stage: Stage) -> Iterator[Told]:
    with stories.together(request, stage, at_once=3) as told:
        yield told


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_faults(story: Story, told: Told) -> None:
    told[story].result()

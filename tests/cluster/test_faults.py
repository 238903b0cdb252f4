"""What happens to single jobs in K8sJobMode: no attempt twice, little work lost, and a status that says why."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.cluster import deletions, states, stories, suspensions
from tests.cluster.objects import JOB_SECONDS, LONG, delete, head_pod, job, wait_for
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


def a_killed_submitter_costs_one_interval_at_most(stage: Stage) -> None:
    """KubeRay takes its end for the job's, and takes the trainer's pod away."""
    stories.takes_steps(stage, "unsubmitted")
    pod = states.submitter(stage, "unsubmitted")
    stage.team("delete", "pod", pod, "--grace-period=0", "--force", "--wait=false")
    stories.costs_one_interval(stage, "unsubmitted")


def a_deleted_submitter_costs_nothing(stage: Stage) -> None:
    """KubeRay's status stays at RUNNING for good: the trainer's own report counts, and its pod goes all the same."""
    stories.takes_steps(stage, "orphaned")
    stage.team("delete", "job", "orphaned-a1", "--wait=false")
    status = stage.team.finished("orphaned", seconds=JOB_SECONDS)
    stories.ended(status, "Succeeded")
    assert len(status["attempts"]) == 1
    stage.runs_once("orphaned", 1)
    labels = ("-l", "finetune.dev/job=orphaned")
    wait_for("no pod of orphaned", lambda: not stage.team.items("pods", *labels) or None, seconds=180)
    delete(stage.team, "orphaned")


def a_job_that_fails_at_once_says_so(stage: Stage) -> None:
    stories.fail_at_once(stage, "at-once")


STORIES = (
    *states.ALL,
    a_drained_pod_saves_a_checkpoint_first,
    a_killed_head_pod_costs_one_interval_at_most,
    a_killed_trainer_costs_one_interval_at_most,
    a_killed_submitter_costs_one_interval_at_most,
    a_deleted_submitter_costs_nothing,
    a_job_that_fails_at_once_says_so,
    *deletions.PHASES,
    *suspensions.PHASES,
)


@pytest.fixture(scope="module")
def told(request: pytest.FixtureRequest, stage: Stage) -> Iterator[Told]:
    with stories.together(request, stage, at_once=3) as told:
        yield told


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_faults(story: Story, told: Told) -> None:
    told[story].result()

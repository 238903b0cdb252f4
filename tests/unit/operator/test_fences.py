"""What is left of an attempt, and of a job: who waits for it, for how long, and in which words."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from finetune_operator.api.finetunejob import Phase
from finetune_operator.core import fences, jobs
from finetune_operator.core.facts import DeleteJob, DeleteRayJob, Observed, PodFacts, RayJobFacts
from tests.unit.operator.stories import RUNNING, START, Story, rayjob, result

INVALID = rayjob("ValidationFailed")
GOING = PodFacts("triage-a1-head", True, terminating=True, node="node-7")
HINT = "; if node node-7 is gone for good, delete its pods with --force"
STUCK = replace(RUNNING, deleting_since=START - timedelta(seconds=120))


def ended(spec: dict[str, Any], *, heard: bool) -> Story:
    """A job that has been cancelled right now."""
    story = Story(spec).trained() if heard else Story(spec).started()
    story.act("cancel")
    story.step(after=0)
    assert (story.job.status.phase, story.job.status.completion_time) == (Phase.CANCELLED, story.now)
    return story


@pytest.mark.parametrize(
    ("left", "heard", "age", "deleted", "again"),
    [
        (RUNNING, True, 4, False, 6),
        (RUNNING, True, 10, True, 1),
        (rayjob("Initializing"), False, 10, True, 1),
        (rayjob("Running", "FAILED"), True, 10, False, 50),  # KubeRay is about to see it
        (rayjob("Running", "FAILED"), True, 60, True, 1),
        (rayjob("Complete", "STOPPED"), True, 99, False, None),
        (INVALID, False, 99, False, None),  # it never had a cluster
        (INVALID, True, 99, True, 1),
        (replace(INVALID, job_status="RUNNING"), False, 99, True, 1),
        (replace(RUNNING, deleting_since=START), True, 99, False, None),
        (replace(RUNNING, ours=False), True, 99, False, None),
        (None, True, 99, False, None),
    ],
)
@pytest.mark.parametrize("ttl", [None, 3, 1_000])
def test_what_still_runs_after_the_end_is_taken_down_when_its_time_is_over(
    left: RayJobFacts | None, heard: bool, age: int, deleted: bool, again: float | None, ttl: int | None
) -> None:
    story = ended({} if ttl is None else {"ttlSecondsAfterFinished": ttl}, heard=heard)
    story.now += timedelta(seconds=age)
    plan = story.step(rayjob=left)
    if ttl == 3:
        assert list(plan.actions) == [DeleteJob()]
        return
    assert list(plan.actions) == ([DeleteRayJob("triage-a1", left.uid)] if left and deleted else [])
    waits = [wait for wait in (again, ttl and ttl - age) if wait is not None]
    assert plan.requeue_after == min(waits, default=None)


def test_a_rayjob_is_looked_for_a_quarter_of_an_hour_after_the_end() -> None:
    story = ended({}, heard=True)
    assert jobs.has_cleanup_left(story.job.status, now=story.now + timedelta(seconds=899))
    assert not jobs.has_cleanup_left(story.job.status, now=story.now + timedelta(seconds=900))
    assert not jobs.has_cleanup_left(Story().trained().job.status, now=story.now)


def test_a_job_that_is_deleted_takes_down_what_runs_unless_it_is_to_stay() -> None:
    """`kubectl delete --cascade=foreground` and other finalizers: garbage collection waits for them."""
    story = Story().trained()
    look = replace(RUNNING, name="triage-i1", uid="i")
    for orphans, runs, looks, deleted in (
        (False, RUNNING, look, ["triage-a1", "triage-i1"]),
        (False, replace(RUNNING, deleting_since=START), look, ["triage-i1"]),
        (False, replace(RUNNING, ours=False), None, []),
        (False, None, None, []),
        (True, RUNNING, look, []),
    ):
        story.job = replace(story.job, deleting=True, orphans=orphans)
        plan = story.step(rayjob=runs, inspection=looks)
        assert [action.name for action in plan.actions if isinstance(action, DeleteRayJob)] == deleted


@pytest.mark.parametrize(
    ("seen", "age", "text"),
    [
        ({}, 200, ""),
        ({"clusters": ["c"]}, 0, "waits until RayCluster c is gone"),
        ({"rayjob": RUNNING, "pods": [GOING]}, 0, "waits until RayJob triage-a1, pod triage-a1-head are gone"),
        ({"pods": [replace(GOING, name=f"p{n}") for n in (3, 1, 2)]}, 0, "waits until pod p1, pod p2, pod p3 are gone"),
        (
            {"pods": [replace(GOING, name=f"p{n}") for n in range(5)]},
            0,
            "waits until pod p0, pod p1, pod p2 and 2 more are gone",
        ),
        ({"pods": [GOING]}, 119, "waits until pod triage-a1-head is gone"),
        ({"pods": [GOING]}, 120, f"waits until pod triage-a1-head is gone{HINT}"),
        ({"pods": [replace(GOING, terminating=False)]}, 200, "waits until pod triage-a1-head is gone"),
        ({"pods": [replace(GOING, node=None)]}, 200, "waits until pod triage-a1-head is gone"),
        ({"pods": [replace(GOING, gone=True)], "clusters": ["c"]}, 200, "waits until RayCluster c is gone"),
        (
            {"rayjob": STUCK, "pods": [GOING]},
            0,
            "waits until RayJob triage-a1, pod triage-a1-head are gone; KubeRay does not let RayJob triage-a1 go: see "
            "that its operator runs, or remove the finalizer ray.io/rayjob-finalizer from it",
        ),
        (
            {"rayjob": replace(STUCK, known_to_kuberay=False)},
            0,
            "waits until RayJob triage-a1 is gone; a finalizer that is not KubeRay's holds RayJob triage-a1, and with "
            "it the pods: see whose it is (kubectl get rayjob triage-a1 -o jsonpath='{.metadata.finalizers}') and "
            "that its controller runs",
        ),
        ({"rayjob": replace(RUNNING, ours=False)}, 200, ""),
        ({"rayjob": rayjob("Complete", "SUCCEEDED")}, 200, ""),
    ],
)  # fmt: skip
def test_what_is_waited_for_is_named_with_what_to_do(seen: dict[str, Any], age: int, text: str) -> None:
    story = Story().trained()
    story.step(rayjob=RUNNING, report=result("Storage", 74, "away"), after=age)
    fence = fences.look(Observed(job=story.job, **seen), story.attempt, now=story.now)
    assert (fence.text, fence.left) == (text, text != "")

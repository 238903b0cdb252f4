"""Too little memory, of the GPU and of the pod: what the next attempt gets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from finetune_operator.api.finetunejob import ErrorClass, Phase
from finetune_operator.core import policies
from finetune_operator.core.facts import (
    PodFacts,
)
from tests.unit.operator.stories import (
    QUICK,
    Story,
    current,
    fail,
    rayjob,
    result,
    second,
)

GPU: dict[str, Any] = {"resources": {"gpusPerWorker": 1}}


@pytest.mark.parametrize(
    ("hyper", "rows"),
    [
        ({"globalBatchSize": 16, "microBatchSize": 8}, [4, 2, 1]),
        ({"globalBatchSize": 12, "microBatchSize": 6}, [3, 1]),
        ({"globalBatchSize": 15}, [1]),
        ({"globalBatchSize": 7, "microBatchSize": 1}, []),
    ],
)
def test_too_little_gpu_memory_halves_the_micro_batch_until_it_is_one(
    hyper: dict[str, int], rows: list[int]
) -> None:
    story = Story({**QUICK, "hyperparameters": hyper}).trained()
    tried: list[int] = []
    for _ in range(8):
        plan = story.step(rayjob=current(story), report=result("GpuOutOfMemory", 80, "out of memory"))
        if plan.status.phase is Phase.FAILED:
            break
        story.step(rayjob=None)
        overrides = story.attempt.overrides
        assert overrides is not None
        assert overrides.micro_batch_size is not None
        assert hyper["globalBatchSize"] % overrides.micro_batch_size == 0
        tried.append(overrides.micro_batch_size)
        story.step()
    if "microBatchSize" in hyper:
        assert tried == rows
    else:
        assert tried[-1:] == rows
    assert "1 row per forward pass" in (story.job.status.message or "")


def test_what_was_changed_for_lack_of_memory_stays_for_the_attempts_that_follow() -> None:
    story = Story(QUICK).trained()
    had = []
    for error_class, code in (
        ("HostOutOfMemory", 81), ("GpuOutOfMemory", 80), ("GpuOutOfMemory", 80), ("Storage", 74), ("Suspended", 0),
    ):  # fmt: skip
        if error_class == "Suspended":
            story.change(suspend=True)
            story.step(rayjob=current(story))
            story.step()
            story.change(suspend=False)
        else:
            story.step(rayjob=current(story), report=result(error_class, code, "broken"))
        story.step()
        assert story.attempt.overrides is not None
        had.append((story.attempt.overrides.memory, story.attempt.overrides.micro_batch_size))
    assert story.attempt.number == 6
    assert had == [("8192Mi", None), ("8192Mi", 4), ("8192Mi", 2), ("8192Mi", 2), ("8192Mi", 2)]


def test_too_little_memory_of_the_pod_is_doubled_once() -> None:
    story = Story(QUICK).trained()
    fail(story, "HostOutOfMemory", 81)
    assert story.attempt.overrides is not None
    assert story.attempt.overrides.memory == "8192Mi"
    story.step()
    plan = story.step(rayjob=second(), report=result("HostOutOfMemory", 81, "again"))
    assert (plan.status.phase, "8192Mi already" in (plan.status.message or "")) == (Phase.FAILED, True)


def test_a_killed_container_tells_of_its_memory_where_the_trainer_could_not() -> None:
    story = Story(QUICK).trained()
    killed = PodFacts("triage-a1-head", False, out_of_memory=True)
    lost = rayjob("Failed", "RUNNING", reason="SubmissionFailed", message="x")
    assert story.step(rayjob=lost, pods=[killed]).status.reason == "HostOutOfMemory"


def test_a_container_that_ended_under_the_trainer_is_told_instead_of_a_failed_submission_alone() -> None:
    story = Story(QUICK).trained()
    again = PodFacts("triage-a1-head", True, restarted="Error, exit code 137")
    story.step(rayjob=rayjob("Failed", "RUNNING", reason="SubmissionFailed", message="x"), pods=[again])
    assert story.attempt.error_class is ErrorClass.LOST
    told = "the container of pod triage-a1-head ended: Error, exit code 137 (SubmissionFailed: x)"
    assert story.attempt.message == told


def test_a_container_that_ended_before_the_trainer_began_is_not_why_the_trainer_was_killed() -> None:
    story = Story(QUICK).trained()
    again = PodFacts("triage-a1-head", True, restarted="Error, exit code 1")
    killed = "Job entrypoint command failed with exit code 137, last available logs: x"
    story.step(rayjob=rayjob("Failed", "FAILED", reason="AppFailed", message=killed), pods=[again])
    assert story.attempt.message == "the trainer was killed by SIGKILL"


def test_a_container_whose_memory_does_not_even_let_it_start_is_not_waited_for() -> None:
    story = Story(QUICK).started()
    head = PodFacts("triage-a1-head", True, waiting_reason="CrashLoopBackOff", waiting_message="OOMKilled")
    assert story.step(rayjob=rayjob("Initializing"), pods=[head]).status.reason == "CrashLoopBackOff"
    plan = story.step(rayjob=rayjob("Initializing"), pods=[replace(head, out_of_memory=True)])
    assert plan.status.reason == "HostOutOfMemory"
    assert plan.status.next_overrides is not None
    assert plan.status.next_overrides.memory == "8192Mi"
    story.step()
    full = PodFacts(
        "triage-a2-head", False, waiting_reason="Unschedulable", waiting_message="Insufficient memory"
    )
    told = story.step(rayjob=replace(second(), deployment_status="Initializing"), pods=[full]).status.message
    assert "8192Mi memory" in (told or ""), "what it asks for, and not what the spec does"


@pytest.mark.parametrize("error_class", [("GpuOutOfMemory", 80), ("HostOutOfMemory", 81)])
def test_out_of_memory_fails_the_job_where_the_spec_says_so(error_class: tuple[str, int]) -> None:
    story = Story({"retry": {"onOutOfMemory": "Fail"}}).trained()
    assert fail(story, *error_class).status.phase is Phase.FAILED


@pytest.mark.parametrize(
    ("memory", "doubled"),
    [("4Gi", "8192Mi"), ("500M", "954Mi"), ("1.5Gi", "3072Mi"), ("1Ti", "2097152Mi"), ("4e9", "7630Mi"),
     ("134217728000m", "256Mi"), ("1E3M", "1908Mi")],
)  # fmt: skip
def test_every_way_to_write_an_amount_of_memory_can_be_doubled(memory: str, doubled: str) -> None:
    assert policies.grown(memory) == doubled

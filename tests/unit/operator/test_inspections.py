"""An attempt that did not say how it ended: whether it left an artifact is looked for before anything is decided."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from finetune_operator.api.finetunejob import ErrorClass, Phase
from finetune_operator.core import attempts
from finetune_operator.core.attempts import Ending
from finetune_operator.core.facts import (
    CreateRayJob,
    DeleteRayJob,
    Observed,
    PodFacts,
    RayJobFacts,
)
from finetune_operator.core.reports import Report
from tests.unit.operator.stories import ARTIFACT, START, Story, condition, inspected, rayjob, result, training

NO_RETRIES = {"retry": {"maxInfraRetries": 0}}


def test_success_without_a_report_is_believed_only_after_an_inspection() -> None:
    story = Story().trained()
    over = rayjob("Complete", "SUCCEEDED")
    assert story.step(rayjob=over).status.attempts[-1].inspection == "triage-i1"
    assert list(story.step(rayjob=over).actions) == [CreateRayJob("triage-i1", 1, inspect=True)]
    assert story.step(rayjob=over, inspection=rayjob("Running", "RUNNING")).actions == ()
    found = result("Succeeded", 0, "verified", artifact=ARTIFACT)
    plan = story.step(rayjob=over, inspection=rayjob("Running", "RUNNING"), report=found)
    assert plan.status.phase is Phase.SUCCEEDED


def test_success_without_an_artifact_is_a_failure() -> None:
    story = Story(NO_RETRIES).trained()
    over = rayjob("Complete", "SUCCEEDED")
    story.step(rayjob=over)
    missing = inspected("Internal", 1, "no manifest.json")
    status = story.step(rayjob=over, inspection=rayjob("Failed", "FAILED"), report=missing).status
    assert (status.phase, status.reason) == (Phase.FAILED, "Internal")
    assert "no manifest.json" in (status.message or "")


def test_an_artifact_that_was_committed_before_the_process_was_lost_counts() -> None:
    story = Story().trained()
    lost = rayjob("Failed", "RUNNING", reason="SubmissionFailed", message="submitter died")
    assert story.step(rayjob=lost).status.reason == "Inspecting", "nobody knows how far it came"
    found = result("Succeeded", 0, "verified", artifact=ARTIFACT)
    assert story.step(rayjob=lost, inspection=None, report=found).status.phase is Phase.SUCCEEDED


def test_a_process_that_was_heard_at_work_a_moment_ago_needs_no_inspection() -> None:
    story = Story().trained()
    lost = rayjob("Failed", "RUNNING", reason="SubmissionFailed", message="submitter died")
    status = story.step(rayjob=lost, report=training(step=6)).status
    assert (status.phase, status.reason) == (Phase.RETRYING, "Lost")


@pytest.mark.parametrize(
    ("phase", "age", "remaining", "far"),
    [
        ("Training", 60, 61, True),
        ("Training", 60, None, True),
        ("Validating", 0, 61, True),
        ("Training", 61, 61, False),
        ("Training", 0, 60, False),
        ("Evaluating", 0, 61, False),
        ("Exporting", 0, 61, False),
    ],
)
def test_only_who_was_heard_lately_and_has_much_to_do_can_have_left_no_artifact(
    phase: str, age: int, remaining: int | None, far: bool
) -> None:
    story = Story().trained()
    told = {"trainerStatus": {"estimatedRemainingSeconds": remaining}, "finetune": {"phase": phase}}
    seen = Observed(job=story.job, report=Report.model_validate(told), reported_at=story.now)
    assert attempts.is_far_from_its_end(seen, now=story.now + timedelta(seconds=age)) is far
    assert not attempts.is_far_from_its_end(replace(seen, report=None), now=story.now)


@pytest.mark.parametrize(
    ("error_class", "exit_code", "heard", "looks"),
    [
        (ErrorClass.LOST, None, True, True),
        (ErrorClass.LOST, 137, True, True),
        (ErrorClass.STALLED, None, True, True),
        (ErrorClass.PREEMPTED, None, True, True),
        (ErrorClass.PREEMPTED, 75, True, False),
        (ErrorClass.INTERNAL, None, True, False),
        (ErrorClass.LOST, None, False, False),
    ],
)
def test_before_a_job_is_given_up_the_artifact_of_a_silent_attempt_is_looked_for(
    error_class: ErrorClass, exit_code: int | None, heard: bool, looks: bool
) -> None:
    spec = {"retry": {"maxInfraRetries": 0, "preemptions": 0}}
    story = Story(spec).trained() if heard else Story(spec).started()
    ending = Ending(error_class, "gone", exit_code=exit_code)
    status = attempts.end(Observed(job=story.job), ending, now=story.now).status
    assert (status.phase is Phase.EVALUATING, status.attempts[-1].inspection is not None) == (looks, looks)


@pytest.mark.parametrize(
    ("log", "over"),
    [
        ("Job entrypoint command failed with exit code 1, last available logs: no manifest.json", True),
        ("Job entrypoint command failed with exit code 74, last available logs: away", False),
        ("Job entrypoint command failed with exit code 75, last available logs: x", False),
        ("Job entrypoint command failed with exit code 137, last available logs: x", False),
        ("Ray head pod not found.", False),
    ],
)
def test_an_inspection_that_could_not_look_is_made_again(log: str, over: bool) -> None:
    story = Story(NO_RETRIES).trained()
    end = rayjob("Complete", "SUCCEEDED")
    story.step(rayjob=end)
    assert story.step(rayjob=end, kuberay_installed=False).actions == []
    look = rayjob("Failed", "FAILED", message=log, created=story.now)
    assert (story.step(rayjob=end, inspection=look).status.phase is Phase.FAILED) is over


def test_a_lost_process_without_an_artifact_is_lost() -> None:
    story = Story(NO_RETRIES).trained()
    lost = rayjob("Failed", "RUNNING", reason="SubmissionFailed", message="submitter died")
    story.step(rayjob=lost)
    none = "Job entrypoint command failed with exit code 1, last available logs: no manifest.json"
    status = story.step(rayjob=lost, inspection=rayjob("Failed", "FAILED", message=none)).status
    assert (status.phase, status.reason) == (Phase.FAILED, "Lost")
    assert "submitter died" in (status.message or "")


def test_an_inspection_that_cannot_run_does_not_hold_the_job_for_ever() -> None:
    story = Story(NO_RETRIES).trained()
    story.step(rayjob=rayjob("Complete", "SUCCEEDED"))
    waiting: dict[str, Any] = {
        "rayjob": rayjob("Complete", "SUCCEEDED"),
        "inspection": rayjob("Initializing", created=story.now),
    }
    assert story.step(**waiting, after=1000).status.phase is Phase.EVALUATING
    assert story.step(**waiting).status.phase is Phase.FAILED


def test_an_inspection_whose_storage_did_not_answer_looks_again() -> None:
    story = Story(NO_RETRIES).trained()
    over = rayjob("Complete", "SUCCEEDED")
    story.step(rayjob=over)
    away = inspected("Storage", 74, "the bucket does not answer")
    first = rayjob("Failed", "FAILED", created=story.now)
    assert not story.step(rayjob=over, inspection=first, report=away, after=60).actions
    assert list(story.step(rayjob=over, inspection=first, report=away).actions) == [
        DeleteRayJob("triage-a1", "ray-uid")
    ]
    old = story.now
    assert list(story.step(rayjob=over, report=away, reported_at=old).actions) == [
        CreateRayJob("triage-i1", 1, inspect=True)
    ]
    second = rayjob("Running", "RUNNING", created=story.now)
    plan = story.step(rayjob=over, inspection=second, report=away, reported_at=old, after=120)
    assert plan.status.phase is Phase.EVALUATING, "that was the first one's answer"
    found = inspected("Succeeded", 0, "verified", artifact=ARTIFACT)
    assert story.step(rayjob=over, inspection=second, report=found).status.phase is Phase.SUCCEEDED


def test_storage_that_stays_away_does_not_hold_the_job_for_ever() -> None:
    story = Story(NO_RETRIES).trained()
    over, away = rayjob("Complete", "SUCCEEDED"), inspected("Storage", 74, "the bucket does not answer")
    story.step(rayjob=over, after=1000)
    last = rayjob("Failed", "FAILED", created=story.now)
    status = story.step(rayjob=over, inspection=last, report=away).status
    assert (status.phase, "the bucket does not answer" in (status.message or "")) == (Phase.FAILED, True)


def test_a_fence_that_took_long_leaves_time_for_the_inspection() -> None:
    story = Story(NO_RETRIES).trained()
    lost = rayjob("Failed", "RUNNING", reason="SubmissionFailed", message="submitter died")
    story.step(rayjob=lost)
    pod = PodFacts("triage-a1-head", running=False, terminating=True, node="n1")
    plan = story.step(rayjob=lost, pods=[pod], after=3600)
    assert not plan.actions
    assert "waits until pod triage-a1-head is gone" in (plan.status.message or "")
    plan = story.step(rayjob=lost)
    assert list(plan.actions) == [CreateRayJob("triage-i1", 1, inspect=True)]
    assert (plan.status.message or "").endswith("RayJob triage-i1 looks for a committed artifact")


def test_a_trainer_that_is_heard_in_the_end_says_how_it_ended_and_no_inspection_is_needed() -> None:
    story = Story().trained()
    lost = rayjob("Failed", "RUNNING", reason="SubmissionFailed", message="submitter died")
    story.step(rayjob=lost)
    status = story.step(rayjob=lost, report=result("NotFinite", 82, "loss is NaN", step=7)).status
    assert (status.phase, status.reason) == (Phase.FAILED, "NotFinite")
    assert (status.attempts[-1].exit_code, status.attempts[-1].message) == (82, "loss is NaN")


def test_that_we_stopped_it_ourselves_is_no_other_class() -> None:
    story = Story({"deadlines": {"totalSeconds": 300}}).trained()
    work = rayjob("Running", "RUNNING")
    story.step(rayjob=work, after=300)
    assert story.step(rayjob=work).status.attempts[-1].inspection, "it may have been about to end well"
    stopped = result("Preempted", 75, "stopped", step=7)
    status = story.step(report=stopped).status
    assert (status.phase, status.reason) == (Phase.FAILED, "DeadlineExceeded")


def test_a_process_that_ended_before_the_deadline_is_not_failed_by_it() -> None:
    """The operator was away when it ended, and came back when the deadline was over."""
    story = Story({"deadlines": {"totalSeconds": 60}}).trained()
    story.now += timedelta(hours=3)
    over = rayjob("Complete", "SUCCEEDED", ended=story.now - timedelta(hours=3) + timedelta(seconds=10))
    plan = story.step(rayjob=over)
    assert plan.status.reason == "Inspecting"
    assert plan.status.attempts[-1].end_time == over.ended, "and not when it was noticed"
    found = inspected("Succeeded", 0, "verified", artifact=ARTIFACT)
    assert story.step(rayjob=over, report=found).status.phase is Phase.SUCCEEDED


@pytest.mark.parametrize(
    "inspection", [None, rayjob("Running", "RUNNING", name="triage-i1", uid="inspection")]
)
def test_a_job_is_cancelled_while_an_inspection_looks(inspection: RayJobFacts | None) -> None:
    story = Story().trained()
    over = rayjob("Complete", "SUCCEEDED")
    story.step(rayjob=over)
    story.act("cancel")
    story.step(rayjob=over, inspection=inspection)
    plan = story.step(rayjob=over, inspection=inspection)
    if inspection is not None:
        assert list(plan.actions) == [DeleteRayJob("triage-i1", "inspection")]
        plan = story.step(rayjob=over)
    assert plan.status.phase is Phase.CANCELLED


@pytest.mark.parametrize("taken", [("Running", "RUNNING"), ("Complete", "SUCCEEDED"), ("Failed", "FAILED")])
@pytest.mark.parametrize("namesake", [True, False])
def test_a_rayjob_that_has_an_inspections_name_and_is_not_ours_is_neither_read_nor_deleted(
    taken: tuple[str, str], namesake: bool
) -> None:
    story = Story(NO_RETRIES).trained()
    story.step(rayjob=rayjob("Complete", "SUCCEEDED"), after=70)
    ended = "Job entrypoint command failed with exit code 1"
    theirs: dict[str, Any] = {"name": "triage-i1", "uid": "theirs", "ours": False, "of_a_namesake": namesake}
    other = rayjob(*taken, message=ended, created=START - timedelta(hours=1), **theirs)
    plan = story.step(rayjob=rayjob("Running", "RUNNING"), inspection=other)
    assert list(plan.actions) == [DeleteRayJob("triage-a1", "ray-uid")], "nothing of the attempt may be left"
    plan = story.step(inspection=other, after=899)
    assert (plan.status.phase, plan.status.reason, list(plan.actions)) == ("Evaluating", "NameTaken", [])
    whose = "an earlier job of this name" if namesake else "someone else"
    assert f"RayJob triage-i1 exists and belongs to {whose}, delete it" in (plan.status.message or "")
    again = Story(NO_RETRIES)
    again.job, again.now = story.job, story.now
    assert list(again.step().actions) == [CreateRayJob("triage-i1", 1, inspect=True)], "it is gone"
    plan = story.step(inspection=other)
    assert (plan.status.phase, list(plan.actions)) == (Phase.FAILED, []), "the job is not held for ever"
    assert f"RayJob triage-i1 exists and belongs to {whose}" in (plan.status.message or "")


@pytest.mark.parametrize("heard", [None, result("NotFinite", 82, "loss is NaN", step=7)])
def test_no_inspection_begins_while_the_job_is_suspended_and_that_time_does_not_count(
    heard: Report | None,
) -> None:
    story = Story({"deadlines": {"totalSeconds": 60}}).trained()
    over = rayjob("Complete", "SUCCEEDED")
    story.step(rayjob=over)
    story.change(suspend=True)
    for _ in range(2):
        plan = story.step(rayjob=over, report=heard, after=500)
        assert (plan.status.phase, list(plan.actions)) == (Phase.SUSPENDED, [])
        assert condition(story, "Suspended") == ("True", "Suspended")
    assert (plan.status.message or "").startswith("spec.suspend is true; set it to false to go on")
    story.change(suspend=False)
    plan = story.step(rayjob=over)
    assert (plan.status.phase, plan.status.reason) == (Phase.EVALUATING, "Inspecting")
    assert list(plan.actions) == [CreateRayJob("triage-i1", 1, inspect=True)]
    assert plan.status.suspended_seconds == 1000
    assert condition(story, "Suspended") == ("False", "Resumed")


def test_an_inspection_that_runs_may_end_before_the_job_is_suspended() -> None:
    story = Story().trained()
    over = rayjob("Complete", "SUCCEEDED")
    story.step(rayjob=over)
    story.step(rayjob=over)
    story.change(suspend=True)
    looks = rayjob("Running", "RUNNING", name="triage-i1", created=story.now)
    assert story.step(rayjob=over, inspection=looks).status.reason == "Inspecting"
    story.step(rayjob=over, inspection=looks, report=inspected("Internal", 1, "no manifest.json"))
    assert story.step(rayjob=over).status.phase is Phase.SUSPENDED
    assert story.attempt.number == 1

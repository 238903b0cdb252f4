"""What the operator decides for a job, told as stories."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from finetune_operator.api.finetunejob import Effective, ErrorClass, FineTuneJobStatus, Phase
from finetune_operator.core import attempts, jobs, refusals, statuses
from finetune_operator.core.attempts import Ending
from finetune_operator.core.facts import (
    CreateRayJob,
    Defaults,
    DeleteRayJob,
    Event,
    Observed,
    Plan,
    PodFacts,
    RayJobFacts,
)
from finetune_operator.core.reports import Report
from tests.unit.operator.stories import ARTIFACT, Story, condition, inspected, rayjob, result, training

NO_RETRIES = {"retry": {"maxInfraRetries": 0}}


def test_the_attempt_is_recorded_before_anything_is_created() -> None:
    story = Story()
    first = story.step()
    assert first.actions == ()
    assert first.requeue_after == 0
    assert [(a.number, a.ray_job, a.uid) for a in first.status.attempts] == [(1, "triage-a1", None)]
    assert first.status.effective is not None
    assert first.status.effective.output_uri == "file:///artifacts/team/triage-0123abcd"
    second = story.step()
    assert list(second.actions) == [CreateRayJob("triage-a1", 1)]
    assert second.status.phase is Phase.PROVISIONING


def test_creation_is_repeated_until_the_rayjob_is_seen() -> None:
    story = Story()
    story.step()
    assert story.step().actions == story.step().actions == [CreateRayJob("triage-a1", 1)]
    assert story.step(rayjob=rayjob("Initializing")).actions == ()
    assert story.job.status.attempts[-1].uid == "ray-uid"


def test_a_run_from_apply_to_artifact() -> None:
    story = Story()
    phases = [
        story.step().status.phase,
        story.step().status.phase,
        story.step(rayjob=rayjob("Initializing")).status.phase,
        story.step(rayjob=rayjob("Running", "RUNNING")).status.phase,
        story.step(rayjob=rayjob("Running", "RUNNING"), report=training(step=5)).status.phase,
        story.step(
            rayjob=rayjob("Running", "RUNNING"),
            report=result("Succeeded", 0, "done", step=10, artifact=ARTIFACT),
        ).status.phase,
    ]
    assert phases == ["Pending", "Provisioning", "Provisioning", "Validating", "Running", "Succeeded"]
    status = story.job.status
    assert status.artifact is not None
    assert status.artifact.digest == ARTIFACT["digest"]
    assert (condition(story, "Complete"), condition(story, "Failed")) == (("True", "ArtifactPublished"), None)
    assert condition(story, "Training") == ("False", "Finished")
    attempt = status.attempts[-1]
    assert (attempt.error_class, attempt.exit_code, attempt.last_step) == (ErrorClass.SUCCEEDED, 0, 10)
    assert status.completion_time == attempt.end_time
    assert status.completion_time is not None


def test_a_success_tells_all_of_the_artifacts_making() -> None:
    story = Story({"resources": {"gpusPerWorker": 1}}).started()
    story.step(rayjob=rayjob("Running", "RUNNING"), report=training(step=5, saved=5), after=100)
    assert condition(story, "CheckpointAvailable") == ("True", "CheckpointSaved")
    last = training(step=9, saved=5, loss="0.5")
    done = result("Succeeded", 0, step=10, artifact=ARTIFACT).finetune.result
    told = last.finetune.model_copy(update={"result": done, "effective": Effective(micro_batch_size=4)})
    report = last.model_copy(update={"finetune": told})
    status = story.step(rayjob=rayjob("Running", "RUNNING"), report=report).status
    progress, metrics, effective = status.progress, status.metrics, status.effective
    assert progress is not None
    assert metrics is not None
    assert effective is not None
    assert (progress.percent, progress.summary, progress.step) == (100, "100%", 9)
    assert (progress.estimated_remaining_seconds, progress.eta) == (0, "0s")
    assert (metrics.loss, effective.micro_batch_size, status.checkpoint) == (0.5, 4, None)
    assert effective.output_uri == "file:///artifacts/team/triage-0123abcd"
    attempt = status.attempts[-1]
    assert (attempt.last_step, attempt.gpu_seconds, attempt.message) == (10, 100, status.message)
    assert status.message == f"artifact sha256:{'a' * 12} is at {ARTIFACT['uri']}"
    assert {c.type: (c.status, c.reason) for c in status.conditions} == {
        "Accepted": ("True", "Accepted"),
        "ResourcesReady": ("False", "Released"),
        "Training": ("False", "Finished"),
        "CheckpointAvailable": ("False", "ArtifactPublished"),
        "ArtifactPublished": ("True", "ManifestCommitted"),
        "Complete": ("True", "ArtifactPublished"),
        "Reconciling": ("False", "ArtifactPublished"),
        "Stalled": ("False", "ArtifactPublished"),
    }


def test_progress_is_told_in_numbers_and_for_printing() -> None:
    story = Story().trained()
    progress, metrics = story.job.status.progress, story.job.status.metrics
    assert progress is not None
    assert (progress.percent, progress.summary, progress.step, progress.total_steps) == (50, "50%", 5, 10)
    assert (progress.eta, progress.tokens_per_second) == ("3m20s", 120.5)
    assert metrics is not None
    assert metrics.loss == 1.5


def test_a_metric_that_a_report_lacks_keeps_its_last_value() -> None:
    story = Story().started()
    story.step(rayjob=rayjob("Running", "RUNNING"), report=training(step=5, eval_loss="0.75"))
    story.step(rayjob=rayjob("Running", "RUNNING"), report=training(step=6, loss="1.25"))
    metrics = story.job.status.metrics
    assert metrics is not None
    assert (metrics.loss, metrics.eval_loss) == (1.25, 0.75)


def test_nothing_changes_when_nothing_happened() -> None:
    story = Story().trained()
    before, when = story.job.status, story.now - timedelta(seconds=1)
    same: dict[str, Any] = {
        "rayjob": rayjob("Running", "RUNNING"),
        "report": training(step=5),
        "reported_at": when,
    }
    assert story.step(**same).status == before


def test_the_phase_survives_a_restart_of_the_operator() -> None:
    story = Story().trained()
    plan = story.step(rayjob=rayjob("Running", "RUNNING"), report=None)
    assert plan.status.phase is Phase.RUNNING
    assert plan.status.progress is not None
    assert plan.events == []


@pytest.mark.parametrize(
    ("error_class", "exit_code", "advice"),
    [
        ("BadConfig", 64, "Correct the spec"),
        ("BadData", 65, "Correct the data"),
        ("ModelNotFound", 66, "spec.model.uri"),
        ("NotFinite", 82, "learningRate"),
        ("Internal", 1, "log"),
    ],
)
def test_a_reported_failure_ends_the_job_with_class_code_and_advice(
    error_class: str, exit_code: int, advice: str
) -> None:
    story = Story(NO_RETRIES).started()
    told = result(error_class, exit_code, "line 17", step=7)
    plan = story.step(rayjob=rayjob("Running", "RUNNING"), report=told)
    attempt = plan.status.attempts[-1]
    assert plan.status.phase is Phase.FAILED
    assert plan.status.reason == error_class
    assert (attempt.error_class, attempt.exit_code, attempt.last_step) == (error_class, exit_code, 7)
    assert "line 17" in (plan.status.message or "")
    assert advice in (plan.status.message or "")
    assert condition(story, "Failed") == ("True", error_class)
    assert [event.warning for event in plan.events] == [True]


@pytest.mark.parametrize(
    ("message", "error_class", "exit_code"),
    [
        ("Job entrypoint command failed with exit code 65, last available logs (truncated to 20,000 chars):\nbad row",
         ErrorClass.BAD_DATA, 65),
        ("Job entrypoint command failed with exit code 82, last available logs: x", ErrorClass.NOT_FINITE, 82),
        ("Job entrypoint command failed with exit code 1, last available logs: x", ErrorClass.INTERNAL, 1),
        ("Job entrypoint command failed with exit code 137, last available logs: x", ErrorClass.LOST, None),
        ("the log says: Job entrypoint command failed with exit code 65", ErrorClass.LOST, None),
    ],
)  # fmt: skip
def test_without_a_report_the_exit_code_in_kuberays_message_counts(
    message: str, error_class: ErrorClass, exit_code: int | None
) -> None:
    story = Story(NO_RETRIES).started()
    status = story.step(rayjob=rayjob("Failed", "FAILED", reason="AppFailed", message=message)).status
    assert status.attempts[-1].error_class is error_class
    assert status.phase is Phase.FAILED
    if exit_code is not None:
        assert status.attempts[-1].exit_code == exit_code


def test_a_stopped_ray_job_is_cancelled_and_not_failed_for_a_reason_of_its_own() -> None:
    status = Story().trained().step(rayjob=rayjob("Complete", "STOPPED")).status
    assert (status.phase, status.attempts[-1].error_class) == (Phase.CANCELLED, ErrorClass.CANCELLED)


def test_a_rayjob_that_kuberay_refuses_is_a_bad_config() -> None:
    story = Story({"retry": {"maxUserRetries": 3}}).started()
    refused = rayjob("ValidationFailed", message="name too long")
    story.step(rayjob=refused)
    assert list(story.step(rayjob=refused).actions) == [DeleteRayJob("triage-a1", "ray-uid")]
    status = story.step().status
    assert status.phase is Phase.FAILED
    assert (status.reason, "name too long" in (status.message or "")) == ("BadConfig", True)


@pytest.mark.parametrize(
    ("before", "job"),
    [
        ({"rayjob": rayjob("Initializing")}, "RUNNING"),
        ({"rayjob": rayjob("Running", "RUNNING")}, ""),
        ({"rayjob": rayjob("Initializing"), "report": training(step=5)}, ""),
    ],
)
def test_a_rayjob_that_is_invalid_after_it_ran_was_changed_by_somebody(
    before: dict[str, Any], job: str
) -> None:
    story = Story().started()
    story.step(**before)
    status = story.step(rayjob=rayjob("ValidationFailed", job, message="entrypoint is\nempty")).status
    assert (status.phase, status.attempts[-1].error_class) == (Phase.RETRYING, ErrorClass.LOST)
    assert status.attempts[-1].message == (
        "RayJob triage-a1 was changed while it ran, and KubeRay refuses it now: entrypoint is empty"
    )


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


def test_no_inspection_begins_while_the_job_is_suspended() -> None:
    story = Story().trained()
    over = rayjob("Complete", "SUCCEEDED")
    story.step(rayjob=over)
    story.change(suspend=True)
    plan = story.step(rayjob=over)
    assert not plan.actions
    assert (plan.status.message or "").endswith("looks for a committed artifact once spec.suspend is false")
    story.change(suspend=False)
    assert list(story.step(rayjob=over).actions) == [CreateRayJob("triage-i1", 1, inspect=True)]


def test_an_attempt_that_begins_anew_takes_an_unusable_checkpoint_out_of_the_status() -> None:
    story = Story().started()
    work = rayjob("Running", "RUNNING")
    story.step(rayjob=work, report=training(step=8, saved=5))
    lost = rayjob(
        "Failed", "FAILED", message="Job entrypoint command failed with exit code 83, last available logs: x"
    )
    story.step(rayjob=lost, after=600)
    story.step(rayjob=lost)
    assert len(story.job.status.attempts) == 2
    story.step()
    story.step(rayjob=work, report=training(step=3, resumed=0))
    status = story.job.status
    assert status.checkpoint is None
    assert next(c.status for c in status.conditions if c.type == "CheckpointAvailable") == "False"
    status = story.step(rayjob=lost).status
    assert status.attempts[-1].lost_steps == 3


def test_a_sidecar_that_ended_well_before_the_cluster_was_ready_is_looked_into() -> None:
    story = Story().started()
    pod = PodFacts("triage-a1-head", running=True, submitter_exit_code=0)
    status = story.step(rayjob=rayjob("Initializing"), pods=[pod]).status
    assert (status.reason, status.attempts[-1].inspection) == ("Inspecting", "triage-i1")


def test_a_sidecar_that_ended_with_1_may_never_have_got_its_job_taken() -> None:
    """Ray starts slowly, and answers the submitter with 500: the trainer is not even there."""
    story = Story().started()
    pod = PodFacts("triage-a1-head", running=True, submitter_exit_code=1)
    story.step(rayjob=rayjob("Initializing"), pods=[pod])
    told = "Ray did not take the job, or the trainer ended with exit code 1 before the cluster was ready"
    assert told in (story.attempt.message or "")


def test_a_deleted_rayjob_is_lost_and_never_created_again_once_the_job_has_failed() -> None:
    story = Story(NO_RETRIES).started()
    story.step(rayjob=rayjob("Running", "RUNNING"))
    plan = story.step(rayjob=None)
    assert (plan.status.phase, plan.status.reason) == (Phase.FAILED, "Lost")
    assert plan.actions == ()
    assert story.step(rayjob=None).actions == ()


def test_a_rayjob_of_somebody_else_is_left_alone() -> None:
    story = Story({"retry": {"maxUserRetries": 3}})
    story.step()
    plan = story.step(rayjob=rayjob("Running", "RUNNING", ours=False))
    assert plan.actions == ()
    assert (plan.status.reason, plan.status.attempts[-1].uid) == ("BadConfig", None)
    assert (plan.status.message or "").startswith("RayJob triage-a1 exists and belongs to someone else")


def test_a_finished_job_is_never_touched_again() -> None:
    story = Story().started()
    story.step(rayjob=rayjob(), report=result("Succeeded", 0, artifact=ARTIFACT))
    before = story.job.status
    for seen in ({}, {"rayjob": rayjob("Failed", "FAILED")}, {"report": result("Internal", 1)}):
        plan = story.step(**seen)
        assert (plan.status, plan.actions, plan.requeue_after) == (before, (), None)


@pytest.mark.parametrize("phase", [Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED])
def test_a_final_phase_that_was_written_by_hand_ends_nothing(phase: Phase) -> None:
    """`kubectl edit --subresource=status`: there is no artifact, and what depends on it would wait for ever."""
    story = Story().trained()
    story.job = replace(story.job, status=story.job.status.model_copy(update={"phase": phase}))
    plan = story.step(rayjob=rayjob("Running", "RUNNING"), report=training(step=6))
    assert plan.status.phase is Phase.RUNNING
    assert not plan.actions


def test_without_kuberay_the_job_waits_and_starts_when_it_appears() -> None:
    story = Story()
    plan = story.step(kuberay_installed=False)
    assert (plan.status.phase, plan.status.reason) == (Phase.PENDING, "KubeRayUnavailable")
    assert plan.requeue_after == jobs.WAITING_SECONDS
    assert condition(story, "Accepted") == ("False", "KubeRayUnavailable")
    assert story.step(kuberay_installed=False).events == []
    story.step()
    assert condition(story, "Accepted") == ("True", "Accepted")


def test_without_any_output_folder_the_job_waits_for_the_user() -> None:
    story = Story(defaults=Defaults(output_uri=None, image="trainer:1"))
    plan = story.step()
    assert (plan.status.reason, plan.requeue_after) == ("OutputRequired", None)
    assert "spec.output.uri" in (plan.status.message or "")


def test_the_reason_why_a_pod_waits_is_in_the_status() -> None:
    story = Story().started()
    pod = PodFacts("triage-a1-head", False, "Unschedulable", "0/1 nodes: Insufficient cpu")
    plan = story.step(rayjob=rayjob("Initializing"), pods=[pod])
    assert condition(story, "ResourcesReady") == ("False", "Unschedulable")
    assert "Insufficient cpu" in (plan.status.message or "")
    assert plan.requeue_after is not None
    assert plan.requeue_after <= 15


def test_one_event_per_transition() -> None:
    story = Story()
    names = [event.reason for _ in range(3) for event in story.step().events]
    running: dict[str, Any] = {"rayjob": rayjob("Running", "RUNNING")}
    names += [
        e.reason for step in (1, 2, 3) for e in story.step(**running, report=training(step=step)).events
    ]
    assert names == ["Provisioning", "Training"]


@pytest.mark.parametrize(
    ("phase", "reason", "warning"),
    [
        (Phase.PENDING, "Accepted", None),
        (Phase.PROVISIONING, "Submitting", None),
        (Phase.PENDING, None, None),
        (Phase.PENDING, "KubeRayUnavailable", True),
        (Phase.PROVISIONING, "ImagePullBackOff", True),
        (Phase.QUEUED, "Inadmissible", True),
        (Phase.PENDING, "WaitingForModel", False),
        (Phase.PROVISIONING, "Provisioning", False),
        (Phase.QUEUED, "Queued", False),
        (Phase.RUNNING, "Training", False),
        (Phase.RETRYING, "Storage", True),
        (Phase.RETRYING, "Preempted", False),
        (Phase.RETRYING, "Suspended", False),
        (Phase.RETRYING, "Starting", False),
        (Phase.FAILED, "BadData", True),
        (Phase.CANCELLED, "Cancelled", False),
        (Phase.SUCCEEDED, "ArtifactPublished", False),
    ],
)
def test_what_a_user_must_look_at_is_a_warning(
    phase: Phase, reason: str | None, warning: bool | None
) -> None:
    new = FineTuneJobStatus(phase=phase, reason=reason, message="told")
    events = [] if warning is None or reason is None else [Event(warning, reason, "told")]
    assert statuses.events(FineTuneJobStatus(), new) == events
    assert statuses.events(new, new.model_copy(update={"message": "other words"})) == []


def test_a_transition_time_moves_only_with_the_status_of_its_condition() -> None:
    story = Story().trained()
    before = {c.type: c.last_transition_time for c in story.job.status.conditions}
    story.step(rayjob=rayjob("Running", "RUNNING"), report=training(step=6))
    assert {c.type: c.last_transition_time for c in story.job.status.conditions} == before
    story.step(rayjob=rayjob("Complete", "STOPPED"))
    after = {c.type: c.last_transition_time for c in story.job.status.conditions}
    assert after["Training"] > before["Training"]
    assert after["Accepted"] == before["Accepted"]


def test_a_quota_in_the_way_is_told_and_retried() -> None:
    story = Story().started()
    told, create = "rayjobs is forbidden: exceeded quota: small", CreateRayJob("triage-a1", 1)
    plan = refusals.forbidden(jobs_observed(story), Plan(story.job.status), create, told, now=story.now)
    assert (plan.status.reason, plan.requeue_after) == ("QuotaExceeded", jobs.WAITING_SECONDS)
    assert not jobs.is_finished(plan.status)


def jobs_observed(story: Story) -> Observed:
    return Observed(job=story.job)

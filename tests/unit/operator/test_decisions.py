"""What the operator decides for a job, told as stories."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from finetune_operator.api.finetunejob import Effective, ErrorClass, FineTuneJobStatus, Phase
from finetune_operator.core import jobs, refusals, statuses
from finetune_operator.core.facts import (
    CreateRayJob,
    Defaults,
    DeleteRayJob,
    Event,
    Observed,
    Plan,
    PodFacts,
)
from tests.unit.operator.stories import ARTIFACT, Story, condition, rayjob, result, training

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

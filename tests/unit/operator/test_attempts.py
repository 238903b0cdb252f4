"""From one attempt to the next, told as stories."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_operator.api.finetunejob import BackoffSpec, ErrorClass, Phase, Retries
from finetune_operator.core import policies
from finetune_operator.core.facts import (
    CreateRayJob,
    DeleteJob,
    DeleteRayJob,
    PodFacts,
    RayJobFacts,
    WriteRunFile,
)
from finetune_operator.core.reports import Report
from tests.unit.operator.stories import (
    ARTIFACT,
    OLD_POD,
    QUICK,
    RUNNING,
    Story,
    condition,
    current,
    fail,
    rayjob,
    result,
    second,
    training,
)

GPU: dict[str, Any] = {"resources": {"gpusPerWorker": 1}}


# ---------------------------------------------------------------- while the CRDs are newer than the operator


@pytest.mark.parametrize("readable", [True, False])
def test_an_attempt_that_is_due_waits_for_an_operator_that_can_read_the_spec(readable: bool) -> None:
    """An upgrade brings the CRDs first, and with them defaults that the operator of before does not know."""
    story = Story(QUICK).trained()
    story.step(rayjob=RUNNING, report=result("Storage", 74, "broken"))
    known, due = story.job, story.job.status.next_attempt_time
    assert due is not None
    spec = known.spec if readable else None
    story.job = replace(known, spec=spec, problem="spec.novelty: this field is of a newer CRD")
    for _ in range(3):
        status = story.step(after=60).status
        assert (status.phase, status.reason, status.next_attempt_time) == (Phase.PENDING, "InvalidSpec", due)
        assert condition(story, "Accepted") == ("False", "InvalidSpec")
    assert "spec.novelty" in (status.message or "")
    story.job = replace(story.job, spec=known.spec, problem=None)
    story.step()
    assert story.attempt.number == 2
    assert condition(story, "Accepted") == ("True", "Accepted")


def test_a_recorded_attempt_is_not_created_from_half_a_spec() -> None:
    story = Story().started()
    story.job = replace(story.job, problem="spec.novelty: this field is of a newer CRD")
    assert list(story.step().actions) == []
    assert story.job.status.reason == "InvalidSpec"
    story.job = replace(story.job, problem=None)
    assert list(story.step().actions) == [CreateRayJob("triage-a1", 1)]


def test_an_attempt_that_fails_under_newer_crds_is_judged_by_the_budgets_that_are_known() -> None:
    story = Story(QUICK).trained()
    story.job = replace(story.job, problem="spec.novelty: this field is of a newer CRD")
    fail(story, "Storage", 74)
    assert story.job.status.next_attempt_time is not None
    assert story.job.status.retries == Retries(infrastructure=1)


# ---------------------------------------------------------------- classes and budgets


@pytest.mark.parametrize(
    ("error_class", "code", "budget"),
    [
        ("Storage", 74, "infrastructure"),
        ("Collective", 83, "infrastructure"),
        ("CheckpointCorrupt", 84, "infrastructure"),
        ("Internal", 1, "infrastructure"),
        ("Preempted", 75, "preemption"),
    ],
)
def test_each_kind_of_failure_is_charged_to_its_own_budget(error_class: str, code: int, budget: str) -> None:
    story = Story(QUICK).trained()
    plan = fail(story, error_class, code)
    assert (plan.status.phase, plan.status.reason) == (Phase.RETRYING, error_class)
    assert plan.status.retries is not None
    counts = plan.status.retries.model_dump()
    assert counts == {"user": 0, "infrastructure": 0, "preemption": 0} | {budget: 1}
    assert [(a.number, a.ray_job) for a in story.job.status.attempts] == [(1, "triage-a1"), (2, "triage-a2")]


@pytest.mark.parametrize(
    ("error_class", "code"), [("BadConfig", 64), ("BadData", 65), ("ModelNotFound", 66), ("NotFinite", 82)]
)
def test_a_users_mistake_is_not_retried_unless_the_spec_says_so(error_class: str, code: int) -> None:
    assert fail(Story().trained(), error_class, code).status.phase is Phase.FAILED
    story = Story({"retry": {"maxUserRetries": 1, **QUICK["retry"]}}).trained()
    assert fail(story, error_class, code).status.phase is Phase.RETRYING


def test_a_budget_that_is_used_ends_the_job_and_says_so() -> None:
    story = Story({"retry": {"maxInfraRetries": 1, **QUICK["retry"]}}).trained()
    fail(story, "Storage", 74)
    story.step()
    plan = story.step(rayjob=second(), report=result("Collective", 83, "lost rank 3"))
    assert (plan.status.phase, plan.status.reason) == (Phase.FAILED, "Collective")
    assert "lost rank 3; all retries are used (spec.retry.maxInfraRetries is 1)" in (
        plan.status.message or ""
    )


def test_preemptions_are_unlimited_unless_a_number_says_otherwise() -> None:
    story = Story({"retry": {"preemptions": 0}}).trained()
    plan = fail(story, "Preempted", 75)
    assert plan.status.phase is Phase.FAILED
    assert "spec.retry.preemptions" in (plan.status.message or "")
    story = Story(QUICK).trained()
    for number in range(1, 7):
        plan = story.step(rayjob=current(story), report=result("Preempted", 75, "taken away"))
        assert f"(preemption retry {number})" in (plan.status.message or "")
        story.step()


def test_every_class_has_a_policy() -> None:
    assert set(policies.BUDGETS) == set(ErrorClass)


# ---------------------------------------------------------------- backoff


@given(st.integers(0, 100), st.integers(0, 600), st.integers(1, 60), st.text(min_size=1), st.integers(1, 99))
def test_the_wait_is_within_its_bounds_and_the_same_each_time_one_asks(
    low: int, more: int, retry: int, uid: str, attempt: int
) -> None:
    spec = BackoffSpec(min=low, max=low + more)
    wait = policies.backoff(spec, retry=retry, uid=uid, attempt=attempt)
    assert low / 2 <= wait <= spec.max
    assert wait == policies.backoff(spec, retry=retry, uid=uid, attempt=attempt)


def test_jobs_that_failed_together_do_not_come_back_together() -> None:
    waits = {policies.backoff(BackoffSpec(), retry=3, uid=f"job-{n}", attempt=3) for n in range(50)}
    assert len(waits) == 50
    assert all(20 <= wait <= 40 for wait in waits)


def test_the_time_of_the_next_attempt_is_stored_and_does_not_move() -> None:
    story = Story().trained()
    plan = story.step(rayjob=RUNNING, report=result("Storage", 74, "away"))
    when = plan.status.next_attempt_time
    assert when is not None
    wait = policies.backoff(BackoffSpec(), retry=1, uid=story.job.uid, attempt=1)
    assert 0 <= (when - story.now).total_seconds() + 1 - wait < 1
    assert when.microsecond == 0, "as times are stored"
    over = rayjob("Failed", "FAILED")
    for _ in range(3):
        waiting = story.step(rayjob=over)
        assert waiting.status.next_attempt_time == when
        assert waiting.requeue_after is not None
        assert timedelta(seconds=waiting.requeue_after) <= when - story.now + timedelta(seconds=1)
    story.now = when
    story.step(rayjob=over)
    assert story.attempt.number == 2
    assert story.job.status.next_attempt_time is None


def test_when_the_next_attempt_starts_is_told_once_nothing_is_waited_for() -> None:
    story = Story().trained()
    story.step(rayjob=RUNNING, report=result("Storage", 74, "away."))
    over = rayjob("Failed", "FAILED")
    assert "waits until" in (story.step(rayjob=over, pods=[OLD_POD]).status.message or "")
    told = story.step(rayjob=over).status
    at = f"{told.next_attempt_time:%H:%M:%S}"
    assert (told.phase, told.reason) == (Phase.RETRYING, "Storage")
    assert told.message == f"attempt 1 ended: away. Attempt 2 starts at {at} UTC"
    assert story.step(rayjob=over).status == told


def test_a_job_that_had_to_be_stopped_still_tells_that_its_retries_are_used() -> None:
    story = Story({"retry": {"maxInfraRetries": 1, **QUICK["retry"]}}).trained()
    fail(story, "Storage", 74)
    story.step()
    going = second("Initializing", "")
    plan = story.step(rayjob=going, report=result("Storage", 74, "away"))
    assert (plan.status.phase, plan.status.reason) == (Phase.PROVISIONING, "Stopping")
    assert list(story.step(rayjob=going).actions) == [DeleteRayJob("triage-a2", "ray-uid-2")]
    status = story.step().status
    assert status.phase is Phase.FAILED
    assert "away; all retries are used (spec.retry.maxInfraRetries is 1)" in (status.message or "")


# ---------------------------------------------------------------- the fence


def test_no_attempt_starts_while_a_pod_of_the_last_one_is_left() -> None:
    story = Story(QUICK).trained()
    story.step(rayjob=RUNNING, report=result("Storage", 74, "away"))
    over = rayjob("Failed", "FAILED")
    for _ in range(5):
        plan = story.step(rayjob=over, pods=[OLD_POD])
        assert story.attempt.number == 1
        assert "waits until pod triage-a1-head is gone" in (plan.status.message or "")
    story.step(rayjob=over, clusters=["triage-a1-x7k2p"])
    assert story.attempt.number == 1
    story.step(rayjob=over, pods=[PodFacts("triage-a1-head", False, gone=True)])
    assert story.attempt.number == 2
    assert list(story.step().actions) == [CreateRayJob("triage-a2", 2)]


def test_a_cluster_that_kuberay_leaves_behind_is_deleted_with_its_rayjob() -> None:
    story = Story(QUICK).trained()
    story.step(rayjob=RUNNING, report=result("Storage", 74, "away"))
    over = rayjob("Failed", "FAILED")
    assert story.step(rayjob=over, clusters=["x"], after=60).actions == []
    assert list(story.step(rayjob=over, clusters=["x"]).actions) == [DeleteRayJob("triage-a1", "ray-uid")]


def test_a_pod_on_a_node_that_is_gone_is_named_with_what_to_do() -> None:
    story = Story(QUICK).trained()
    story.step(rayjob=RUNNING, report=result("Storage", 74, "away"), after=200)
    pod = PodFacts("triage-a1-head", True, terminating=True, node="node-7")
    plan = story.step(rayjob=None, pods=[pod])
    assert "if node node-7 is gone for good, delete its pods with --force" in (plan.status.message or "")


def test_a_success_that_is_told_late_counts_while_the_next_attempt_is_due() -> None:
    story = Story(GPU).trained()
    story.step(rayjob=rayjob("Failed", "RUNNING", reason="SubmissionFailed"), report=training(step=6))
    assert story.job.status.phase is Phase.RETRYING
    lost = story.attempt
    assert (lost.lost_steps, lost.gpu_seconds) == (6, 1)
    plan = story.step(rayjob=None, pods=[OLD_POD], report=result("Succeeded", 0, "done", artifact=ARTIFACT))
    attempt = plan.status.attempts[-1]
    assert (plan.status.phase, attempt.error_class) == (Phase.SUCCEEDED, ErrorClass.SUCCEEDED)
    assert (attempt.end_time, attempt.lost_steps, attempt.gpu_seconds) == (lost.end_time, None, 1)
    assert plan.status.next_attempt_time is None
    assert plan.actions == ()


# ---------------------------------------------------------------- checkpoints and what was lost


def test_what_was_saved_what_was_lost_and_where_it_went_on() -> None:
    story = Story(QUICK).started()
    story.step(rayjob=RUNNING, report=training(step=10, total=100, saved=10))
    assert condition(story, "CheckpointAvailable") == ("True", "CheckpointSaved")
    story.step(rayjob=RUNNING, report=training(step=17, total=100, saved=10))
    story.step(
        rayjob=rayjob("Failed", "RUNNING", reason="SubmissionFailed"),
        report=training(step=17, total=100, saved=10),
    )
    assert (story.attempt.last_step, story.attempt.lost_steps) == (17, 7)
    assert "from the checkpoint of step 10" in (story.job.status.message or "")
    story.step(rayjob=rayjob("Failed"))
    story.step(rayjob=second(), report=training(step=9, total=100, saved=8, resumed=8))
    first, now = story.job.status.attempts
    assert (first.lost_steps, now.resumed_from_step) == (9, 8), "the newest checkpoint was broken"


def test_a_restart_within_an_attempt_is_counted() -> None:
    story = Story().started()
    story.step(rayjob=RUNNING, report=training(step=40, total=100, saved=30))
    story.step(rayjob=RUNNING, report=training(step=31, total=100, saved=30, resumed=30))
    story.step(rayjob=RUNNING, report=training(step=33, total=100, saved=30, resumed=30))
    assert (story.attempt.number, story.attempt.lost_steps, story.attempt.resumed_from_step) == (1, 10, 30)


def test_gpu_seconds_are_those_in_which_the_pod_ran() -> None:
    story = Story(QUICK | GPU).started()
    story.step(rayjob=rayjob("Initializing"), after=600)
    story.step(rayjob=RUNNING, after=100)
    story.step(rayjob=RUNNING, report=result("Storage", 74, "away"))
    assert story.job.status.attempts[0].gpu_seconds == 100


# ---------------------------------------------------------------- the end


def test_a_trainer_that_hangs_after_its_success_is_taken_down() -> None:
    story = Story().trained()
    plan = story.step(rayjob=RUNNING, report=result("Succeeded", 0, "done", artifact=ARTIFACT))
    assert plan.requeue_after == 60
    assert story.step(rayjob=RUNNING, after=60).actions == ()
    assert list(story.step(rayjob=RUNNING).actions) == [DeleteRayJob("triage-a1", "ray-uid")]


def test_time_to_live() -> None:
    story = Story({"ttlSecondsAfterFinished": 100}).trained()
    plan = story.step(rayjob=rayjob("Complete"), report=result("Succeeded", 0, "done", artifact=ARTIFACT))
    assert plan.requeue_after == 100
    assert story.step(after=99).actions == ()
    assert list(story.step().actions) == [DeleteJob()]


def test_a_namesakes_rayjob_is_waited_for_and_a_strangers_is_not() -> None:
    story = Story().started()
    former = RayJobFacts("triage-a1", "old", ours=False, of_a_namesake=True)
    plan = story.step(rayjob=former)
    assert (plan.status.reason, plan.actions, plan.requeue_after) == ("NameTaken", (), 2)
    assert condition(story, "ResourcesReady") == ("False", "NameTaken")
    assert plan.status.message == "waits until RayJob triage-a1 of an earlier job of this name is gone"
    plan = story.step(pods=[PodFacts("triage-a1-a", True, gone=True), PodFacts("triage-a1-b", True)])
    assert plan.status.message == "waits until pod triage-a1-b of an earlier job of this name is gone"
    assert list(story.step(rayjob=None).actions) == [CreateRayJob("triage-a1", 1)]


def test_the_status_keeps_the_last_ten_attempts() -> None:
    story = Story({"retry": {"backoffSeconds": {"min": 0, "max": 0}, "maxInfraRetries": 1000}}).started()
    for number in range(1, 15):
        current = RayJobFacts(f"triage-a{number}", f"u{number}", True, "Running", "RUNNING")
        story.step(rayjob=current, report=result("Storage", 74, "away"))
        story.step()
        story.step()
    assert [a.number for a in story.job.status.attempts] == list(range(6, 16))


def test_a_report_without_progress_of_ours_is_a_sign_of_life() -> None:
    story = Story().started()
    plain = Report.model_validate({"trainerStatus": {"progressPercentage": 10}})
    story.step(rayjob=RUNNING, report=plain, after=1700)
    assert (
        story.step(rayjob=RUNNING, report=plain, reported_at=story.now, after=1700).status.phase
        is Phase.RUNNING
    )
    assert story.step(rayjob=RUNNING).status.phase is Phase.RUNNING


def test_a_silent_trainer_is_given_the_authority_again_which_may_be_another_one_now() -> None:
    story = Story(QUICK).trained()
    heard, runs = story.now, rayjob("Running", "RUNNING")
    plan = story.step(rayjob=runs, report=training(step=6), reported_at=heard, after=60)
    assert plan.actions == ()
    plan = story.step(rayjob=runs, report=training(step=6), reported_at=heard)
    assert plan.actions == (WriteRunFile("triage-a1", 1),)


def test_a_trainer_that_is_not_heard_of_is_told_before_it_is_given_up() -> None:
    """It may train all the same: a NetworkPolicy forbids its reports."""
    story = Story().started()
    runs = rayjob("Running", "RUNNING")
    story.step(rayjob=runs, after=179)
    assert story.step(rayjob=runs).status.reason == "Validating"
    plan = story.step(rayjob=runs)
    assert plan.status.phase is Phase.VALIDATING
    assert plan.status.reason == "TrainerSilent"
    assert "no report since 12:00:02 UTC" in (plan.status.message or "")
    assert "kubectl logs job/triage-a1); at 12:30:02 UTC" in (plan.status.message or "")
    assert [(event.warning, event.reason) for event in plan.events] == [(True, "TrainerSilent")]
    assert condition(story, "Training") == ("False", "Validating")
    assert story.step(rayjob=runs, report=training(step=1)).status.reason == "Training"
    story.now += timedelta(seconds=180)
    heard = story.now - timedelta(seconds=180)
    assert (
        story.step(rayjob=runs, report=training(step=1), reported_at=heard).status.reason == "TrainerSilent"
    )
    plan = story.step(rayjob=runs, report=training(step=1), reported_at=heard, listening_since=story.now)
    assert plan.status.reason == "Training", "an operator that has just started could not hear it"


def test_a_trainer_whose_steps_take_minutes_is_not_silent_between_two() -> None:
    """By its own estimate the last of ten steps takes 200 s."""
    story, runs = Story().started(), rayjob("Running", "RUNNING")
    heard, report = story.now, training(step=9)
    story.step(rayjob=runs, report=report, after=399)
    assert story.step(rayjob=runs, report=report, reported_at=heard).status.reason == "Training"
    assert story.step(rayjob=runs, report=report, reported_at=heard).status.reason == "TrainerSilent"

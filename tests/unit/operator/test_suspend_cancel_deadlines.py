"""A job that somebody suspends or cancels, or whose time is over."""

from __future__ import annotations

from datetime import timedelta

from finetune_operator.api.finetunejob import ErrorClass, Phase, Retries
from finetune_operator.core.facts import (
    DeleteRayJob,
)
from tests.unit.operator.stories import (
    OLD_POD,
    QUICK,
    RUNNING,
    Story,
    condition,
    fail,
    inspected,
    rayjob,
    second,
    training,
)


def test_suspend_stops_and_resume_goes_on_without_a_retry() -> None:
    story = Story().started()
    story.step(rayjob=RUNNING, report=training(step=10, saved=10))
    story.change(suspend=True)
    stopping = story.step(rayjob=RUNNING, report=training(step=10, saved=10))
    assert stopping.status.attempts[-1].error_class is ErrorClass.SUSPENDED
    assert list(story.step(rayjob=RUNNING, pods=[OLD_POD]).actions) == [DeleteRayJob("triage-a1", "ray-uid")]
    assert story.step(pods=[OLD_POD]).status.phase is not Phase.SUSPENDED
    assert story.step().status.phase is Phase.SUSPENDED
    assert condition(story, "Suspended") == ("True", "Suspended")
    assert story.step(after=100).requeue_after is None
    story.change(suspend=False)
    status = story.step().status
    assert (story.attempt.number, status.retries) in ((2, None), (2, Retries()))
    assert "from the checkpoint of step 10" in (status.message or "")
    assert condition(story, "Suspended") == ("False", "Resumed")
    assert status.suspended_seconds == 101


def test_a_job_that_is_resumed_while_something_is_left_says_what_it_waits_for() -> None:
    story = Story(QUICK).trained()
    story.change(suspend=True)
    story.step(rayjob=RUNNING)
    story.step()
    assert story.job.status.phase is Phase.SUSPENDED
    story.change(suspend=False)
    status = story.step(pods=[OLD_POD]).status
    assert (status.phase, story.attempt.number) == (Phase.RETRYING, 1)
    assert "waits until pod triage-a1-head" in (status.message or "")
    assert condition(story, "Suspended") == ("False", "Resumed")


def test_a_job_that_is_created_suspended_starts_nothing() -> None:
    story = Story({"suspend": True})
    assert story.step().status.phase is Phase.SUSPENDED
    assert story.job.status.attempts == []
    story.change(suspend=False)
    story.step()
    assert [a.number for a in story.job.status.attempts] == [1]


def test_cancel_ends_a_job_in_every_phase() -> None:
    fresh = Story()
    fresh.act("cancel")
    assert fresh.step().status.phase is Phase.CANCELLED
    running = Story().trained()
    running.act("cancel/1")
    running.step(rayjob=RUNNING)
    assert list(running.step(rayjob=RUNNING).actions) == [DeleteRayJob("triage-a1", "ray-uid")]
    assert running.step(pods=[OLD_POD]).status.phase is not Phase.CANCELLED
    assert running.step().status.phase is Phase.CANCELLED
    assert running.job.status.last_action is not None
    assert (running.job.status.last_action.refused, running.job.status.last_action.message) == (
        False,
        "cancelled",
    )
    due = Story().trained()
    fail(due, "Storage", 74)
    due.act("cancel")
    due.step(rayjob=None)
    assert due.step(rayjob=None).status.phase is Phase.CANCELLED
    assert due.step(rayjob=None, after=9999).actions == ()


def test_an_action_that_there_is_not_is_refused_once() -> None:
    story = Story().started()
    story.act("explode")
    told = [event.reason for _ in range(3) for event in story.step(rayjob=RUNNING).events]
    assert told.count("ActionRefused") == 1
    assert story.job.status.last_action is not None
    assert "there is cancel" in story.job.status.last_action.message


def test_the_total_deadline_counts_over_attempts_and_not_while_suspended() -> None:
    story = Story({**QUICK, "deadlines": {"totalSeconds": 100}}).started()
    fail(story, "Storage", 74)
    story.change(suspend=True)
    story.step()
    story.step(after=1000)
    story.change(suspend=False)
    story.step()
    assert story.attempt.number in (2, 3), story.job.status.message
    story.step(rayjob=second(name=story.attempt.ray_job), after=100)
    plan = story.step(rayjob=second(name=story.attempt.ray_job))
    assert plan.status.attempts[-1].error_class is ErrorClass.DEADLINE_EXCEEDED
    story.step(rayjob=second(name=story.attempt.ray_job))
    status = story.step().status
    assert (status.phase, status.reason) == (Phase.FAILED, "DeadlineExceeded")
    assert "totalSeconds (100)" in (status.message or "")


def test_time_that_runs_out_while_something_is_left_is_told_and_ends_the_job_once_that_is_gone() -> None:
    story = Story({"deadlines": {"totalSeconds": 600}}).trained()
    fail(story, "Storage", 74)
    waits = story.step(pods=[OLD_POD], after=600)
    assert "totalSeconds" not in (waits.status.message or "")
    plan = story.step(pods=[OLD_POD])
    over = (
        "attempt 1 ended: broken; spec.deadlines.totalSeconds (600) are over; waits until pod triage-a1-head"
    )
    assert (plan.status.message or "").startswith(over)
    assert (plan.status.phase, story.attempt.number) == (Phase.RETRYING, 1), "two would write at once"
    story.change(suspend=True)
    assert "totalSeconds" not in (story.step(pods=[OLD_POD]).status.message or ""), (
        "its clock will stand still"
    )
    story.change(suspend=False)
    story.step(pods=[OLD_POD])
    assert (story.step().status.phase, story.job.status.reason) == (Phase.FAILED, "DeadlineExceeded")


def test_time_that_runs_out_while_an_inspection_looks_is_told_and_no_attempt_is_announced() -> None:
    story = Story({"deadlines": {"totalSeconds": 600}}).trained()
    story.step(rayjob=rayjob("Complete", "SUCCEEDED"))
    looks = rayjob("Running", "RUNNING", name="triage-i1", created=story.now)
    before = story.step(inspection=looks, after=600)
    assert "totalSeconds" not in (before.status.message or "")
    plan = story.step(inspection=looks)
    assert plan.status.phase is Phase.EVALUATING
    assert "; spec.deadlines.totalSeconds (600) are over; RayJob triage-i1" in (plan.status.message or "")
    plan = story.step(inspection=looks, report=inspected("Internal", 1, "no manifest.json"))
    assert [event.message.rpartition(". ")[2] for event in plan.events] == [
        "No other attempt follows: spec.deadlines.totalSeconds (600) are over"
    ]
    assert (story.step().status.phase, story.job.status.reason) == (Phase.FAILED, "DeadlineExceeded")


def test_the_start_deadline_is_over_when_nothing_was_reported_in_time() -> None:
    story = Story({"deadlines": {"startSeconds": 60}}).started()
    waits = story.step(rayjob=rayjob("Initializing"), after=60)
    assert waits.requeue_after is not None
    story.step(rayjob=rayjob("Initializing"))
    assert story.attempt.error_class is ErrorClass.DEADLINE_EXCEEDED
    heard = Story({"deadlines": {"startSeconds": 60}}).started()
    heard.step(rayjob=RUNNING, report=training(step=1), after=100)
    assert heard.step(rayjob=RUNNING).status.phase is Phase.RUNNING


def test_an_operator_that_has_just_started_gives_trainers_time_to_be_heard() -> None:
    story = Story().trained()
    story.now += timedelta(hours=5)
    assert story.step(rayjob=RUNNING, listening_since=story.now).status.phase is Phase.RUNNING
    assert story.step(rayjob=RUNNING).status.attempts[-1].error_class is ErrorClass.STALLED

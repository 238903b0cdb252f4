"""What a trainer says on its way out, and what is made of it: it hears one signal, whoever sent it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from finetune_operator.api.finetunejob import ErrorClass, Phase
from finetune_operator.core.facts import DeleteRayJob, PodFacts, RayJobFacts
from finetune_operator.core.reports import Report
from tests.unit.operator.stories import QUICK, RUNNING, START, Story, rayjob, result, training

POD = PodFacts("triage-a1-head", True, terminating=True)


def goodbye(*, step: int, saved: int | None) -> Report:
    """SIGTERM was heard; `saved` is the checkpoint that was made just in time."""
    body = result("Preempted", 75, "stopped by SIGTERM", step=step).model_dump(by_alias=True)
    body["finetune"] |= {"step": step}
    if saved is not None:
        body["finetune"]["checkpoint"] = {"step": saved, "uri": f"file:///c/checkpoint-{saved}"}
    return Report.model_validate(body)


def condition(story: Story, kind: str) -> str:
    return next(c.message for c in story.job.status.conditions if c.type == kind and c.status == "False")


def test_what_a_suspended_trainer_saves_on_its_way_out_is_not_lost() -> None:
    story = Story(QUICK).started()
    story.step(rayjob=RUNNING, report=training(step=17, total=100, saved=10))
    story.change(suspend=True)
    story.step(rayjob=RUNNING)
    assert (story.attempt.last_step, story.attempt.lost_steps) == (17, 7)
    gone = rayjob("Running", "RUNNING", deleting_since=story.now)
    for _ in range(2):
        story.step(rayjob=gone, pods=[POD], report=goodbye(step=19, saved=19))
        assert (story.attempt.last_step, story.attempt.lost_steps) == (19, 0)
    plan = story.step(report=goodbye(step=19, saved=19))
    assert plan.status.phase is Phase.SUSPENDED
    assert "from the checkpoint of step 19" in (plan.status.message or "")
    assert story.attempt.error_class is ErrorClass.SUSPENDED


def test_a_trainer_that_could_not_save_tells_what_is_lost() -> None:
    story = Story(QUICK).started()
    story.step(rayjob=RUNNING, report=training(step=17, total=100, saved=10))
    story.step(rayjob=None)
    assert (story.attempt.error_class, story.attempt.lost_steps) == (ErrorClass.LOST, 7)
    story.step(pods=[POD], report=goodbye(step=19, saved=10))
    assert (story.attempt.last_step, story.attempt.lost_steps) == (19, 9)


def test_what_a_restart_within_the_attempt_lost_stays_lost() -> None:
    story = Story(QUICK).started()
    story.step(rayjob=RUNNING, report=training(step=17, total=100, saved=10))
    story.step(rayjob=RUNNING, report=training(step=12, total=100, saved=10, resumed=10))
    assert story.attempt.lost_steps == 7
    story.step(rayjob=None)
    assert story.attempt.lost_steps == 9
    story.step(pods=[POD], report=goodbye(step=14, saved=14))
    assert story.attempt.lost_steps == 7


def test_never_resume_loses_all_that_was_done() -> None:
    story = Story({**QUICK, "checkpoint": {"resume": "Never"}}).started()
    story.step(rayjob=RUNNING, report=training(step=17, total=100, saved=10))
    story.step(rayjob=None)
    story.step(pods=[POD], report=goodbye(step=18, saved=18))
    assert story.attempt.lost_steps == 18
    assert "from the checkpoint" not in (story.job.status.message or "")


def test_a_rayjob_that_others_suspend_stays_the_same_attempt_though_its_trainer_says_goodbye() -> None:
    story = Story(QUICK).trained()
    held = rayjob("Suspending", "RUNNING", suspended=True)
    plan = story.step(rayjob=held, report=goodbye(step=9, saved=9))
    assert (plan.status.phase, plan.status.reason) == (Phase.QUEUED, "RayJobSuspended")
    assert (story.attempt.number, story.attempt.end_time, story.attempt.last_step) == (1, None, 9)
    assert story.job.status.checkpoint is not None
    assert story.job.status.checkpoint.step == 9
    assert plan.status.retries is not None
    assert plan.status.retries.preemption == 1
    checking = Report.model_validate({"finetune": {"phase": "Validating", "step": 0}})
    again = story.step(rayjob=RUNNING, report=checking)
    assert again.status.progress is not None
    assert again.status.progress.step == 5, "until it knows where it goes on, the job is where it was"
    again = story.step(rayjob=RUNNING, report=training(step=10, saved=9, resumed=9))
    assert again.status.phase is Phase.RUNNING
    assert (story.attempt.resumed_from_step, story.attempt.lost_steps or 0) == (9, 0)


@pytest.mark.parametrize("left", [True, False], ids=["going", "gone"])
def test_a_rayjob_that_was_deleted_is_told_though_its_trainer_calls_itself_preempted(left: bool) -> None:
    story = Story(QUICK).trained()
    going = rayjob("Running", "RUNNING", deleting_since=story.now)
    plan = story.step(rayjob=going if left else None, report=goodbye(step=9, saved=9))
    assert (plan.status.phase, plan.status.reason) == (Phase.RETRYING, "Lost")
    assert "RayJob triage-a1 was deleted before it finished" in (plan.status.message or "")
    assert (story.attempt.exit_code, story.attempt.lost_steps) == (75, 0)


def test_why_its_pod_was_taken_away_is_told_with_what_the_trainer_said() -> None:
    story = Story(QUICK).trained()
    evicted = replace(POD, disruption="EvictionByEvictionAPI: Eviction API: evicting")
    worker = PodFacts("triage-a1-worker", True)
    plan = story.step(rayjob=RUNNING, pods=[worker, evicted], report=goodbye(step=9, saved=9))
    assert plan.status.reason == "Preempted"
    told = "stopped by SIGTERM (EvictionByEvictionAPI: Eviction API: evicting)"
    assert story.attempt.message == told
    assert (condition(story, "Training"), condition(story, "ResourcesReady")) == (told, told)
    failed = Story(QUICK).trained()
    failed.step(rayjob=RUNNING, pods=[evicted], report=result("BadData", 65, "line 17"))
    assert failed.attempt.message == "line 17"


def test_other_last_words_of_a_suspended_rayjob_count() -> None:
    story = Story(QUICK).trained()
    held = rayjob("Suspending", "RUNNING", suspended=True)
    story.step(rayjob=held, report=result("BadData", 65, "no"))
    assert story.attempt.error_class is ErrorClass.BAD_DATA


def test_a_ray_job_that_a_person_stopped_is_cancelled_though_its_trainer_calls_itself_preempted() -> None:
    story = Story(QUICK).trained()
    plan = story.step(rayjob=RUNNING, report=goodbye(step=9, saved=9))
    assert (plan.status.phase, plan.status.reason) == (Phase.RETRYING, "Preempted")
    story.step(rayjob=rayjob("Running", "STOPPED"), pods=[POD], report=goodbye(step=9, saved=9))
    status = story.step(rayjob=rayjob("Complete", "STOPPED"), report=goodbye(step=9, saved=9)).status
    assert (status.phase, status.reason) == (Phase.CANCELLED, "Cancelled")
    assert "Ray job of triage-a1 was stopped" in (status.message or "")
    assert story.attempt.number == 1


@pytest.mark.parametrize(
    ("last_word", "stopped"),
    [
        (goodbye(step=9, saved=9), rayjob("Running", "STOPPED", deleting_since=START)),  # by our own deletion
        (goodbye(step=9, saved=9), rayjob("Complete", "STOPPED", ours=False)),
        (result("Storage", 74, "away"), rayjob("Complete", "STOPPED")),
    ],
)
def test_a_ray_job_that_stopped_for_another_reason_is_tried_again(
    last_word: Report, stopped: RayJobFacts
) -> None:
    story = Story(QUICK).trained()
    story.step(rayjob=RUNNING, report=last_word)
    known = story.attempt.error_class
    assert story.step(rayjob=stopped, pods=[POD], report=last_word).status.phase is Phase.RETRYING
    assert story.attempt.error_class is known, "it is not cancelled"


@pytest.mark.parametrize("job", ["RUNNING", "PENDING", ""])
def test_a_trainer_that_kuberay_starts_again_after_its_last_word_is_stopped_soon(job: str) -> None:
    """HTTPMode: the head pod went, its trainer said goodbye, and KubeRay begins the same RayJob anew."""
    story = Story(QUICK).trained()
    story.step(rayjob=RUNNING, report=goodbye(step=9, saved=9))
    again = rayjob("Running", job)
    assert story.step(rayjob=again, pods=[POD], after=10).actions == []
    assert list(story.step(rayjob=again, pods=[POD]).actions) == [DeleteRayJob("triage-a1", "ray-uid")]


def test_a_job_that_has_failed_does_not_run_on_in_a_new_head_pod() -> None:
    story = Story({"retry": {"preemptions": 0}}).trained()
    plan = story.step(rayjob=RUNNING, report=goodbye(step=9, saved=9))
    assert (plan.status.phase, plan.requeue_after) == (Phase.FAILED, 10)
    assert story.step(rayjob=RUNNING, after=10).actions == ()
    assert list(story.step(rayjob=RUNNING).actions) == [DeleteRayJob("triage-a1", "ray-uid")]

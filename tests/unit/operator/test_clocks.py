"""Clocks that are set while a job runs, machines that sleep, and operators whose clock differs from the last one's."""

from __future__ import annotations

from datetime import timedelta

import pytest

from finetune_operator.api.finetunejob import ErrorClass, Phase
from finetune_operator.core import statuses
from finetune_operator.reconcile import pod_facts
from finetune_operator.reconcile.clocks import SteadyClock
from tests.unit.operator.stories import RUNNING, START, Story, rayjob, result, training

HOUR = timedelta(hours=1)


class Machine:
    """The kernel's counts."""

    def __init__(self) -> None:
        self.wall = START
        self.elapsed = 5000.0
        self.slept = 70.0
        self.clock = SteadyClock(
            wall=lambda: self.wall,
            elapsed=lambda: self.elapsed,
            awake=lambda: self.elapsed - self.slept,
        )

    def work(self, seconds: float) -> None:
        self.elapsed += seconds
        self.wall += timedelta(seconds=seconds)

    def sleep(self, seconds: float) -> None:
        self.work(seconds)
        self.slept += seconds


@pytest.mark.parametrize("step", [HOUR, -HOUR])
def test_a_wall_clock_that_is_set_does_not_move_the_operators_time(step: timedelta) -> None:
    machine = Machine()
    machine.work(10)
    machine.wall += step
    machine.work(10)
    assert machine.clock() == START + timedelta(seconds=20)
    assert machine.clock.listening_since() == START


def test_time_asleep_passes_and_silence_in_it_says_nothing() -> None:
    machine = Machine()
    machine.work(10)
    machine.sleep(3600)
    machine.work(1)
    assert machine.clock() == START + timedelta(seconds=3611)
    assert machine.clock.listening_since() == START + timedelta(seconds=3611)
    machine.work(100)
    assert machine.clock.listening_since() == START + timedelta(seconds=3611)


def test_a_machine_that_slept_does_not_find_its_trainers_stalled() -> None:
    story = Story().trained()
    story.now += timedelta(hours=9)
    assert story.step(rayjob=RUNNING, listening_since=story.now).status.phase is Phase.RUNNING


def test_the_latest_time_of_a_status_is_that_of_its_newest_event() -> None:
    story = Story().trained()
    assert statuses.latest_time(story.job.status) == story.now - timedelta(seconds=1)
    story.step(rayjob=RUNNING, report=result("Storage", 74, "away"))
    due = story.job.status.next_attempt_time
    assert due is not None
    assert statuses.latest_time(story.job.status) == story.now - timedelta(seconds=1) < due


def test_an_operator_whose_clock_is_an_hour_behind_does_not_wait_that_hour() -> None:
    """Its time is the last one that was recorded, until its own clock has come so far."""
    story = Story().trained()
    story.step(rayjob=RUNNING, report=result("Storage", 74, "away"), after=0)
    recorded = story.now
    over = rayjob("Failed", "FAILED")
    story.step(rayjob=over, clock_is_behind=True, after=0)
    assert story.attempt.number == 2
    assert story.attempt.start_time == recorded
    for _ in range(3):
        plan = story.step(rayjob=RUNNING, after=0, clock_is_behind=True)
        assert plan.status.phase is not Phase.FAILED
    assert story.attempt.end_time is None


def test_an_operator_whose_clock_is_an_hour_ahead_ends_nothing_for_silence() -> None:
    story = Story({"deadlines": {"startSeconds": 120, "stallSeconds": 60}}).trained()
    story.now += HOUR
    assert story.step(rayjob=RUNNING, listening_since=story.now).status.phase is Phase.RUNNING
    young = Story({"deadlines": {"startSeconds": 120}}).started()
    young.now += HOUR
    young.step(rayjob=rayjob("Initializing"), listening_since=young.now, after=59)
    assert young.attempt.end_time is None
    young.step(rayjob=rayjob("Initializing"), listening_since=young.now - timedelta(seconds=61))
    assert young.attempt.error_class is ErrorClass.DEADLINE_EXCEEDED


def test_a_kubelets_clock_does_not_make_an_image_hopeless() -> None:
    """A pod was not scheduled before its attempt began, whatever another clock says."""
    pod = {
        "metadata": {"name": "triage-a1-head"},
        "status": {
            "phase": "Pending",
            "conditions": [
                {"type": "PodScheduled", "status": "True", "lastTransitionTime": "2026-01-01T10:59:00Z"}
            ],
            "containerStatuses": [
                {"name": "ray-head", "state": {"waiting": {"reason": "ImagePullBackOff", "message": "no"}}}
            ],
        },
    }
    story = Story().started()
    start = story.attempt.start_time
    assert pod_facts.pod_facts(pod, attempt_start=start).scheduled_at == start
    plan = story.step(rayjob=rayjob("Initializing"), pods=[pod_facts.pod_facts(pod, attempt_start=start)])
    assert (plan.status.phase, plan.status.reason) == (Phase.PROVISIONING, "ImagePullBackOff")


def test_progress_after_a_step_back_is_still_written() -> None:
    story = Story().trained()
    plan = story.step(
        rayjob=RUNNING, report=training(step=7), reported_at=story.now - HOUR, clock_is_behind=True
    )
    assert plan.status.progress is not None
    assert plan.status.progress.step == 7

"""Attempt 0: what speaks against a job is found before it asks for a GPU."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_operator.api.finetunejob import FineTuneJobSpec, Phase, Retries
from finetune_operator.core.facts import CreateRayJob, DeleteRayJob, PodFacts
from finetune_operator.manifests import rayjobs
from finetune_operator.manifests.runfiles import Places
from tests.unit.operator.stories import SPEC, Story, rayjob, result, training

GPU: dict[str, Any] = {"resources": {"gpusPerWorker": 1, "acceleratorType": "NVIDIA-L4"}}
FITS = result("Checked", 0, "needs 9.1 GiB, NVIDIA-L4 has 22.5 GiB")
WORK, DONE = (
    rayjob("Running", "RUNNING", name="triage-check"),
    rayjob("Complete", "SUCCEEDED", name="triage-check"),
)


def checking(spec: dict[str, Any] | None = None) -> Story:
    story = Story(GPU | {"scheduling": {"queueName": "team"}} | (spec or {})).started()
    assert story.attempt.number == 0
    story.step(rayjob=WORK)
    return story


def test_a_job_that_fits_asks_for_its_gpu_once_the_check_is_gone() -> None:
    story = checking()
    plan = story.step(rayjob=WORK, report=FITS)
    status = plan.status
    assert (status.phase, status.reason) == (Phase.PROVISIONING, "Checked")
    assert [(event.reason, event.warning) for event in plan.events] == [("Checked", False)]
    assert "checked: needs 9.1 GiB, NVIDIA-L4 has 22.5 GiB. Attempt 1 follows" in (status.message or "")
    recorded = story.step(rayjob=DONE, after=2).status
    assert recorded.message == "attempt 1 starts as RayJob triage-a1"
    assert [attempt.number for attempt in story.job.status.attempts] == [0, 1]
    assert list(story.step().actions) == [CreateRayJob("triage-a1", 1)]
    assert story.attempt.gpu_seconds is None
    assert story.job.status.retries is None or story.job.status.retries.infrastructure == 0


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        (result("BadConfig", 64, "method.type: Full of this model does not fit"), "BadConfig"),
        (result("BadData", 65, "train.jsonl line 17: not JSON"), "BadData"),
        (result("ModelNotFound", 66, "no config.json"), "ModelNotFound"),
    ],
)
def test_what_the_check_finds_ends_the_job_whatever_retries_a_user_allows(told: Any, reason: str) -> None:
    story = checking({"retry": {"maxUserRetries": 3}})
    story.step(rayjob=WORK, report=told)
    story.step(rayjob=DONE)
    status = story.step().status
    assert (status.phase, status.reason) == (Phase.FAILED, reason)
    assert [attempt.number for attempt in status.attempts] == [0]


def test_a_job_that_may_run_out_of_memory_is_warned_of() -> None:
    story = checking()
    tight = "may run out of memory: needs about 87.2 GiB, and NVIDIA-L4 has 22.5 GiB"
    plans = [story.step(rayjob=WORK, report=result("Checked", 0, tight))]
    status = plans[0].status
    assert (status.phase, status.reason) == (Phase.PROVISIONING, "MayRunOutOfMemory")
    assert f"checked: {tight}. Attempt 1 follows" in (status.message or "")
    plans += [story.step(rayjob=WORK, after=0.1), story.step(rayjob=DONE, after=0.1), story.step(after=2)]
    told = [(event.reason, event.warning) for plan in plans for event in plan.events]
    assert told == [("MayRunOutOfMemory", True), ("Starting", False), ("Provisioning", False)]


@pytest.mark.parametrize(
    ("end", "left"),
    [
        (
            rayjob("Failed", "FAILED", reason="AppFailed", message="Ray head pod not found."),
            ("Lost", None, "AppFailed: Ray head pod not found."),
        ),
        (
            rayjob(
                "Failed",
                "FAILED",
                reason="AppFailed",
                message="Job entrypoint command failed with exit code 74",
            ),
            ("Storage", 74, "the trainer ended with exit code 74"),
        ),
        (
            rayjob("Complete", "SUCCEEDED"),
            ("Checked", 0, "nothing was found that speaks against training"),
        ),
    ],
)
def test_a_check_that_did_not_say_anything_does_not_hold_the_job_up(end: Any, left: Any) -> None:
    story = checking({"retry": {"maxInfraRetries": 0}})
    for _ in range(4):
        story.step(rayjob=end, after=2)
        if story.attempt.number == 1:
            break
    assert story.attempt.number == 1
    assert story.job.status.retries == Retries(), "it costs nothing"
    check = story.job.status.attempts[0]
    assert (check.error_class, check.exit_code, check.message) == left
    assert check.inspection is None, "there is no artifact to look for"


def test_a_check_that_was_preempted_costs_nothing() -> None:
    story = checking({"retry": {"preemptions": 0}})
    status = story.step(rayjob=WORK, report=result("Preempted", 75, "stopped by SIGTERM")).status
    assert (status.phase, status.retries) == (Phase.RETRYING, Retries())
    assert status.message == "the check ended: stopped by SIGTERM. Attempt 1 follows (which asks for the GPU)"


def test_a_check_that_waits_for_room_asks_for_no_gpu() -> None:
    story = Story(GPU).started()
    pod = PodFacts(
        "triage-check-head", False, "Unschedulable", "0/1 nodes are available: 1 Insufficient cpu."
    )
    status = story.step(rayjob=rayjob("Initializing", name="triage-check"), pods=[pod]).status
    assert "(1 CPU, 4Gi memory)" in (status.message or "")


def test_an_image_of_an_older_version_which_has_no_check_trains_all_the_same() -> None:
    story = checking()
    log = "error: argument command: invalid choice: 'check'"
    message = f"Job entrypoint command failed with exit code 2, last available logs (truncated …):\n{log}"
    end = rayjob("Failed", "FAILED", name="triage-check", reason="AppFailed", message=message)
    status = story.step(rayjob=end).status
    assert (status.phase, status.reason, status.retries) == (Phase.PROVISIONING, "Checked", Retries())
    assert "nothing was checked, as the training image is of an older version" in (status.message or "")
    assert (story.attempt.error_class, story.attempt.exit_code) == ("Checked", 2)
    story.step(rayjob=end, after=2)
    assert story.attempt.number == 1


def test_a_check_that_is_suspended_begins_anew() -> None:
    story = checking()
    story.change(suspend=True)
    story.step(rayjob=WORK)
    assert list(story.step(rayjob=WORK).actions) == [DeleteRayJob("triage-check", "ray-uid")]
    story.step()
    assert story.job.status.phase is Phase.SUSPENDED
    story.change(suspend=False)
    for _ in range(4):
        story.step(after=2)
    assert [attempt.number for attempt in story.job.status.attempts] == [0]
    assert story.attempt.end_time is None


def test_a_check_is_cancelled_like_any_attempt() -> None:
    story = checking()
    story.act("cancel")
    story.step(rayjob=WORK)
    story.step(rayjob=WORK)
    assert story.step().status.phase is Phase.CANCELLED


@pytest.mark.parametrize(
    "resources",
    [{}, {"gpusPerWorker": 1}, {"gpusPerWorker": 1, "acceleratorType": "NVIDIA-L4", "fitCheck": "Skip"}],
)
def test_there_is_none_where_there_is_nothing_to_compare_with_or_nobody_wants_it(
    resources: dict[str, Any],
) -> None:
    assert Story({"resources": resources}).started().attempt.number == 1


def test_its_pod_has_no_gpu_and_waits_in_no_queue() -> None:
    spec = FineTuneJobSpec.model_validate(SPEC | GPU | {"scheduling": {"queueName": "team"}})
    platform = rayjobs.Platform("K8sJobMode", "http://operator:8090", None, 30)
    owner, places = rayjobs.Owner("team", "triage", "uid"), Places("hf://acme/tiny", "s3://out", None)
    built = rayjobs.build_rayjob(
        owner, name="triage-check", attempt=0, spec=spec, image="trainer:1", places=places, platform=platform
    )
    pod = built["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert "nvidia.com/gpu" not in str(pod)
    assert "nodeSelector" not in pod
    assert "suspend" not in built["spec"]
    assert built["spec"]["entrypoint"] == "finetune-trainer check"


def test_progress_of_training_counts_from_the_first_attempt() -> None:
    story = checking()
    story.step(rayjob=WORK, report=FITS)
    story.step(rayjob=DONE, after=2)
    story.step(rayjob=DONE)
    story.step()
    story.step(rayjob=rayjob("Running", "RUNNING"), report=training(step=3, resumed=0))
    check, first = story.job.status.attempts
    assert (check.lost_steps or 0, first.last_step) == (0, 3)

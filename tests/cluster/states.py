"""Stories that bring about rare states of KubeRay's RayJob; tests/unit/operator/edge_cases.py has their numbers."""

from __future__ import annotations

import json
import signal

import psutil
import pytest

from tests.cluster import stories
from tests.cluster.objects import CPU, JOB_SECONDS, LONG, delete, job, wait_for
from tests.cluster.stories import Stage
from tests.cluster.watching import JOB_NAME

GONE_SECONDS = 200  # the operator waits a minute for KubeRay, and pods have their grace period
STALL_SECONDS = 60


def a_submission_that_fails_is_tried_again(stage: Stage) -> None:
    """The submitter's pod is taken away before it has submitted anything. The kubelet leaves it two more seconds, in
    which a quick one submits all the same: then its trainer's success counts, and another job is tried."""
    for name in ("unsent", "unsent-2", "unsent-3"):
        if _loses_its_submission(stage, name):
            return
    raise AssertionError("each of three submitters was quicker than its end")


def _loses_its_submission(stage: Stage, name: str) -> bool:
    team = stage.team
    team.apply(job(name))
    team("delete", "pod", submitter(stage, name), "--grace-period=0", "--force", "--wait=false")
    status = team.finished(name, seconds=2 * JOB_SECONDS)
    stories.ended(status, "Succeeded")
    assert "Failed / , SubmissionFailed" in stage.watcher.shown[f"{name}-a1"], stage.watcher.shown
    delete(team, name)
    first, *more = status["attempts"]
    if not more:
        return False
    assert (first["class"], more[0]["class"]) == ("Lost", "Succeeded"), json.dumps(status, indent=1)
    assert "SubmissionFailed" in first["message"]
    return True


def a_submitter_that_hangs_holds_nothing(stage: Stage) -> None:
    """It is stopped as it follows the log. By itself KubeRay would keep the pods for five minutes after the end."""
    team, name = stage.team, "followed"
    if stage.settings.kubelet is None:
        pytest.skip(
            "needs the node's processes on this machine (FINETUNE_E2E_KUBELET_PID): in its own container the "
            "submitter is the first process, which cannot be stopped there"
        )
    team.apply(job(name, hyperparameters={**LONG, "maxSteps": 200}))
    team.wait_job(name, lambda s: s.get("progress", {}).get("step", 0) > 0, seconds=JOB_SECONDS)
    stop_submitter(name)
    stories.ended(team.finished(name, seconds=JOB_SECONDS), "Succeeded")
    labels = ("-l", f"finetune.dev/job={name}")
    wait_for(f"no pod of {name}", lambda: not team.items("pods", *labels) or None, seconds=GONE_SECONDS)
    status = team.job(name)["status"]
    stories.ended(status, "Succeeded")
    assert len(status["attempts"]) == 1
    stage.runs_once(name, 1)
    delete(team, name)


def stop_submitter(name: str) -> None:
    """SIGSTOP to what follows the log of the Ray job, which it has in its command line."""
    followers = [
        process
        for process in psutil.process_iter(["cmdline"])
        if {"job", "logs"} <= set(words := process.info["cmdline"] or [])
        and f"//{name}-a1-" in " ".join(words)
    ]
    assert followers, f"nobody follows the log of {name}-a1"
    for process in followers:
        process.suspend()


def a_dashboard_that_never_answers_is_given_up(stage: Stage) -> None:
    """It is stopped once the cluster is ready, so the submitter gets no answer, and no trainer starts."""
    team, name = stage.team, "dashed"
    team.apply(job(name, deadlines={"stallSeconds": STALL_SECONDS}))
    submitter(stage, name)
    stories.send(stage, name, signal.SIGSTOP, "dashboard/dashboard.py")
    team.wait_job(name, lambda s: "class" in s.get("attempts", [{}])[0], seconds=JOB_SECONDS)
    team("patch", "ftj", name, "--type=merge", "--patch", '{"spec":{"deadlines":{"stallSeconds":1800}}}')
    status = team.finished(name, seconds=JOB_SECONDS)
    stories.ended(status, "Succeeded")
    assert [one["class"] for one in status["attempts"]] == ["Stalled", "Succeeded"]
    assert stage.watcher.shown[f"{name}-a1"][-1] == "Running / , "
    delete(team, name)


def submitter(stage: Stage, name: str) -> str:
    """Name of the submitter's pod of the first attempt, as soon as there is one."""
    pods = ("pods", "-l", f"{JOB_NAME}={name}-a1")
    (pod,) = wait_for(f"the submitter of {name}", lambda: stage.team.items(*pods), seconds=JOB_SECONDS)
    return str(pod["metadata"]["name"])


def an_image_that_cannot_be_pulled_is_named(stage: Stage) -> None:
    team, name = stage.team, "unpulled"
    team.apply(job(name, resources={"image": "registry.invalid/trainer:1", "cpu": CPU, "memory": "2Gi"}))
    status = team.wait_job(
        name, lambda s: s.get("reason") in ("ErrImagePull", "ImagePullBackOff"), seconds=JOB_SECONDS
    )["status"]
    assert status["phase"] == "Provisioning"
    assert "registry.invalid/trainer:1" in status["message"]
    team.wait_job(name, lambda s: s.get("reason") == "ImagePullBackOff", seconds=JOB_SECONDS)
    delete(team, name)


def a_pod_with_too_little_memory_gets_more(stage: Stage) -> None:
    """Ray's memory monitor looks several times a second, and kills the trainer before the kernel does."""
    team, name = stage.team, "cramped"
    team.apply(job(name, resources={"cpu": CPU, "memory": "900Mi"}))
    status = team.finished(name, seconds=2 * JOB_SECONDS)
    stories.ended(status, "Succeeded")
    first, second = status["attempts"]
    assert first["class"] == "HostOutOfMemory", json.dumps(status, indent=1)
    assert second["overrides"]["memory"] == "1800Mi"
    delete(team, name)


ALL = (
    a_submitter_that_hangs_holds_nothing,
    a_dashboard_that_never_answers_is_given_up,
    a_submission_that_fails_is_tried_again,
    an_image_that_cannot_be_pulled_is_named,
    a_pod_with_too_little_memory_gets_more,
)

"""Stories of jobs that spec.suspend holds, one in each phase, and lets go on: nothing of them runs meanwhile."""

from __future__ import annotations

import json

from tests.clients import FINAL, Json
from tests.cluster import deletions
from tests.cluster.deletions import until
from tests.cluster.objects import JOB_SECONDS, LONG, MANY_ROWS, NOWHERE, delete, job, wait_for
from tests.cluster.stories import Stage, ended

GONE_SECONDS = 180.0  # a trainer may save a checkpoint first


def suspend_and_resume(stage: Stage, name: str, *, end: str = "Succeeded") -> Json:
    """Suspend a job in the phase that it is in, see that nothing of it runs, and let it go on. Its last status."""
    team = stage.team
    deletions.suspend(team, "ftj", name)
    held = team.wait_job(name, lambda s: s.get("phase") in ("Suspended", *FINAL), seconds=GONE_SECONDS)[
        "status"
    ]
    assert held["phase"] == "Suspended", json.dumps(held, indent=1)
    labels = ("-l", f"finetune.dev/job={name}")
    wait_for(f"no pod of {name}", lambda: not team.items("pods", *labels) or None, seconds=GONE_SECONDS)
    team("patch", "ftj", name, "--type=merge", "--patch", '{"spec":{"suspend":false}}')
    status = team.finished(name, seconds=2 * JOB_SECONDS)
    ended(status, end)
    if stage.settings.kubelet is not None:
        seen = [stage.watcher.trainers(name, one["number"]) for one in status["attempts"]]
        assert max(seen) <= 1, f"trainers of each attempt: {seen}"
        assert end != "Succeeded" or seen[-1] == 1, f"trainers of each attempt: {seen}"
    delete(team, name)
    return status


def suspended_while_provisioning(stage: Stage) -> None:
    stage.team.apply(job("held-provisioning"))
    until(stage, "held-provisioning", "Provisioning")
    suspend_and_resume(stage, "held-provisioning")


def suspended_while_validating(stage: Stage) -> None:
    stage.team.apply(job("held-validating"))
    until(stage, "held-validating", "Validating")
    suspend_and_resume(stage, "held-validating")


def suspended_while_running(stage: Stage) -> None:
    """It saves a checkpoint first, and goes on from there."""
    checkpoint = {"uri": "pvc://files/checkpoints/held-running", "everySteps": 5000}
    steps = {**LONG, "maxSteps": 300}
    stage.team.apply(job("held-running", hyperparameters=steps, checkpoint=checkpoint))
    stage.team.wait_job(
        "held-running", lambda s: s.get("progress", {}).get("step", 0) > 5, seconds=JOB_SECONDS
    )
    status = suspend_and_resume(stage, "held-running")
    assert status["attempts"][0].get("lostSteps", 0) <= 1, json.dumps(status["attempts"], indent=1)
    assert status["attempts"][-1]["resumedFromStep"] > 0


def suspended_while_retrying(stage: Stage) -> None:
    """Between two attempts; the second one finds no data either."""
    retry = {"maxUserRetries": 1, "backoffSeconds": {"min": 120, "max": 120}}
    stage.team.apply(job("held-retrying", dataset=NOWHERE, retry=retry))
    until(stage, "held-retrying", "Retrying")
    stage.team.wait_job("held-retrying", lambda s: "starts at" in s["message"], seconds=120)
    status = suspend_and_resume(stage, "held-retrying", end="Failed")
    assert [one["class"] for one in status["attempts"]] == ["BadData", "BadData"]


def suspended_while_queued(stage: Stage) -> None:
    """Somebody else holds the RayJob back, as a queue does; the user's wish takes it down."""
    stage.team.apply(job("held-queued"))
    until(stage, "held-queued", "Provisioning")
    stage.team.wait_job("held-queued", lambda s: "uid" in s["attempts"][-1], seconds=30)
    deletions.suspend(stage.team, "rayjob", "held-queued-a1")
    until(stage, "held-queued", "Queued")
    suspend_and_resume(stage, "held-queued")


def suspended_while_evaluating(stage: Stage) -> None:
    """What is trained is not lost: it is evaluated by the next attempt, or is done before it can be stopped."""
    short: Json = {**LONG, "maxSteps": 1}
    name = "held-evaluating"
    stage.team.apply(job(name, hyperparameters=short, dataset=MANY_ROWS, earlyStopping={}))
    until(stage, name, "Evaluating")
    deletions.suspend(stage.team, "ftj", name)
    found = stage.team.wait_job(name, lambda s: s.get("phase") in ("Suspended", *FINAL), seconds=GONE_SECONDS)
    if found["status"]["phase"] == "Suspended":
        suspend_and_resume(stage, name)
        return
    ended(found["status"], "Succeeded")
    stage.runs_once(name, 1)
    delete(stage.team, name)


PHASES = (
    suspended_while_evaluating,
    suspended_while_running,
    suspended_while_validating,
    suspended_while_retrying,
    suspended_while_queued,
    suspended_while_provisioning,
)

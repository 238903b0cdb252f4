"""Stories of jobs that are deleted, one in each phase: nothing of them stays in the cluster."""

from __future__ import annotations

from tests.clients import FINAL, Json, Kubectl
from tests.cluster.objects import JOB_SECONDS, LONG, MANY_ROWS, NOWHERE, delete, job
from tests.cluster.stories import Stage


def until(stage: Stage, name: str, phase: str) -> None:
    found = stage.team.wait_job(
        name, lambda status: status.get("phase") in (phase, *FINAL), seconds=JOB_SECONDS
    )
    assert found["status"]["phase"] == phase, f"{phase} was not seen"


def suspend(kubectl: Kubectl, kind: str, name: str) -> None:
    kubectl("patch", kind, name, "--type=merge", "--patch", '{"spec":{"suspend":true}}')


def delete_in(stage: Stage, name: str, phase: str) -> None:
    until(stage, name, phase)
    delete(stage.team, name)
    assert stage.watcher.phases(name)[-1] == phase, "the phase in which it was deleted"


def deleted_while_pending(stage: Stage) -> None:
    stage.team.apply(job("deleted-pending", model={"fineTuneJobRef": {"name": "nobody"}}))
    delete_in(stage, "deleted-pending", "Pending")


def deleted_while_provisioning(stage: Stage) -> None:
    stage.team.apply(job("deleted-provisioning", hyperparameters=LONG))
    delete_in(stage, "deleted-provisioning", "Provisioning")


def deleted_while_queued(stage: Stage) -> None:
    """Somebody else suspends the RayJob, as a queue does."""
    stage.team.apply(job("deleted-queued", hyperparameters=LONG))
    until(stage, "deleted-queued", "Provisioning")
    stage.team.wait_job("deleted-queued", lambda s: "uid" in s["attempts"][-1], seconds=30)
    suspend(stage.team, "rayjob", "deleted-queued-a1")
    delete_in(stage, "deleted-queued", "Queued")


def deleted_while_suspended(stage: Stage) -> None:
    stage.team.apply(job("deleted-suspended", hyperparameters=LONG))
    until(stage, "deleted-suspended", "Provisioning")
    suspend(stage.team, "ftj", "deleted-suspended")
    delete_in(stage, "deleted-suspended", "Suspended")


def deleted_while_validating(stage: Stage) -> None:
    stage.team.apply(job("deleted-validating", hyperparameters=LONG))
    delete_in(stage, "deleted-validating", "Validating")


def deleted_while_running(stage: Stage) -> None:
    stage.team.apply(job("deleted-running", hyperparameters=LONG))
    delete_in(stage, "deleted-running", "Running")


def deleted_while_evaluating(stage: Stage) -> None:
    """With early stopping the best weights are evaluated once more at the end."""
    short: Json = {**LONG, "maxSteps": 1}
    stage.team.apply(job("deleted-evaluating", hyperparameters=short, dataset=MANY_ROWS, earlyStopping={}))
    delete_in(stage, "deleted-evaluating", "Evaluating")


def deleted_while_retrying(stage: Stage) -> None:
    """Between two attempts: what the first one left to read goes as well."""
    retry = {"maxUserRetries": 1, "backoffSeconds": {"min": 600, "max": 600}}
    stage.team.apply(job("deleted-retrying", dataset=NOWHERE, retry=retry))
    until(stage, "deleted-retrying", "Retrying")
    stage.team.wait_job("deleted-retrying", lambda s: "starts at" in s["message"], seconds=120)
    delete_in(stage, "deleted-retrying", "Retrying")


PHASES = (
    deleted_while_evaluating,
    deleted_while_running,
    deleted_while_validating,
    deleted_while_retrying,
    deleted_while_queued,
    deleted_while_suspended,
    deleted_while_provisioning,
    deleted_while_pending,
)

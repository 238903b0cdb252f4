"""A job in a queue of Kueue. Conditions of Workloads are as Kueue 0.15 to 0.19 writes them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from finetune_operator.api.finetunejob import FineTuneJobSpec, Phase
from finetune_operator.core import queues
from finetune_operator.core.facts import WorkloadFacts
from finetune_operator.manifests import naming, rayjobs
from finetune_operator.manifests.runfiles import Places
from finetune_operator.reconcile import facts
from tests.unit.operator.stories import SPEC, START, Story, rayjob, training

QUEUED = {"scheduling": {"queueName": "team-a"}}
GPU = {"resources": {"gpusPerWorker": 1}}
INSUFFICIENT = (
    "couldn't assign flavors to pod set head: "
    "insufficient unused quota for nvidia.com/gpu in flavor l4, 1 more needed"
)


def held(**more: Any) -> Any:
    return rayjob("Suspended", suspended=True, queue="team-a", created=START, **more)


def workload(*conditions: dict[str, Any], **more: Any) -> dict[str, Any]:
    metadata = {
        "name": "rayjob-triage-a1-1a2b3",
        "ownerReferences": [{"kind": "RayJob", "name": "triage-a1", "uid": "ray-uid"}],
    }
    return {
        "metadata": metadata,
        "spec": {"queueName": "team-a", "active": True, **more.pop("spec", {})},
        "status": {"conditions": list(conditions), **more},
    }


def condition(kind: str, status: bool, reason: str, message: str = "") -> dict[str, Any]:
    return {"type": kind, "status": str(status), "reason": reason, "message": message}


def place(name: str, position: int) -> dict[str, Any]:
    return {"metadata": {"name": name}, "positionInLocalQueue": position}


def conditions(plan: Any) -> dict[str, tuple[str, str]]:
    return {c.type: (c.status, c.reason) for c in plan.status.conditions}


def test_the_rayjob_is_created_suspended_and_labelled_and_then_left_to_kueue() -> None:
    built = build(QUEUED)
    assert built["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    assert built["spec"]["suspend"] is True
    assert built["spec"]["shutdownAfterJobFinishes"] is True
    plain = build({})
    assert "suspend" not in plain["spec"]
    assert naming.LABEL_QUEUE not in plain["metadata"]["labels"]


def test_an_inspection_needs_no_quota() -> None:
    built = build(QUEUED | {"resources": {"gpusPerWorker": 1, "acceleratorType": "NVIDIA-L4"}}, inspect=True)
    assert naming.LABEL_QUEUE not in built["metadata"]["labels"]
    assert "suspend" not in built["spec"]
    assert "nodeSelector" not in built["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]


def test_the_accelerator_becomes_a_node_selector() -> None:
    pod = build({"resources": {"gpusPerWorker": 1, "acceleratorType": "NVIDIA-L4"}})["spec"]["rayClusterSpec"]
    assert pod["headGroupSpec"]["template"]["spec"]["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-L4"}


def build(spec: dict[str, Any], *, inspect: bool = False) -> dict[str, Any]:
    return rayjobs.build_rayjob(
        rayjobs.Owner("team", "triage", "u"),
        name="triage-a1",
        attempt=1,
        spec=FineTuneJobSpec.model_validate(SPEC | spec),
        image="trainer:1",
        places=Places("hf://a/b", "s3://b/o", None),
        platform=rayjobs.Platform("K8sJobMode", "http://operator:8090", None, 30),
        inspect=inspect,
    )


@pytest.mark.parametrize(
    ("body", "reason", "parts"),
    [
        (
            workload(condition("QuotaReserved", False, "Pending", INSUFFICIENT)),
            "Queued", ("waits in queue team-a (position 3)", "1 more needed", "ask for less in spec.resources"),
        ),
        (
            workload(condition("QuotaReserved", False, "Inadmissible", "LocalQueue team-a doesn't exist")),
            "QueueMissing", ("no LocalQueue team-a in namespace team", "create it"),
        ),
        (
            workload(condition("QuotaReserved", False, "Inadmissible", "ClusterQueue gpus doesn't exist")),
            "QueueInactive", ("ClusterQueue gpus doesn't exist", "put right"),
        ),
        (
            workload(condition("QuotaReserved", False, "Inadmissible", "ClusterQueue gpus is inactive")),
            "QueueInactive", ("is inactive",),
        ),
        (
            workload(
                condition("QuotaReserved", True, "QuotaReserved"),
                admissionChecks=[{"name": "provision", "state": "Pending", "message": "capacity is asked for"}],
            ),
            "AdmissionChecks", ("reserved the quota", "provision (capacity is asked for)"),
        ),
        (
            workload(
                condition("QuotaReserved", False, "Pending", "Preempted to accommodate a workload (UID: x)"),
                condition("Evicted", True, "Preempted", "Preempted to accommodate a workload (UID: x)"),
                condition("Preempted", True, "InClusterQueue", "Preempted for a workload (UID: x, JobUID: y)"),
            ),
            "Preempted", ("took the room away (Preempted)", "JobUID: y", "goes on when there is room"),
        ),
        (
            workload(
                condition("Evicted", True, "PodsReadyTimeout", "Exceeded the PodsReady timeout team/rayjob"),
            ),
            "PodsReadyTimeout", ("Exceeded the PodsReady timeout",),
        ),
        (
            workload(
                condition("Evicted", True, "Deactivated", "The workload is deactivated"), spec={"active": False}
            ),
            "Deactivated", ("taken out of queue team-a", "kubectl patch workload rayjob-triage-a1-1a2b3 -n team"),
        ),
        (workload(), "Queued", ("until there is room",)),
    ],
)  # fmt: skip
def test_what_the_queue_says_is_in_the_status(
    body: dict[str, Any], reason: str, parts: tuple[str, ...]
) -> None:
    story = Story(QUEUED).started()
    pending = [place("another", 0), place("rayjob-triage-a1-1a2b3", 2)]
    plan = story.step(rayjob=held(), workload=facts.workload_facts(body, pending=pending))
    assert (plan.status.phase, plan.status.reason) == (Phase.QUEUED, reason)
    for part in parts:
        assert part in (plan.status.message or "")
    assert conditions(plan)["QuotaReserved"] == ("False" if reason != "AdmissionChecks" else "True", reason)
    assert plan.status.queue is not None
    assert (plan.status.queue.name, plan.status.queue.position) == ("team-a", 3)
    assert plan.status.queue.workload == "rayjob-triage-a1-1a2b3"
    assert plan.actions == ()


@pytest.mark.parametrize(
    ("found", "reason", "reserved", "text"),
    [
        (
            WorkloadFacts("w", active=False),
            "Deactivated",
            "False",
            "Workload w was taken out of queue team-a: spec.active is false; to let it in again: kubectl patch "
            "workload w -n team --type=merge -p '{\"spec\":{\"active\":true}}'",
        ),
        (
            WorkloadFacts("w", quota_reserved=True),
            "AdmissionChecks",
            "True",
            "queue team-a has reserved the quota and waits for its admission checks",
        ),
        (
            WorkloadFacts("w", quota_reserved=True, evicted="Preempted", evicted_message="for another", message="old"),
            "Preempted",
            "False",
            "queue team-a took the room away (Preempted): for another; it goes on when there is room again",
        ),
        (
            WorkloadFacts("w", reason="Inadmissible", message="ClusterQueue gpus is Stopped."),
            "QueueInactive",
            "False",
            "queue team-a lets nobody in: ClusterQueue gpus is Stopped; have its ClusterQueue put right",
        ),
        (
            WorkloadFacts("w", reason="Waiting", message="nothing yet", position=7),
            "Queued",
            "False",
            "waits in queue team-a until there is room (position 7)",
        ),
        (WorkloadFacts("w"), "Queued", "False", "waits in queue team-a until there is room"),
    ],
)  # fmt: skip
def test_what_a_workload_says_is_told_in_these_words(
    found: WorkloadFacts, reason: str, reserved: str, text: str
) -> None:
    plan = Story(QUEUED).started().step(rayjob=held(), workload=found)
    assert (plan.status.reason, plan.status.message) == (reason, text)
    assert plan.status.queue is not None
    assert plan.status.queue.message == (found.evicted_message or found.message)
    assert conditions(plan) == {
        "Accepted": ("True", "Accepted"),
        "QuotaReserved": (reserved, reason),
        "ResourcesReady": ("False", reason),
        "Reconciling": ("True", reason),
        "Stalled": ("False", reason),
        "Training": ("False", reason),
    }
    assert plan.requeue_after == 10 + (found.position or 0)


def test_far_back_in_a_queue_the_position_is_asked_for_less_often() -> None:
    def seconds(position: int | None, *, age: int = 0) -> float:
        workload = WorkloadFacts(name="w", position=position)
        return queues.next_look(workload, held(), now=START + timedelta(seconds=age))

    assert [seconds(position) for position in (None, 1, 5, 100, 900)] == [10, 11, 15, 110, 300]
    assert [seconds(position, age=90) for position in (None, 1)] == [30, 11]


def test_without_kueue_the_job_says_so() -> None:
    story = Story(QUEUED).started()
    plan = story.step(rayjob=held(), kueue_installed=False)
    assert plan.status.reason == "KueueUnavailable"
    assert "Kueue is not installed" in (plan.status.message or "")


def test_a_kueue_that_makes_no_workload_is_told_after_10_seconds() -> None:
    story = Story(QUEUED).started()
    assert story.step(rayjob=held(), after=20).status.reason == "Queued"
    plan = story.step(rayjob=held())
    assert plan.status.reason == "KueueUnavailable"
    assert "made no Workload" in (plan.status.message or "")


def test_once_let_in_the_place_in_the_queue_is_gone() -> None:
    story = Story(QUEUED).started()
    story.step(rayjob=held(), workload=WorkloadFacts("w"))
    plan = story.step(rayjob=rayjob("Initializing", queue="team-a"))
    assert (plan.status.phase, plan.status.queue) == (Phase.PROVISIONING, None)
    assert conditions(plan)["QuotaReserved"] == ("True", "QuotaReserved")


def test_a_preemption_by_the_queue_has_a_budget_of_its_own_and_keeps_the_attempt() -> None:
    spec = QUEUED | GPU | {"retry": {"preemptions": 1}}
    story = Story(spec).started()
    running = rayjob("Running", "RUNNING", queue="team-a")
    story.step(rayjob=running, report=training(step=5, saved=5), after=100)
    evicted = WorkloadFacts("w", evicted="Preempted", evicted_message="for another")
    plan = story.step(rayjob=held(), workload=evicted, after=50)
    assert (plan.status.phase, plan.status.reason) == (Phase.QUEUED, "Preempted")
    assert plan.status.retries is not None
    assert plan.status.retries.preemption == 1
    assert [attempt.number for attempt in plan.status.attempts] == [1]
    assert plan.status.attempts[0].gpu_seconds == 100
    assert conditions(plan)["QuotaReserved"] == ("False", "Preempted")
    # Again: the budget is used up.
    story.step(rayjob=running, report=training(step=7, saved=5), after=30)
    plan = story.step(rayjob=held(), workload=evicted)
    assert plan.status.attempts[-1].error_class == "Preempted"
    assert plan.status.attempts[-1].gpu_seconds == 130


def test_the_users_suspension_takes_the_rayjob_down_and_the_queue_with_it() -> None:
    story = Story(QUEUED).started()
    story.step(rayjob=held(), workload=WorkloadFacts("w"))
    story.change(suspend=True)
    plan = story.step(rayjob=held(), workload=WorkloadFacts("w"))
    assert plan.status.queue is None
    plan = story.step(rayjob=held())
    assert [type(action).__name__ for action in plan.actions] == ["DeleteRayJob"]
    assert story.step().status.phase is Phase.SUSPENDED


def test_whose_workload_it_is_follows_from_the_name_of_its_rayjob() -> None:
    assert facts.workload_owner(workload()) == "triage"
    for kind, name in (
        ("Job", "triage-a1"),
        ("RayJob", "triage"),
        ("RayJob", "-a1"),
        ("RayJob", "triage-ab"),
    ):
        body = {"metadata": {"ownerReferences": [{"kind": kind, "name": name}]}}
        assert facts.workload_owner(body) is None
    assert facts.workload_owner({}) is None

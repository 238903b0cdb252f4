"""A job in a queue of Kueue: what the queue says, as the job's status tells it.

Kueue owns `suspend` of a RayJob that carries its label: it lets the RayJob run when there is quota, and holds it back
again when somebody else needs that. We only read. Kueue's words: kueue.sigs.k8s.io/docs/concepts/workload.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from finetune_operator.api.finetunejob import Queue
from finetune_operator.core import texts
from finetune_operator.core.conditions import Claim, ConditionType
from finetune_operator.core.facts import Observed, RayJobFacts, WorkloadFacts

ACTIVATE = """--type=merge -p '{"spec":{"active":true}}'"""
WORKLOAD_SECONDS = 10.0  # Kueue makes a Workload within this time if it runs
LOOK_SECONDS = 10.0  # a queue's news arrive as watch events; only the position in it does not
YOUNG_SECONDS = 60.0  # a job that has no position by then gets none: Kueue does not serve them
UNPLACED_LOOK_SECONDS = 30.0
LONGEST_LOOK_SECONDS = 300.0


@dataclass(frozen=True)
class Place:
    """Why the job is held back."""

    reason: str
    message: str
    queue: Queue | None
    """None where no queue holds it back."""


def look(seen: Observed, rayjob: RayJobFacts, *, now: datetime) -> Place:
    """Who holds the RayJob back, and until when."""
    name = rayjob.queue
    if name is None:
        message = f"RayJob {rayjob.name} was suspended by someone else: set its spec.suspend to false"
        return Place("RayJobSuspended", message, None)
    workload = seen.workload
    if workload is None:
        return _without_workload(seen, rayjob, name, now=now)
    reason, message = _why(workload, name, seen.job.namespace)
    queue = Queue(
        name=name,
        position=workload.position,
        workload=workload.name or None,
        reason=reason[:64],
        message=(workload.evicted_message or workload.message)[: texts.LONGEST],
    )
    return Place("Queued" if reason in ("Pending", "Waiting") else reason, message, queue)


def next_look(workload: WorkloadFacts, rayjob: RayJobFacts, *, now: datetime) -> float:
    """Seconds until the position is asked for again: further back it tells less, and more jobs ask for theirs."""
    old = rayjob.created is not None and (now - rayjob.created).total_seconds() >= YOUNG_SECONDS
    if workload.position is None and old:
        return UNPLACED_LOOK_SECONDS
    return min(LONGEST_LOOK_SECONDS, LOOK_SECONDS + (workload.position or 0))


def _without_workload(seen: Observed, rayjob: RayJobFacts, name: str, *, now: datetime) -> Place:
    if not seen.kueue_installed:
        message = (
            f"spec.scheduling.queueName is {name}, and Kueue is not installed (no API group kueue.x-k8s.io): install "
            "it, or create the job again without queueName"
        )
        return Place("KueueUnavailable", message, Queue(name=name, reason="KueueUnavailable"))
    old = rayjob.created is not None and (now - rayjob.created).total_seconds() >= WORKLOAD_SECONDS
    message = f"waits in queue {name} until there is room"
    if old:
        message = (
            f"Kueue has made no Workload for RayJob {rayjob.name}: see that its operator runs and that its "
            "configuration lists the integration ray.io/rayjob"
        )
        return Place("KueueUnavailable", message, Queue(name=name, reason="KueueUnavailable"))
    return Place("Queued", message, Queue(name=name, reason="Waiting"))


def _why(workload: WorkloadFacts, name: str, namespace: str) -> tuple[str, str]:
    """One word and one sentence with the remedy."""
    said = " ".join((workload.evicted_message or workload.message).split()).rstrip(".")
    if not workload.active:
        text = (
            f"Workload {workload.name} was taken out of queue {name}: {said or 'spec.active is false'}; to let it in "
            f"again: kubectl patch workload {workload.name} -n {namespace} {ACTIVATE}"
        )
        return "Deactivated", text
    if workload.evicted:
        text = f"queue {name} took the room away ({workload.evicted}): {said}; it goes on when there is room again"
        return workload.evicted, text + _place(workload)
    if workload.quota_reserved:
        waits = "; ".join(workload.checks) or "its admission checks"
        return "AdmissionChecks", f"queue {name} has reserved the quota and waits for {waits}"
    if "doesn't exist" in said and "LocalQueue" in said:
        text = (
            f"there is no LocalQueue {name} in namespace {namespace}: create it, or create the job again with another "
            "queueName"
        )
        return "QueueMissing", text
    if "doesn't exist" in said or "inactive" in said or "stopped" in said.lower():
        return "QueueInactive", f"queue {name} lets nobody in: {said}; have its ClusterQueue put right"
    if said and workload.reason != "Waiting":
        remedy = "wait, ask for less in spec.resources, or have the quota of the ClusterQueue raised"
        return workload.reason or "Pending", f"waits in queue {name}{_place(workload)}: {said}; {remedy}"
    return workload.reason or "Pending", f"waits in queue {name} until there is room{_place(workload)}"


def _place(workload: WorkloadFacts) -> str:
    return "" if workload.position is None else f" (position {workload.position})"


def claim(workload: WorkloadFacts | None, place: Place) -> Claim:
    """What condition QuotaReserved says while the job is held back."""
    reserved = workload is not None and workload.quota_reserved and not workload.evicted
    return Claim(ConditionType.QUOTA_RESERVED, reserved, place.reason, place.message)


def admitted(rayjob: RayJobFacts) -> list[Claim]:
    """What condition QuotaReserved says of a job that its queue lets run; nothing without a queue."""
    if rayjob.queue is None:
        return []
    return [
        Claim(ConditionType.QUOTA_RESERVED, True, "QuotaReserved", f"queue {rayjob.queue} has let the job in")
    ]

"""The fence between two attempts: no pod and no RayCluster of the job may be left when another attempt starts.

An object that is gone from the API does not mean that its pods are (KubeRay deletes in the background), and a pod
whose node is out of reach may still be writing. So the fence waits for pods themselves, however long that takes, and
says for which.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from finetune_operator.api.finetunejob import Attempt
from finetune_operator.core.facts import RELEASED, DeleteRayJob, Observed, RayJobFacts

FENCE_SECONDS = 2.0
PATIENCE_SECONDS = 60.0  # for KubeRay to take down the cluster of a process that has ended
TOLD_SECONDS = 10.0  # ... to notice that it has; after that, KubeRay may be starting it again (HTTPMode)
ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})  # of a Ray job
STUCK_SECONDS = 120.0
NAMED = 3  # leftovers that are named in a message


@dataclass(frozen=True)
class Fence:
    left: bool
    """Whether something of the attempt may still run."""
    text: str
    """What is waited for, and what to do where that takes too long."""
    actions: Sequence[DeleteRayJob]


def is_stopping_by_itself(seen: Observed) -> bool:
    """Whether nothing has to be done for the attempt's cluster to go away."""
    rayjob = seen.rayjob
    if rayjob is None or not rayjob.ours or rayjob.deployment_status in RELEASED:
        return True
    return rayjob.deployment_status == "Running" and seen.job.status.attempts[-1].exit_code is not None


def patience(rayjob: RayJobFacts) -> float:
    """Seconds from the trainer's last word in which KubeRay should have noticed that it is over."""
    return PATIENCE_SECONDS if rayjob.job_status in ENDED else TOLD_SECONDS


def look(seen: Observed, attempt: Attempt, *, now: datetime) -> Fence:
    """What is left of the job's attempts, and the RayJobs to delete for it to go."""
    age = (now - attempt.end_time).total_seconds() if attempt.end_time else 0.0
    left = [f"RayCluster {name}" for name in seen.clusters]
    left += [f"pod {pod.name}" for pod in seen.pods if not pod.gone]
    waiting, actions = list(left), []
    for rayjob in (seen.rayjob, seen.inspection):
        if rayjob is None or not rayjob.ours:
            continue
        if rayjob.deployment_status in RELEASED and (not left or age < PATIENCE_SECONDS):
            continue  # KubeRay takes its cluster down; the object may stay for people to read
        waiting.append(f"RayJob {rayjob.name}")
        running = rayjob is seen.rayjob and rayjob.deployment_status == "Running"
        told = running and attempt.exit_code is not None
        if rayjob.deleting_since is None and not (told and age < patience(rayjob)):
            actions.append(DeleteRayJob(rayjob.name, rayjob.uid))
    return Fence(left=bool(waiting), text=_text(seen, waiting, now=now), actions=actions)


def _text(seen: Observed, left: Sequence[str], *, now: datetime) -> str:
    if not left:
        return ""
    names = ", ".join(sorted(left)[:NAMED]) + (f" and {len(left) - NAMED} more" if len(left) > NAMED else "")
    text = f"waits until {names} {'is' if len(left) == 1 else 'are'} gone"
    if stuck := _stuck_finalizer(seen.rayjob, now=now):
        return f"{text}; {stuck}"
    nodes = sorted({pod.node for pod in seen.pods if pod.terminating and pod.node and not pod.gone})
    if nodes and _old(seen, now=now):
        text += f"; if node {nodes[0]} is gone for good, delete its pods with --force"
    return text


def _stuck_finalizer(rayjob: RayJobFacts | None, *, now: datetime) -> str:
    """KubeRay keeps its finalizer while it cannot reach the cluster's dashboard; others may have added theirs."""
    if rayjob is None or rayjob.deleting_since is None:
        return ""
    if (now - rayjob.deleting_since).total_seconds() < STUCK_SECONDS:
        return ""
    if not rayjob.known_to_kuberay:
        return (
            f"a finalizer that is not KubeRay's holds RayJob {rayjob.name}, and with it the pods: see whose it is "
            f"(kubectl get rayjob {rayjob.name} -o jsonpath='{{.metadata.finalizers}}') and that its controller runs"
        )
    return (
        f"KubeRay does not let RayJob {rayjob.name} go: see that its operator runs, or remove the finalizer "
        f"ray.io/rayjob-finalizer from it"
    )


def _old(seen: Observed, *, now: datetime) -> bool:
    end = seen.job.status.attempts[-1].end_time
    return end is not None and (now - end).total_seconds() >= STUCK_SECONDS

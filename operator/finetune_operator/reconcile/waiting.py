"""What is read only while a job waits: the events of a pod that is stuck, and Kueue's Workload of a RayJob."""

from __future__ import annotations

import logging
from datetime import datetime

from finetune_operator.adapters.api_errors import ApiError, ForbiddenError
from finetune_operator.adapters.kube import KUEUE_VERSION, Json, Kube
from finetune_operator.adapters.watched import WatchedKube
from finetune_operator.core.facts import JobFacts, PodFacts, RayJobFacts, WorkloadFacts
from finetune_operator.manifests import naming
from finetune_operator.reconcile import facts, pod_facts

logger = logging.getLogger(__name__)


async def observe_pod(kube: Kube, body: Json, *, attempt_start: datetime, now: datetime) -> PodFacts:
    """The facts of a pod. Only one that is stuck is worth a look at its events."""
    pod = pod_facts.pod_facts(body, attempt_start=attempt_start)
    if not pod_facts.is_stuck(pod, now=now):
        return pod
    metadata = body["metadata"]
    try:
        events = await kube.events_about(metadata["namespace"], uid=metadata["uid"])
    except ApiError as error:  # the reason stays unknown; the job goes on
        logger.warning("events of pod %s cannot be read: %s", metadata["name"], error)
        return pod
    return pod_facts.pod_facts(body, attempt_start=attempt_start, warning=pod_facts.newest_warning(events))


async def cluster_problem(kube: Kube, rayjob: RayJobFacts, *, namespace: str) -> str:
    """Why a RayJob has no pod, by KubeRay's words: where its RayCluster or that one's service is refused, it says so
    in events alone."""
    try:
        told = await kube.events_about(namespace, uid=rayjob.uid)
        if rayjob.cluster:
            told += await kube.events_named(namespace, kind="RayCluster", name=rayjob.cluster)
    except ApiError as error:  # the reason stays unknown; the job goes on
        logger.warning("events of RayJob %s cannot be read: %s", rayjob.name, error)
        return ""
    warning = pod_facts.newest_warning(told)
    return str(warning.get("message", "")) if warning else ""


async def observe_submitter(
    kube: WatchedKube, rayjob: RayJobFacts, *, namespace: str, attempt_start: datetime, now: datetime
) -> tuple[PodFacts | None, str]:
    """KubeRay's pod that submits the job (K8sJobMode), or why the Job of the RayJob's name cannot make one. The pod has
    no labels of ours, and of the Job nothing but its events may be read."""
    try:
        found = await kube.find("v1", "Pod", namespace, labels={naming.LABEL_JOB_NAME: rayjob.name})
        if found:
            return await observe_pod(kube, found[0], attempt_start=attempt_start, now=now), ""
        warning = pod_facts.newest_warning(await kube.events_named(namespace, kind="Job", name=rayjob.name))
    except ApiError as error:  # the reason stays unknown; the job goes on
        logger.warning("the submitter of RayJob %s cannot be looked up: %s", rayjob.name, error)
        return None, ""
    return None, str(warning.get("message", "")) if warning else ""


async def observe_workload(kube: Kube, job: JobFacts, rayjob: RayJobFacts) -> WorkloadFacts | None:
    """Kueue's Workload for a RayJob that it holds back, with its place in the queue where Kueue tells it."""
    labels = {naming.LABEL_WORKLOAD_OWNER: rayjob.uid}
    try:
        found = await kube.find(KUEUE_VERSION, "Workload", job.namespace, labels=labels)
    except ForbiddenError as error:  # the job runs all the same; only its place is not known
        logger.warning("Workloads of Kueue cannot be read: %s", error)
        return WorkloadFacts(name="")
    if not found:
        return None
    return facts.workload_facts(found[0], pending=await _pending(kube, job.namespace, rayjob.queue or ""))


async def _pending(kube: Kube, namespace: str, queue: str) -> list[Json]:
    try:
        return await kube.pending_workloads(namespace, queue)
    except ApiError as error:  # an API server of its own, which may be away or not be for us
        logger.debug("the place in queue %s is not known: %s", queue, error)
        return []

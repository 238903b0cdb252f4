"""From the JSON of the API to facts, and back: the border between the wire and the decisions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from finetune_operator.adapters.kube import Json
from finetune_operator.api.base import ACTION_ANNOTATION, StatusModel
from finetune_operator.api.finetunejob import KIND, FineTuneJobSpec, FineTuneJobStatus
from finetune_operator.core.facts import JobFacts, PodFacts, RayJobFacts, UpstreamFacts
from finetune_operator.manifests import naming


def job_facts(body: Json) -> JobFacts:
    """The facts of a FineTuneJob. A spec that an older or newer CRD let through becomes a problem, not an error."""
    metadata = body["metadata"]
    spec: FineTuneJobSpec | None = None
    problem: str | None = None
    try:
        spec = FineTuneJobSpec.model_validate(body.get("spec", {}))
    except ValidationError as error:
        problem = spec_problem(error)
    return JobFacts(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        generation=metadata.get("generation", 1),
        spec=spec,
        problem=problem,
        status=FineTuneJobStatus.model_validate(body.get("status", {})),
        deleting="deletionTimestamp" in metadata,
        action=metadata.get("annotations", {}).get(ACTION_ANNOTATION),
    )


def spec_problem(error: ValidationError) -> str:
    """What is wrong with a spec, field by field."""
    return "; ".join(
        f"spec.{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()
    )


def rayjob_facts(body: Json, *, owner: str, owner_uid: str) -> RayJobFacts:
    """The facts of a RayJob as the FineTuneJob `owner` sees it."""
    metadata, spec, status = body["metadata"], body.get("spec", {}), body.get("status", {})
    owners = metadata.get("ownerReferences", [])
    ours = any(reference["uid"] == owner_uid for reference in owners)
    namesake = any(reference.get("kind") == KIND and reference.get("name") == owner for reference in owners)
    return RayJobFacts(
        name=metadata["name"],
        uid=metadata["uid"],
        ours=ours,
        deployment_status=status.get("jobDeploymentStatus", ""),
        job_status=status.get("jobStatus", ""),
        reason=status.get("reason", ""),
        message=status.get("message", ""),
        of_a_namesake=namesake and not ours,
        created=_time(metadata.get("creationTimestamp")),
        deleting_since=_time(metadata.get("deletionTimestamp")),
        suspended=bool(spec.get("suspend", False)),
        queue=metadata.get("labels", {}).get(naming.LABEL_QUEUE),
        managed_elsewhere=spec.get("managedBy", naming.KUBERAY) != naming.KUBERAY,
        known_to_kuberay=naming.KUBERAY_FINALIZER in metadata.get("finalizers", []),
        cluster_problem=_cluster_problem(status.get("rayClusterStatus", {})),
    )


def _cluster_problem(status: Mapping[str, Any]) -> str:
    """Why a RayCluster's pods cannot be created: its condition ReplicaFailure, or its reason in older KubeRays."""
    for condition in status.get("conditions", []):
        if condition.get("type") == "ReplicaFailure" and condition.get("status") == "True":
            text = str(condition.get("message") or condition.get("reason") or "ReplicaFailure")
            return " ".join(text.split())  # KubeRay puts its reason into a line of its own
    return " ".join(str(status.get("reason", "")).split())


def pod_facts(body: Json, *, attempt_start: datetime | None = None) -> PodFacts:
    """Whether a pod runs and, if not, why: what the scheduler says, or what its containers wait for. It was not
    scheduled before the attempt began, whatever another machine's clock says."""
    metadata, status = body["metadata"], body.get("status", {})
    conditions = {condition["type"]: condition for condition in status.get("conditions", [])}
    containers = status.get("containerStatuses", [])
    disrupted = conditions.get("DisruptionTarget", {})
    scheduled = conditions.get("PodScheduled", {})
    running = status.get("phase") == "Running"
    reason, message = (None, "") if running and not _crashes(containers) else _waiting(scheduled, containers)
    return PodFacts(
        name=metadata["name"],
        running=running,
        waiting_reason=reason,
        waiting_message=message,
        scheduled_at=_scheduled_at(scheduled, attempt_start),
        gone=status.get("phase") in ("Succeeded", "Failed"),
        terminating="deletionTimestamp" in metadata,
        node=body.get("spec", {}).get("nodeName"),
        submitter_exit_code=_submitter_exit_code(containers),
        out_of_memory=any(_ended(container).get("reason") == "OOMKilled" for container in containers),
        disruption=_disruption(disrupted),
    )


def _scheduled_at(scheduled: Mapping[str, Any], attempt_start: datetime | None) -> datetime | None:
    time = _time(scheduled.get("lastTransitionTime")) if scheduled.get("status") == "True" else None
    return max(time, attempt_start) if time and attempt_start else time


def _waiting(scheduled: Mapping[str, Any], containers: Sequence[Mapping[str, Any]]) -> tuple[str | None, str]:
    if scheduled.get("status") == "False":
        return scheduled.get("reason", "Unschedulable"), scheduled.get("message", "")
    for container in containers:
        waiting = container.get("state", {}).get("waiting")
        if waiting and waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
            return waiting["reason"], waiting.get("message", "")
    return None, ""


def _crashes(containers: Sequence[Mapping[str, Any]]) -> bool:
    """A pod whose container waits to be started again still counts as running."""
    return any(c.get("state", {}).get("waiting", {}).get("reason") == "CrashLoopBackOff" for c in containers)


def _ended(container: Mapping[str, Any]) -> Mapping[str, Any]:
    """How a container ended, now or the last time; empty where it never did."""
    for state in (container.get("state", {}), container.get("lastState", {})):
        if ended := state.get("terminated"):
            return dict(ended)
    return {}


def _submitter_exit_code(containers: Sequence[Mapping[str, Any]]) -> int | None:
    for container in containers:
        if container.get("name") == naming.SUBMITTER_CONTAINER:
            code = container.get("state", {}).get("terminated", {}).get("exitCode")
            return None if code is None else int(code)
    return None


def _disruption(condition: Mapping[str, Any]) -> str | None:
    if condition.get("status") != "True":
        return None
    return f"{condition.get('reason', 'Disrupted')}: {condition.get('message', '')}".rstrip(": ")


def upstream_facts(body: Json | None, *, name: str, waits_for: Sequence[str] = ()) -> UpstreamFacts:
    """The facts of the job that another one waits for; `waits_for` are those that it waits for itself."""
    if body is None:
        return UpstreamFacts(name=name, exists=False)
    status = FineTuneJobStatus.model_validate(body.get("status", {}))
    return UpstreamFacts(
        name=name,
        phase=status.phase,
        reason=status.reason,
        artifact=status.artifact,
        waits_for=tuple(waits_for),
        objective=body.get("spec", {}).get("objective"),
    )


def upstream_names(body: Json) -> list[str]:
    """The jobs whose artifacts a FineTuneJob asks for: as its model, and as its reward model."""
    spec = body.get("spec", {})
    references = [(spec.get(part) or {}).get("fineTuneJobRef") or {} for part in ("model", "reward")]
    return [str(reference["name"]) for reference in references if reference.get("name")]


def _time(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


def to_json(status: StatusModel) -> Json:
    """A status as the API stores it: no nulls, times in whole seconds as metav1.Time has them, and no number that JSON
    does not have (NaN and infinities are left out)."""
    dumped = status.model_dump(mode="python", by_alias=True, exclude_none=True)
    plain: Json = _plain(dumped)
    return plain


def _plain(value: Any) -> Any:
    match value:
        case datetime():
            return timestamp(value)
        case dict():
            return {name: _plain(item) for name, item in value.items() if _is_json(item)}
        case list() | tuple():
            return [_plain(item) for item in value]
        case str():
            return str(value)
        case _:
            return value


def _is_json(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def timestamp(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")

"""From the JSON of the API to facts, and back: the border between the wire and the decisions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from finetune_operator.adapters.kube import Json
from finetune_operator.api.base import API_VERSION, StatusModel
from finetune_operator.api.finetunejob import KIND, FineTuneJobSpec, FineTuneJobStatus
from finetune_operator.core.facts import Event, JobFacts, PodFacts, RayJobFacts
from finetune_operator.manifests import naming

EVENT_MESSAGE_BYTES = 1024  # the limit of the API


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
    )


def spec_problem(error: ValidationError) -> str:
    """What is wrong with a spec, field by field."""
    return "; ".join(
        f"spec.{'.'.join(str(part) for part in item['loc'])}: {item['msg']}" for item in error.errors()
    )


def rayjob_facts(body: Json, *, owner_uid: str) -> RayJobFacts:
    metadata, status = body["metadata"], body.get("status", {})
    owners = {reference["uid"] for reference in metadata.get("ownerReferences", [])}
    return RayJobFacts(
        name=metadata["name"],
        uid=metadata["uid"],
        ours=owner_uid in owners,
        deployment_status=status.get("jobDeploymentStatus", ""),
        job_status=status.get("jobStatus", ""),
        reason=status.get("reason", ""),
        message=status.get("message", ""),
    )


def pod_facts(body: Json) -> PodFacts:
    """Whether a pod runs and, if not, why: what the scheduler says, or what its container waits for."""
    status: Mapping[str, Any] = body.get("status", {})
    name = body["metadata"]["name"]
    if status.get("phase") == "Running":
        return PodFacts(name=name, running=True)
    for condition in status.get("conditions", []):
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            return PodFacts(
                name=name,
                running=False,
                waiting_reason=condition.get("reason", "Unschedulable"),
                waiting_message=condition.get("message", ""),
            )
    for container in status.get("containerStatuses", []):
        waiting = container.get("state", {}).get("waiting")
        if waiting and waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
            return PodFacts(
                name=name,
                running=False,
                waiting_reason=waiting["reason"],
                waiting_message=waiting.get("message", ""),
            )
    return PodFacts(name=name, running=False)


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


def event_body(subject: Json, event: Event, *, now: datetime, kind: str = KIND) -> Json:
    """A core/v1 Event about one of our objects, as `kubectl describe` shows it."""
    metadata = subject["metadata"]
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": f"{metadata['name']}.", "namespace": metadata["namespace"]},
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": kind,
            "namespace": metadata["namespace"],
            "name": metadata["name"],
            "uid": metadata["uid"],
        },
        "type": "Warning" if event.warning else "Normal",
        "reason": event.reason,
        "message": event.message.encode()[:EVENT_MESSAGE_BYTES].decode(errors="ignore"),
        "source": {"component": naming.MANAGER},
        "reportingComponent": naming.MANAGER,
        "reportingInstance": naming.MANAGER,
        "firstTimestamp": timestamp(now),
        "lastTimestamp": timestamp(now),
        "count": 1,
    }

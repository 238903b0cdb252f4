"""From the JSON of the API to facts, and back: the border between the wire and the decisions."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from finetune_operator.adapters.kube import Json
from finetune_operator.api.base import ACTION_ANNOTATION, StatusModel
from finetune_operator.api.finetunejob import KIND, FineTuneJobSpec, FineTuneJobStatus
from finetune_operator.core.facts import JobFacts, RayJobFacts, UpstreamFacts, WorkloadFacts
from finetune_operator.manifests import naming

PROBLEMS = 5  # of a spec that are named


Status = TypeVar("Status", bound=StatusModel)


class UnreadableStatusError(Exception):
    """A status that an operator of another version wrote; the message names what is not known in it."""


def job_facts(body: Json) -> JobFacts:
    """The facts of a FineTuneJob. A spec that an older or newer CRD let through becomes a problem, not an error.

    Raises UnreadableStatusError.
    """
    metadata = body["metadata"]
    spec: FineTuneJobSpec | None = None
    problem: str | None = None
    try:
        spec = FineTuneJobSpec.model_validate(body.get("spec", {}))
    except ValidationError as error:
        problem = spec_problem(error)
        with contextlib.suppress(ValidationError):
            spec = FineTuneJobSpec.model_validate(body.get("spec", {}), extra="ignore")
    return JobFacts(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        generation=metadata.get("generation", 1),
        spec=spec,
        problem=problem,
        status=read_status(FineTuneJobStatus, body),
        deleting="deletionTimestamp" in metadata,
        orphans="orphan" in metadata.get("finalizers", []),
        action=metadata.get("annotations", {}).get(ACTION_ANNOTATION),
    )


def read_status(model: type[Status], body: Json) -> Status:
    """The status of one of our objects. Raises UnreadableStatusError: who cannot read what was done must do nothing."""
    try:
        return model.model_validate(body.get("status", {}))
    except ValidationError as error:
        problem = _problem("status", error.errors(include_url=False, include_input=False)[0])
        raise UnreadableStatusError(
            f"{problem}; an operator of another version wrote it: upgrade this one"
        ) from None


def spec_problem(error: ValidationError) -> str:
    """What is wrong with a spec, field by field: the first few, for people read it and a status has its limits."""
    found = error.errors(include_url=False, include_input=False)
    lines = [_problem("spec", item) for item in found[:PROBLEMS]]
    more = [f"and {len(found) - PROBLEMS} more"] if len(found) > PROBLEMS else []
    return "; ".join(lines + more)


def _problem(part: str, error: ErrorDetails) -> str:
    path = ".".join([part, *(str(name) for name in error["loc"])])
    return f"{path[:300]}: {_in_words(error)[:300]}"


def _in_words(error: ErrorDetails) -> str:
    # The API server keeps no field that the CRD does not have.
    unknown = "this field is of a newer CRD than the operator knows: upgrade the operator"
    return unknown if error["type"] == "extra_forbidden" else error["msg"]


def rayjob_facts(body: Json, *, owner: str, owner_uid: str, recorded_uid: str | None = None) -> RayJobFacts:
    """The facts of a RayJob as the FineTuneJob `owner` sees it. One with the `recorded_uid` is the attempt's own, also
    where somebody took its owner reference away: it must not go on training unheeded."""
    metadata, spec, status = body["metadata"], body.get("spec", {}), body.get("status", {})
    owners = metadata.get("ownerReferences", [])
    owned = any(reference["uid"] == owner_uid for reference in owners)
    ours = owned or metadata["uid"] == recorded_uid
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
        created=to_time(metadata.get("creationTimestamp")),
        ended=to_time(status.get("endTime")),
        deleting_since=to_time(metadata.get("deletionTimestamp")),
        suspended=bool(spec.get("suspend", False)),
        queue=metadata.get("labels", {}).get(naming.LABEL_QUEUE),
        managed_elsewhere=spec.get("managedBy", naming.KUBERAY) != naming.KUBERAY,
        known_to_kuberay=naming.KUBERAY_FINALIZER in metadata.get("finalizers", []),
        cluster=status.get("rayClusterName", ""),
        cluster_problem=_cluster_problem(status.get("rayClusterStatus", {})),
    )


def lost_metadata(asked: Json, stored: Json) -> list[str]:
    """What follows and ends a RayJob of ours, and was taken away between our request and the storage."""
    before, after = asked["metadata"], stored["metadata"]
    kept = [owner["uid"] for owner in after.get("ownerReferences", [])]
    lost = [] if before["ownerReferences"][0]["uid"] in kept else ["metadata.ownerReferences"]
    if (after.get("labels") or {}).get(naming.LABEL_JOB) != before["labels"][naming.LABEL_JOB]:
        lost.append(f"metadata.labels[{naming.LABEL_JOB}]")
    return lost


def lost_fields(asked: Json, stored: Json) -> list[str]:
    """What a RayJob must have to run once, and the CRD of an older KubeRay does not know: the API server drops that
    without a word."""
    wanted = ("submissionMode", "backoffLimit", "submitterConfig")
    return [f"spec.{name}" for name in wanted if name in asked["spec"] and name not in stored["spec"]]


def workload_facts(body: Json, *, pending: Sequence[Json] = ()) -> WorkloadFacts:
    """The facts of a Kueue Workload; `pending` are those that wait in its LocalQueue, as the visibility API lists
    them."""
    metadata, spec, status = body["metadata"], body.get("spec", {}), body.get("status", {})
    conditions = {condition["type"]: condition for condition in status.get("conditions", [])}
    quota, evicted = conditions.get("QuotaReserved", {}), conditions.get("Evicted", {})
    gone = evicted.get("status") == "True"
    place = next((item for item in pending if item.get("metadata", {}).get("name") == metadata["name"]), {})
    position = place.get("positionInLocalQueue")
    return WorkloadFacts(
        name=metadata["name"],
        active=spec.get("active", True),
        quota_reserved=quota.get("status") == "True",
        admitted=conditions.get("Admitted", {}).get("status") == "True",
        reason=quota.get("reason", ""),
        message=quota.get("message", ""),
        evicted=evicted.get("reason", "Evicted") if gone else "",
        evicted_message=_eviction(conditions) if gone else "",
        checks=[
            f"{check.get('name')} ({check.get('message') or check.get('state')})"
            for check in status.get("admissionChecks", [])
            if check.get("state") != "Ready"
        ],
        position=None if position is None else int(position) + 1,
    )


def _eviction(conditions: Mapping[str, Mapping[str, Any]]) -> str:
    """Preempted says for whom; Evicted says why in general."""
    preempted = conditions.get("Preempted", {})
    told = preempted if preempted.get("status") == "True" else conditions["Evicted"]
    return str(told.get("message", ""))


def workload_owner(body: Json) -> str | None:
    """The FineTuneJob whose RayJob a Workload may be for, by the names that we give RayJobs; None: not ours."""
    for owner in body.get("metadata", {}).get("ownerReferences", []):
        job, dash, number = str(owner.get("name", "")).rpartition("-a")
        if owner.get("kind") == "RayJob" and dash and job and number.isdecimal():
            return job
    return None


def _cluster_problem(status: Mapping[str, Any]) -> str:
    """Why a RayCluster's pods cannot be created: its condition ReplicaFailure, or its reason in older KubeRays."""
    for condition in status.get("conditions", []):
        if condition.get("type") == "ReplicaFailure" and condition.get("status") == "True":
            text = str(condition.get("message") or condition.get("reason") or "ReplicaFailure")
            return " ".join(text.split())  # KubeRay puts its reason into a line of its own
    return " ".join(str(status.get("reason", "")).split())


def upstream_facts(body: Json | None, *, name: str, waits_for: Sequence[str] = ()) -> UpstreamFacts:
    """The facts of the job that another one waits for; `waits_for` are those that it waits for itself."""
    if body is None:
        return UpstreamFacts(name=name, exists=False)
    status = read_status(FineTuneJobStatus, body)
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
    found = [_inside(body, "spec", part, "fineTuneJobRef", "name") for part in ("model", "reward")]
    return [str(name) for name in found if name]


def _inside(value: Any, *path: str) -> Any:
    """What lies at the path; None where the object is of another shape, as one of another version may be."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def to_time(text: str | None) -> datetime | None:
    """A time of the API (RFC 3339), where there is one."""
    return datetime.fromisoformat(text) if text else None


def to_json(status: StatusModel) -> Json:
    """A status as the API stores it: no nulls, times in whole seconds as metav1.Time has them, and no number that JSON
    does not have (NaN and infinities are left out)."""
    dumped = status.model_dump(mode="python", by_alias=True, exclude_none=True)
    plain: Json = _plain(dumped)
    return plain


def _plain(value: Any) -> Any:
    match value:
        case str():  # most of them
            return str(value)
        case dict():
            return {name: _plain(item) for name, item in value.items() if _is_json(item)}
        case list() | tuple():
            return [_plain(item) for item in value]
        case datetime():
            return timestamp(value)
        case _:
            return value


def _is_json(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def timestamp(time: datetime) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ")

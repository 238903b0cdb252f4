"""From the JSON of pods and of events about them to facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from finetune_operator.adapters.kube import Json
from finetune_operator.core.facts import PodFacts
from finetune_operator.manifests import naming
from finetune_operator.reconcile.facts import to_time

CRASHING = "CrashLoopBackOff"
SCHEDULING = frozenset({"FailedScheduling", "FailedScaleUp"})  # reasons of Events before a pod has its node
STUCK_SECONDS = 5.0  # a pod with a node that says nothing for this long: its events are asked for


def pod_facts(body: Json, *, attempt_start: datetime | None = None, warning: Json | None = None) -> PodFacts:
    """Whether a pod runs and, if not, why: what the scheduler says, what its containers wait for, or else the newest
    `warning` (core/v1 Event) about it, which is where a kubelet tells of volumes that it cannot mount. It was not
    made or scheduled before the attempt began, whatever another machine's clock says."""
    metadata, status = body["metadata"], body.get("status", {})
    conditions = {condition["type"]: condition for condition in status.get("conditions", [])}
    containers = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
    disrupted = conditions.get("DisruptionTarget", {})
    scheduled = conditions.get("PodScheduled", {})
    running = status.get("phase") == "Running"
    waits = not running or _crashes(containers)
    reason, message, container = _waiting(scheduled, containers) if waits else (None, "", None)
    if reason is None and warning is not None and not running:
        reason, message = str(warning.get("reason", "")) or None, str(warning.get("message", ""))
    return PodFacts(
        name=metadata["name"],
        running=running,
        waiting_reason=reason,
        waiting_message=message,
        waiting_container=container,
        beside=_beside(body.get("spec", {})) if reason == "Unschedulable" else "",
        created=_not_before(attempt_start, to_time(metadata.get("creationTimestamp"))),
        scheduled_at=_not_before(attempt_start, _scheduled_at(scheduled)),
        gone=status.get("phase") in ("Succeeded", "Failed"),
        terminating="deletionTimestamp" in metadata,
        node=body.get("spec", {}).get("nodeName"),
        submitter_exit_code=_submitter_exit_code(containers),
        out_of_memory=any(_is_out_of_memory(container) for container in containers),
        restarted=next(
            (_last_end(one) for one in containers if one.get("name") == naming.HEAD_CONTAINER), ""
        ),
        disruption=_disruption(disrupted),
    )


def is_stuck(pod: PodFacts, *, now: datetime) -> bool:
    """Whether a pod has a node and does not start, and does not say why: its events may."""
    silent = not pod.running and not pod.gone and pod.waiting_reason is None
    return (
        silent and pod.scheduled_at is not None and (now - pod.scheduled_at).total_seconds() >= STUCK_SECONDS
    )


def newest_warning(events: Sequence[Json]) -> Json | None:
    """The latest Event that tells of trouble. A pod that is asked about has its node: what kept it from one is past."""
    warnings = [
        event for event in events if event.get("type") == "Warning" and event.get("reason") not in SCHEDULING
    ]
    return max(warnings, key=_event_time, default=None)


def _event_time(event: Mapping[str, Any]) -> str:
    """When it was last seen, as text that sorts (RFC 3339 in UTC); two generations of Event name it differently."""
    series = event.get("series") or {}
    times = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"))
    return next((str(time) for time in times if time), "")


def _scheduled_at(scheduled: Mapping[str, Any]) -> datetime | None:
    return to_time(scheduled.get("lastTransitionTime")) if scheduled.get("status") == "True" else None


def _not_before(attempt_start: datetime | None, time: datetime | None) -> datetime | None:
    return max(time, attempt_start) if time and attempt_start else time


def _waiting(
    scheduled: Mapping[str, Any], containers: Sequence[Mapping[str, Any]]
) -> tuple[str | None, str, str | None]:
    if scheduled.get("status") == "False":
        return scheduled.get("reason", "Unschedulable"), scheduled.get("message", ""), None
    for container in containers:
        waiting = container.get("state", {}).get("waiting")
        if waiting and waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
            ended = _last_end(container) if waiting["reason"] == CRASHING else ""
            return waiting["reason"], ended or waiting.get("message", ""), container.get("name")
    return None, "", None


def _beside(spec: Mapping[str, Any]) -> str:
    """Init containers count where they run beside the others; those that end before have what is free then."""
    stay = [one for one in spec.get("initContainers", []) if one.get("restartPolicy") == "Always"]
    others = [one for one in (*spec.get("containers", []), *stay) if one["name"] != naming.HEAD_CONTAINER]
    asked = [(one["name"], one.get("resources", {}).get("requests", {})) for one in others]
    return "; ".join(
        f"its container {name} asks for {', '.join(f'{amount} {what}' for what, amount in requests.items())} more"
        for name, requests in asked
        if requests
    )


def _last_end(container: Mapping[str, Any]) -> str:
    """How a container ended that is to be started again. The kubelet's own message tells only for how long it waits."""
    ended = container.get("lastState", {}).get("terminated")
    if not ended:
        return ""
    told = f"{ended.get('reason', 'Error')}, exit code {ended.get('exitCode')}"
    return f"{told}: {ended['message']}" if ended.get("message") else told


def _crashes(containers: Sequence[Mapping[str, Any]]) -> bool:
    """A pod whose container waits to be started again still counts as running."""
    return any(c.get("state", {}).get("waiting", {}).get("reason") == CRASHING for c in containers)


def _ended(container: Mapping[str, Any]) -> Mapping[str, Any]:
    """How a container ended, now or the last time; empty where it never did."""
    for state in (container.get("state", {}), container.get("lastState", {})):
        if ended := state.get("terminated"):
            return dict(ended)
    return {}


def _is_out_of_memory(container: Mapping[str, Any]) -> bool:
    """Only the trainer's own: one that a platform adds, a proxy or an agent, has its own memory, and more for the
    trainer helps it not."""
    return container.get("name") == naming.HEAD_CONTAINER and _ended(container).get("reason") == "OOMKilled"


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

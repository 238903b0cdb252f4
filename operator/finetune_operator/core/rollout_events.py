"""Announcements: what a change of the status is worth telling, as an Event for `kubectl describe` and as alerts.

Everything follows from the stored status and the new one, so each transition is announced once. It is announced in
the status itself, so it is told once too: see `reconcile.announcements`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import datetime

from finetune_operator.api.adapterdeployment_status import (
    AdapterDeploymentStatus,
    Announcement,
    CompletionStatus,
    PauseReason,
    Stage,
)
from finetune_operator.api.adapterdeployment_strategy import Severity
from finetune_operator.core import rollout_conditions as conditions
from finetune_operator.core.rollout_facts import DeploymentFacts

MAX_ANNOUNCEMENTS = 16
MAX_MESSAGE = 1000
CONDITIONS = {
    # Conditions whose fall is told, with how bad that is for whom; the others only explain.
    "Available": Severity.ERROR,
    "CapacityOK": Severity.WARN,
    "BaseModelCompatible": Severity.WARN,
    "MetricsAvailable": Severity.INFO,
    "RoutesStored": Severity.WARN,
}
ALARMS = frozenset({"CandidateLost", conditions.NOT_PUBLISHED, conditions.NOT_REPLACED, "RoutersBehind"})
"""Reasons of TrafficRouted and Available that are told whenever they come; the others of TrafficRouted are ordinary and
over in a moment."""


@dataclass(frozen=True)
class Happening:
    """A transition that is worth telling."""

    severity: Severity
    reason: str
    message: str


def announce(
    deployment: DeploymentFacts, new: AdapterDeploymentStatus, *, now: datetime
) -> list[Announcement]:
    """What the change from the stored status to the new one is worth telling."""
    return [
        Announcement(
            name=_event_name(deployment, happening, now=now),
            time=now,
            severity=happening.severity,
            reason=happening.reason,
            message=happening.message[:MAX_MESSAGE],
        )
        for happening in happenings(deployment.status, new)
    ]


def outbox(
    stored: AdapterDeploymentStatus, fresh: list[Announcement], *, told: frozenset[str]
) -> list[Announcement]:
    """What is not told yet, oldest first. Of more than the status may hold the newest count."""
    waiting = {item.name: item for item in stored.announcements if item.name not in told}
    waiting |= {item.name: item for item in fresh}
    return list(waiting.values())[-MAX_ANNOUNCEMENTS:]


def _event_name(deployment: DeploymentFacts, happening: Happening, *, now: datetime) -> str:
    """The same for the same transition, whoever tells it."""
    what = "\0".join((deployment.uid, now.isoformat(), happening.reason, happening.message))
    return f"{deployment.name[:200]}.{hashlib.sha256(what.encode()).hexdigest()[:16]}"


def happenings(old: AdapterDeploymentStatus, new: AdapterDeploymentStatus) -> list[Happening]:
    return [
        *_beginning(old, new),
        *_endings(old, new),
        *_position(old, new),
        *_pauses(old, new),
        *_conditions(old, new),
        *_action(old, new),
    ]


def _beginning(old: AdapterDeploymentStatus, new: AdapterDeploymentStatus) -> list[Happening]:
    began = new.rollout_start_time
    if began is None or began == old.rollout_start_time or new.candidate_revision is None:
        return []
    beside = f" beside {new.stable_revision}" if new.stable_revision else ", the first revision"
    return [Happening(Severity.INFO, "RolloutStarted", f"rollout of {new.candidate_revision}{beside}")]


def _endings(old: AdapterDeploymentStatus, new: AdapterDeploymentStatus) -> list[Happening]:
    if new.abort is not None and (old.abort is None or old.abort.at != new.abort.at):
        return [
            Happening(Severity.ERROR, str(new.abort.reason), f"{new.abort.revision}: {new.abort.message}")
        ]
    if new.history and new.history[:1] != old.history[:1]:
        entry = new.history[0]
        if entry.completion_status is not CompletionStatus.ABORTED:
            return [Happening(Severity.INFO, str(entry.completion_status), entry.message or entry.revision)]
    ending = new.completion_status
    if not new.history and ending not in (None, CompletionStatus.ABORTED, old.completion_status):
        # revisionHistoryLimit: 0 keeps no entry to tell of.
        return [Happening(Severity.INFO, str(ending), f"{new.stable_revision} serves everybody")]
    return []


def _position(old: AdapterDeploymentStatus, new: AdapterDeploymentStatus) -> list[Happening]:
    where = (new.stage, new.current_step_index, new.candidate_revision)
    if new.stage is None or where == (old.stage, old.current_step_index, old.candidate_revision):
        return []
    if new.stage in (Stage.ABORTING, Stage.FINALISING, Stage.LOADING):
        return []  # told by their own names already
    reason = {Stage.SUCCEEDED: "Succeeded", Stage.FAILED: "RolledBack"}.get(new.stage, str(new.stage))
    text = f"step {new.step}" if new.step else f"stage {new.stage}"
    if new.stage is Stage.INITIALIZING:
        reason, text = new.reason or reason, new.message or text
    return [Happening(Severity.INFO, reason, text)]


def _pauses(old: AdapterDeploymentStatus, new: AdapterDeploymentStatus) -> list[Happening]:
    before = {(pause.reason, pause.start_time) for pause in old.pause_conditions}
    fresh = [pause for pause in new.pause_conditions if (pause.reason, pause.start_time) not in before]
    told = []
    for pause in fresh:
        by_hand = pause.reason is PauseReason.USER_PAUSE
        severity = Severity.INFO if pause.is_timed or by_hand else Severity.WARN
        told.append(Happening(severity, str(pause.reason), pause.message))
    return told


def _conditions(old: AdapterDeploymentStatus, new: AdapterDeploymentStatus) -> list[Happening]:
    before = {condition.type: condition for condition in old.conditions}
    told = []
    for condition in new.conditions:
        known = before.get(condition.type)
        fell = condition.status == "False" and known is not None and known.status != "False"
        alarm = condition.reason in ALARMS and (known is None or known.reason != condition.reason)
        if condition.type in ("TrafficRouted", "Available") and alarm:
            told.append(Happening(Severity.WARN, condition.reason, condition.message))
        severity = CONDITIONS.get(condition.type)
        if severity is not None and fell:
            told.append(Happening(severity, condition.reason, condition.message))
        said = known is not None and (known.status, known.message) == ("True", condition.message)
        if condition.type == "InvalidSpec" and condition.status == "True" and not said:
            told.append(Happening(Severity.WARN, condition.reason, condition.message))
    return told


def _action(old: AdapterDeploymentStatus, new: AdapterDeploymentStatus) -> list[Happening]:
    taken, known = new.last_action, old.last_action
    if taken is None or not taken.message:
        return []
    again = known is None or (taken.pending and not known.pending)
    if not again and known is not None and (known.value, known.message) == (taken.value, taken.message):
        return []
    reason, severity = ("ActionRefused", Severity.WARN) if taken.refused else ("ActionTaken", Severity.INFO)
    return [Happening(severity, reason, f"{taken.value}: {taken.message}")]

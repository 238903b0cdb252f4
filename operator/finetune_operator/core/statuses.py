"""The next status out of the known one, and the events that its change is worth."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from finetune_operator.api.base import Condition
from finetune_operator.api.finetunejob import Attempt, Effective, FineTuneJobStatus, Phase
from finetune_operator.core import conditions, texts
from finetune_operator.core.conditions import Claim, ConditionType
from finetune_operator.core.facts import Event, Observed

FINAL_PHASES = frozenset({Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED})
UNTOLD = frozenset({"Accepted", "Submitting"})  # what follows within moments tells the same
QUIET = frozenset(
    {
        "Accepted",
        "Provisioning",
        "Starting",
        "Queued",
        "WaitingForModel",
        "Stopping",
        "Resumed",
        "RayJobNotCreated",
        "Checked",
    }
)


def build(
    seen: Observed,
    phase: Phase | None,
    reason: str,
    message: str,
    *,
    claims: Sequence[Claim],
    now: datetime,
    **updates: Any,
) -> FineTuneJobStatus:
    """The known status with what changes. `phase` None: it stays."""
    known, generation = seen.job.status, seen.job.generation
    phase = phase or known.phase
    at_rest = phase in FINAL_PHASES or phase is Phase.SUSPENDED
    summary = conditions.kstatus(
        reconciling=not at_rest, stalled=phase is Phase.FAILED, reason=reason, message=message
    )
    return known.model_copy(
        update={
            "observed_generation": generation,
            "phase": phase,
            "reason": reason,
            "message": message[: texts.LONGEST],
            "queue": None,  # whoever has a place in one says so
            "conditions": conditions.merge(
                known.conditions, [*claims, *summary], now=now, generation=generation
            ),
            **updates,
        }
    )


def with_last(attempts: Sequence[Attempt], **updates: Any) -> list[Attempt]:
    """The attempts with the last one updated; None means that nothing new is known."""
    known = {name: value for name, value in updates.items() if value is not None}
    return [*attempts[:-1], attempts[-1].model_copy(update=known)]


def rayjob_uid(seen: Observed) -> dict[str, str | None]:
    return {"uid": seen.rayjob.uid if seen.rayjob and seen.rayjob.ours else None}


def condition(status: FineTuneJobStatus, kind: ConditionType) -> Condition | None:
    return next((condition for condition in status.conditions if condition.type == kind), None)


def holds_since(status: FineTuneJobStatus, kind: ConditionType) -> datetime | None:
    """Since when the condition has been True; None where it is not."""
    found = condition(status, kind)
    return found.last_transition_time if found and found.status == "True" else None


def latest_time(status: FineTuneJobStatus) -> datetime | None:
    """The latest moment of the past that the status tells of; None where it tells of none."""
    times = [condition.last_transition_time for condition in status.conditions]
    times += [attempt.end_time or attempt.start_time for attempt in status.attempts]
    times += [time for time in (status.start_time, status.completion_time) if time]
    return max(times, default=None)


def merge_effective(known: Effective | None, told: Effective | None) -> Effective | None:
    if told is None:
        return known
    ours = {"output_uri", "image", "model_uri", "checkpoint_uri", "adapter", "reward"}
    new = told.model_dump(exclude_none=True, exclude=ours)
    return (known or Effective()).model_copy(update=new)


def events(old: FineTuneJobStatus, new: FineTuneJobStatus) -> list[Event]:
    """One event per transition: when the phase or the reason within it changes, or an action was refused."""
    told: list[Event] = []
    action = new.last_action
    if action is not None and action != old.last_action:
        told.append(Event(action.refused, "ActionRefused" if action.refused else "Action", action.message))
    if (old.phase, old.reason) == (new.phase, new.reason) or new.reason is None or new.reason in UNTOLD:
        return told
    waits = new.phase in (Phase.PENDING, Phase.PROVISIONING, Phase.QUEUED) and new.reason not in QUIET
    failed = new.phase is Phase.RETRYING and new.reason not in QUIET | {"Preempted", "Suspended"}
    warning = new.phase is Phase.FAILED or waits or failed or new.reason == "TrainerSilent"
    return [*told, Event(warning=warning, reason=new.reason, message=new.message or "")]

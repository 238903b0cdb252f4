"""The next status out of the known one, and the events that its change is worth."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from finetune_operator.api.finetunejob import Attempt, Effective, FineTuneJobStatus, Phase
from finetune_operator.core import conditions
from finetune_operator.core.conditions import Claim
from finetune_operator.core.facts import Event, Observed


def build(
    seen: Observed,
    phase: Phase,
    reason: str,
    message: str,
    *,
    claims: Sequence[Claim],
    now: datetime,
    **updates: Any,
) -> FineTuneJobStatus:
    known, generation = seen.job.status, seen.job.generation
    return known.model_copy(
        update={
            "observed_generation": generation,
            "phase": phase,
            "reason": reason,
            "message": message,
            "conditions": conditions.merge(known.conditions, claims, now=now, generation=generation),
            **updates,
        }
    )


def with_last(attempts: Sequence[Attempt], **updates: Any) -> list[Attempt]:
    """The attempts with the last one updated; None means that nothing new is known."""
    known = {name: value for name, value in updates.items() if value is not None}
    return [*attempts[:-1], attempts[-1].model_copy(update=known)]


def rayjob_uid(seen: Observed) -> dict[str, str | None]:
    return {"uid": seen.rayjob.uid if seen.rayjob and seen.rayjob.ours else None}


def merge_effective(known: Effective | None, told: Effective | None) -> Effective | None:
    if told is None:
        return known
    new = told.model_dump(exclude_none=True, exclude={"output_uri", "image"})
    return (known or Effective()).model_copy(update=new)


def events(old: FineTuneJobStatus, new: FineTuneJobStatus) -> list[Event]:
    """One event per transition: when the phase or the reason within it changes."""
    if (old.phase, old.reason) == (new.phase, new.reason) or new.reason is None:
        return []
    warning = new.phase is Phase.FAILED or (
        new.phase in (Phase.PENDING, Phase.PROVISIONING) and new.reason not in ("Accepted", "Provisioning")
    )
    return [Event(warning=warning, reason=new.reason, message=new.message or "")]

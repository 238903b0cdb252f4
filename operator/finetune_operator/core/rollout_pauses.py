"""Why a rollout waits, and the clocks that stand still meanwhile."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TypeVar

from pydantic import BaseModel

from finetune_operator.api.adapterdeployment_status import (
    AdapterDeploymentStatus,
    PauseCondition,
    PauseReason,
)
from finetune_operator.core import texts
from finetune_operator.core.rollout_turns import Turn

Part = TypeVar("Part", bound=BaseModel)
OWN = frozenset(
    {
        PauseReason.CANARY_PAUSE_STEP,
        PauseReason.AWAITING_APPROVAL,
        PauseReason.INCONCLUSIVE_ANALYSIS,
        PauseReason.INSUFFICIENT_SAMPLES,
    }
)
"""What a step itself waits for; everything else holds the step."""
BY_SPEC = "spec.paused is true: set it to false to go on (the guardrails stay armed)"
BY_VERB = "paused by hand: say `resume` to go on (the guardrails stay armed)"
BY_BOTH = (
    "spec.paused is true, and paused by hand: set it to false and say `resume` (the guardrails stay armed)"
)


def add(turn: Turn, reason: PauseReason, message: str) -> Turn:
    """A pause that is known already keeps its time."""
    known = turn.status.pause_conditions
    old = next((pause for pause in known if pause.reason is reason), None)
    new = PauseCondition(
        reason=reason, message=message[: texts.LONGEST], start_time=old.start_time if old else turn.now
    )
    others = [pause for pause in known if pause.reason is not reason]
    index = known.index(old) if old else len(known)
    return turn.update(pause_conditions=[*others[:index], new, *others[index:]])


def remove(turn: Turn, *reasons: PauseReason) -> Turn:
    left = [pause for pause in turn.status.pause_conditions if pause.reason not in reasons]
    if len(left) == len(turn.status.pause_conditions):
        return turn
    return turn.update(pause_conditions=left)


def has(turn: Turn, reason: PauseReason) -> bool:
    return any(pause.reason is reason for pause in turn.status.pause_conditions)


def holding(turn: Turn) -> list[PauseCondition]:
    """Pauses that keep the step from going on."""
    return [pause for pause in turn.status.pause_conditions if pause.reason not in OWN]


def by_hand(turn: Turn) -> bool:
    """Whether somebody said `pause`, whatever spec says beside."""
    return any(pause.message in (BY_VERB, BY_BOTH) for pause in turn.status.pause_conditions)


def follow_spec(turn: Turn) -> Turn:
    """UserPause while spec.paused is true; one that was asked for by `pause` stays until `resume`."""
    if turn.spec.paused and turn.underway:
        return add(turn, PauseReason.USER_PAUSE, BY_BOTH if by_hand(turn) else BY_SPEC)
    if by_hand(turn):
        return add(turn, PauseReason.USER_PAUSE, BY_VERB)
    return remove(turn, PauseReason.USER_PAUSE)


# ---------------------------------------------------------------- clocks


def not_ahead(status: AdapterDeploymentStatus, now: datetime) -> AdapterDeploymentStatus:
    """Begins that are still to come count as now: the clock was set back, or this machine's is behind that of the
    operator before, and what waits would wait longer by the difference."""
    weights = status.weights
    parts = {
        "weights": weights and _reached(weights, now, "pending_since"),
        "pause_conditions": [_reached(pause, now, "start_time") for pause in status.pause_conditions],
        "conditions": [_reached(condition, now, "last_transition_time") for condition in status.conditions],
    }
    clocks = ("stage_start_time", "step_start_time", "last_progress_time", "evidence_missing_since")
    return _reached(status, now, *clocks).model_copy(update=parts)


def _reached(part: Part, now: datetime, *clocks: str) -> Part:
    ahead = [name for name in clocks if (moment := getattr(part, name)) is not None and moment > now]
    return part.model_copy(update=dict.fromkeys(ahead, now)) if ahead else part


def stopped_since(status: AdapterDeploymentStatus) -> datetime | None:
    """Since when the step's time has not counted: something else holds the rollout, the routers do not do what was
    recorded, or the spec cannot be read."""
    times = [pause.start_time for pause in status.pause_conditions if pause.reason not in OWN]
    times += [
        condition.last_transition_time
        for condition in status.conditions
        if (condition.type, condition.status) == ("TrafficRouted", "False")
        or (condition.type, condition.reason) == ("InvalidSpec", "InvalidSpec")
    ]
    return min(times, default=None)


def shift_clocks(turn: Turn) -> Turn:
    """Move the step's begin (and the deadline's) by the time that did not count, when it is over."""
    before, after = stopped_since(turn.before), stopped_since(turn.status)
    if before is None or before == after:
        return turn
    until = after or turn.now
    return turn.update(
        step_start_time=_moved(turn.status.step_start_time, since=before, until=until),
        last_progress_time=_moved(turn.status.last_progress_time, since=before, until=until),
    )


def _moved(moment: datetime | None, *, since: datetime, until: datetime) -> datetime | None:
    if moment is None:
        return None
    return moment + max(timedelta(0), until - max(since, moment))

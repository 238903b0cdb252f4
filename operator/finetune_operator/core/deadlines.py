"""Clocks of a job: for its start, for its silence and for all of it."""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_operator.api.finetunejob import Attempt, ErrorClass
from finetune_operator.core import statuses
from finetune_operator.core.conditions import ConditionType
from finetune_operator.core.facts import Observed

HEARING_SECONDS = 60  # an operator that has just started gives trainers this long to be heard


def exceeded(seen: Observed, attempt: Attempt | None, *, now: datetime) -> str | None:
    """Which deadline for the whole job or for the attempt's start is over, as a sentence; None: neither is."""
    spec = seen.job.spec
    if spec is None or spec.suspend:
        return None
    total = spec.deadlines.total_seconds
    end = total_end(seen)
    if end is not None and now >= end:
        return f"spec.deadlines.totalSeconds ({total}) are over"
    start = spec.deadlines.start_seconds
    end = start_end(seen, attempt) if attempt else None
    if end is not None and now >= end:
        return f"spec.deadlines.startSeconds ({start}) are over and the trainer has not reported yet"
    return None


def told(seen: Observed, *, now: datetime) -> str:
    """That the job's time is over, behind how its last attempt ended; empty where that says it already."""
    over = exceeded(seen, None, now=now)
    said = seen.job.status.attempts[-1].error_class is ErrorClass.DEADLINE_EXCEEDED
    return f"; {over}" if over and not said else ""


def total_end(seen: Observed) -> datetime | None:
    """When the job has used its time; what it was suspended does not count."""
    status, spec = seen.job.status, seen.job.spec
    if spec is None or spec.deadlines.total_seconds is None or status.start_time is None:
        return None
    return status.start_time + timedelta(
        seconds=spec.deadlines.total_seconds + (status.suspended_seconds or 0)
    )


def start_end(seen: Observed, attempt: Attempt) -> datetime | None:
    """When the trainer of this attempt must have reported; None where it has, or need not."""
    spec = seen.job.spec
    if spec is None or spec.deadlines.start_seconds is None or last_heard(seen, attempt) is not None:
        return None
    end = attempt.start_time + timedelta(seconds=spec.deadlines.start_seconds)
    return _not_before_hearing(seen, end)


def silent_since(seen: Observed, attempt: Attempt) -> datetime | None:
    """The last sign of life of an attempt whose pod runs, as far as this operator could hear one."""
    running = statuses.holds_since(seen.job.status, ConditionType.RESOURCES_READY)
    if running is None:
        return None
    signs = [running, last_heard(seen, attempt), seen.listening_since]
    return max(sign for sign in signs if sign)


def silent_end(seen: Observed, attempt: Attempt) -> datetime | None:
    """When an attempt whose pod runs counts as stalled."""
    spec, since = seen.job.spec, silent_since(seen, attempt)
    if spec is None or since is None:
        return None
    return since + timedelta(seconds=spec.deadlines.stall_seconds)


def last_heard(seen: Observed, attempt: Attempt) -> datetime | None:
    """When the attempt's trainer last reported; None: not yet."""
    if seen.reported_at is not None:
        return seen.reported_at
    progress = seen.job.status.progress
    stored = progress.last_report_time if progress else None
    return stored if stored is not None and stored >= attempt.start_time else None


def next_check(seen: Observed, attempt: Attempt, *, now: datetime, most: float) -> float:
    """Seconds until a deadline of the job is due, at most `most`."""
    ends = [total_end(seen), start_end(seen, attempt), silent_end(seen, attempt)]
    waits = [(end - now).total_seconds() for end in ends if end is not None]
    return max(0.1, min([most, *waits]))


def _not_before_hearing(seen: Observed, end: datetime) -> datetime:
    if seen.listening_since is None:
        return end
    return max(end, seen.listening_since + timedelta(seconds=HEARING_SECONDS))

"""spec.suspend: nothing runs until it is false again, and that time does not count."""

from __future__ import annotations

from datetime import datetime

from finetune_operator.api.finetunejob import Phase
from finetune_operator.core import statuses, words
from finetune_operator.core.conditions import Claim, ConditionType
from finetune_operator.core.facts import Observed, Plan


def suspended(seen: Observed, *, now: datetime) -> Plan:
    """Nothing runs, and nothing will until spec.suspend is false."""
    message = "spec.suspend is true; set it to false to go on" + words.from_where(seen)
    status = statuses.build(
        seen,
        Phase.SUSPENDED,
        "Suspended",
        message,
        claims=[
            Claim(ConditionType.SUSPENDED, True, "Suspended", message),
            Claim(ConditionType.RESOURCES_READY, False, "Suspended", message),
        ],
        now=now,
    )
    return Plan(status=status)


def resumed(seen: Observed, *, now: datetime) -> Observed:
    """The facts with the suspension, which is over, in the books: its time does not count against the deadline."""
    known = seen.job.status
    since = statuses.holds_since(known, ConditionType.SUSPENDED)
    if since is None:
        return seen
    seconds = (known.suspended_seconds or 0) + max(0, round((now - since).total_seconds()))
    status = statuses.build(
        seen,
        Phase.RETRYING if known.attempts else Phase.PENDING,
        "Resumed",
        "spec.suspend is false: the job goes on",
        claims=[Claim(ConditionType.SUSPENDED, False, "Resumed", "spec.suspend is false")],
        now=now,
        suspended_seconds=seconds if known.start_time else None,
    )
    return seen.with_status(status)

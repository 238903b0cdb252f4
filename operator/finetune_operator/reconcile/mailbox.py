"""The latest report of each running attempt, between the endpoint that takes it and the pass that writes it down."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import datetime

from finetune_operator.core.reports import Report
from finetune_operator.reconcile import clocks
from finetune_operator.reconcile.queue import Key

OVERTAKEN_SECONDS = 60.0  # more than the endpoint lets a request take


@dataclass
class _Slot:
    attempt: int
    report: Report
    received: datetime
    written: asyncio.Event = field(default_factory=asyncio.Event)


class Mailbox:
    """One slot per job, by its UID: a trainer of a deleted job says nothing about one that has its name now. A result
    is never displaced by progress that was overtaken on its way, nor a report of the present attempt by one of an
    attempt that is over."""

    def __init__(self) -> None:
        self._slots: dict[Key, dict[str, _Slot]] = {}
        self._last_write: dict[Key, float] = {}

    def put(self, key: Key, *, uid: str, attempt: int, report: Report) -> bool:
        """Keep the report; False where it comes too late: the attempt's result is there, or a later attempt reports."""
        slot = self._find(key, uid)
        if slot and slot.attempt == attempt and slot.report.result and not report.result:
            return False
        if slot and slot.attempt > attempt:
            return False
        if slot and slot.attempt == attempt and _is_older(report, slot.report):
            return True
        self._slots.setdefault(key, {})[uid] = _Slot(attempt, report, clocks.CLOCK())
        return True

    def latest(self, key: Key, *, uid: str, attempt: int) -> tuple[Report, datetime] | tuple[None, None]:
        """The attempt's latest report and when it came."""
        slot = self._find(key, uid)
        return (slot.report, slot.received) if slot and slot.attempt == attempt else (None, None)

    def is_news(self, key: Key, report: Report, *, uid: str) -> bool:
        """Whether the report must be written at once: a result, or another phase than the last one."""
        slot = self._find(key, uid)
        return (
            slot is None or report.result is not None or slot.report.finetune.phase != report.finetune.phase
        )

    def seconds_since_write(self, key: Key) -> float:
        now = asyncio.get_running_loop().time()
        return now - self._last_write.get(key, float("-inf"))

    def mark_written(self, key: Key, report: Report, *, uid: str) -> None:
        """The status that holds the report is stored: whoever waits for that may go on."""
        self._last_write[key] = asyncio.get_running_loop().time()
        slot = self._find(key, uid)
        if slot and slot.report is report:
            slot.written.set()

    async def wait_written(self, key: Key, report: Report, *, uid: str, seconds: float) -> bool:
        """Wait until the report is in the stored status; False when that did not happen in time."""
        slot = self._find(key, uid)
        if slot is None or slot.report is not report:
            return False
        try:
            await asyncio.wait_for(slot.written.wait(), timeout=seconds)
        except TimeoutError:
            return False
        return True

    def _find(self, key: Key, uid: str) -> _Slot | None:
        return self._slots.get(key, {}).get(uid)

    def drop(self, key: Key, report: Report, *, uid: str) -> None:
        """The report is dealt with, and another one of the same attempt may follow, be it a result or not."""
        slot = self._find(key, uid)
        if slot and slot.report is report:
            del self._slots[key][uid]

    def forget(self, key: Key) -> None:
        self._slots.pop(key, None)
        self._last_write.pop(key, None)


def _is_older(report: Report, known: Report) -> bool:
    """Whether progress was overtaken on its way, by the trainer's own clock. Where that says more than a request can
    take, it was set back, or the process began again on a node whose clock is behind: silence would be held against a
    trainer that is at work."""
    sent, latest = report.trainer_status.last_updated_time, known.trainer_status.last_updated_time
    if report.result is not None or sent is None or latest is None:
        return False
    return 0 < (latest - sent).total_seconds() <= OVERTAKEN_SECONDS

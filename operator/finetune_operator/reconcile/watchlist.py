"""Which deployments want to be woken by what: a FineTuneJob that changes, a poll that brings new counters.

A rollback does not wait for `analysis.interval`: guardrails are looked at after every poll, from memory.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from finetune_operator.reconcile.fleet import Fleet
from finetune_operator.reconcile.followers import Followers
from finetune_operator.reconcile.queue import Key

EARLY_SECONDS = 0.1  # a poll that comes this little before the interval is over is not waited out


class Watchlist:
    """`wake` asks for a pass over a deployment."""

    def __init__(self, *, fleet: Fleet, wake: Callable[[Key], None]) -> None:
        self._fleet = fleet
        self._wake = wake
        self._followers = Followers()
        self._followers.wake = wake
        self._intervals: dict[Key, float] = {}
        self._woken: dict[Key, float] = {}
        self.is_harmed: Callable[[Key], bool] = lambda deployment: False
        """Whether the counters that were just polled prove harm: that is looked at more often than all else."""
        fleet.on_poll = self._polled

    def refer(self, deployment: Key, job: Key | None) -> None:
        """The deployment waits for this job, or for none."""
        self._followers.follow(deployment, () if job is None else (job,))

    def job_changed(self, job: Key) -> None:
        self._followers.changed(job)

    def collect(self, deployment: Key, interval: float | None) -> None:
        """Evidence is wanted every `interval` seconds; None: no more."""
        if interval is None:
            self._intervals.pop(deployment, None)
            self._woken.pop(deployment, None)
        else:
            if deployment not in self._intervals:
                self._fleet.poll_soon()
            self._intervals[deployment] = interval
            self._woken.setdefault(deployment, asyncio.get_running_loop().time())
        self._fleet.hurry = bool(self._intervals)

    def forget(self, deployment: Key) -> None:
        self.refer(deployment, None)
        self.collect(deployment, None)

    def _polled(self) -> None:
        now = asyncio.get_running_loop().time()
        for deployment, interval in list(self._intervals.items()):
            if now - self._woken[deployment] >= interval - EARLY_SECONDS or self.is_harmed(deployment):
                self._woken[deployment] = now
                self._wake(deployment)

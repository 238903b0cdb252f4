"""All router replicas: who applies which snapshot, and what each has counted.

Every replica has a task of its own that hands it the newest snapshot until it applies it, so a slow or dead one never
delays the others. A second loop fetches the counters; their answer also tells of a router that restarted or was added
and applies an older snapshot.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from finetune_operator.adapters.routers import Refused, Routers
from finetune_operator.api.routes import RouterCounters

logger = logging.getLogger(__name__)

FAST_SECONDS = 1.0  # between two polls while evidence is gathered or a replica lags
SLOW_SECONDS = 15.0
FIRST_RETRY_SECONDS = 0.1
LAST_RETRY_SECONDS = 2.0
LAG_SECONDS = 3.0  # a replica that applies an older snapshot for longer than this counts as not heard


@dataclass(frozen=True)
class Offer:
    """The newest snapshot, as it is sent."""

    version: int
    body: bytes
    since: float
    """Clock of the event loop."""


@dataclass
class Replica:
    """What is known of one router."""

    url: str
    applied: int | None = None
    """Version that it said it applies; None: not heard."""
    heard_at: datetime | None = None
    """When it last told counters that can be used."""
    counters: RouterCounters | None = None
    problem: str | None = None
    """Why the last request failed."""
    pushes: int = 0
    """Pushes that it answered: each tells what it applies since then."""
    offered: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class Fleet:
    """Pushes snapshots to all replicas and polls their counters."""

    def __init__(
        self, routers: Routers, *, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._routers = routers
        self._clock = clock
        self._replicas: dict[str, Replica] = {}
        self._offer: Offer | None = None
        self._floor = 0
        self._poll_now = asyncio.Event()
        self._polling = asyncio.Lock()
        self.polls = 0
        """Polls so far: who remembers it knows whether there is anything new."""
        self.hurry = False
        """Whether evidence is being gathered, which makes polls frequent."""
        self.on_applied: Callable[[], None] = lambda: None
        """Called when a replica says that it applies another version than before."""
        self.on_newer: Callable[[int], None] = lambda version: None
        """Called when a replica applies a newer snapshot than ours; ours has to get a higher version."""
        self.on_poll: Callable[[], None] = lambda: None

    @property
    def replicas(self) -> Sequence[Replica]:
        return list(self._replicas.values())

    @property
    def highest(self) -> int:
        """The highest version that any replica applies."""
        return max((replica.applied or 0 for replica in self._replicas.values()), default=0)

    def count_applying(self, version: int) -> int:
        """Replicas that apply this version or a newer one."""
        return sum(
            replica.applied is not None and replica.applied >= version for replica in self._replicas.values()
        )

    def behind(self, version: int) -> tuple[str, ...]:
        """The other replicas: URL, and what is wrong with it where that is known."""
        return tuple(
            f"{replica.url} ({replica.problem})" if replica.problem else replica.url
            for replica in self._replicas.values()
            if replica.applied is None or replica.applied < version
        )

    def silent(self) -> tuple[str, ...]:
        """Replicas that failed when they were asked last, and how."""
        return tuple(f"{r.url} ({r.problem})" for r in self._replicas.values() if r.problem)

    def counters(self) -> list[RouterCounters]:
        """What each replica told last; a replica that is known by two addresses counts once."""
        told = {r.counters.instance: r.counters for r in self._replicas.values() if r.counters is not None}
        return [told[instance] for instance in sorted(told)]

    def last_heard(self) -> datetime | None:
        """When the replica that has been silent for the longest time was last heard; None: one never was."""
        times = [replica.heard_at for replica in self._replicas.values()]
        heard = [time for time in times if time is not None]
        return min(heard) if heard and len(heard) == len(times) else None

    def offer(self, version: int, body: bytes) -> None:
        """Hand this snapshot to every replica, now and until it applies it."""
        self._raise_floor()
        self._offer = Offer(version, body, asyncio.get_running_loop().time())
        for replica in self._replicas.values():
            replica.offered.set()
        self._poll_now.set()

    async def poll(self) -> None:
        """Look up the replicas and fetch the counters of all, at the same time."""
        async with self._polling:
            await self._look_up()
            await asyncio.gather(*(self._fetch(replica) for replica in self._replicas.values()))
            self.polls += 1
        self.on_poll()

    async def run(self) -> None:
        """Poll until cancelled."""
        try:
            while True:
                self._poll_now.clear()
                await self.poll()
                lags = self._offer is not None and self.count_applying(self._offer.version) < len(
                    self._replicas
                )
                await self._pause(FAST_SECONDS if self.hurry or lags else SLOW_SECONDS)
        finally:
            for replica in self._replicas.values():
                self._retire(replica)

    def poll_soon(self) -> None:
        """Do not wait out a slow pause."""
        self._poll_now.set()

    async def _pause(self, seconds: float) -> None:
        """At least the fast pause, so that many changes do not make many polls."""
        await asyncio.sleep(min(seconds, FAST_SECONDS))
        try:
            async with asyncio.timeout(max(0.0, seconds - FAST_SECONDS)):
                await self._poll_now.wait()
        except TimeoutError:
            return

    async def _look_up(self) -> None:
        found = await self._routers.replicas()
        for url in self._replicas.keys() - set(found):
            logger.info("router %s is gone", url)
            self._retire(self._replicas.pop(url))
        for url in found:
            if (replica := self._replicas.get(url)) is None:  # not made anew at each poll
                replica = self._replicas[url] = Replica(url)
            if replica.task is None or replica.task.done():
                if replica.task is not None:  # a fault of ours must not keep a router on an old snapshot
                    logger.error("pushing to router %s failed; again", url, exc_info=replica.task.exception())
                replica.task = asyncio.create_task(self._serve(replica), name=f"push to {url}")
                replica.offered.set()

    def _retire(self, replica: Replica) -> None:
        if replica.task is not None:
            replica.task.cancel()

    async def _fetch(self, replica: Replica) -> None:
        pushes = replica.pushes
        answer = await self._routers.counters(replica.url)
        if isinstance(answer, Refused):
            self._note(replica, answer.reason)
            return
        if replica.pushes == pushes:  # else a push went past this answer, which says less than the push's own
            self._learn(replica, answer.version)
        self._raise_floor()
        if answer.version < self._floor:
            self._note(replica, f"applies snapshot {answer.version}, older than {self._floor}")
            return
        self._note(replica, None)
        replica.heard_at, replica.counters = self._clock(), answer

    def _raise_floor(self) -> None:
        """A snapshot that every replica had time to apply is the oldest one that a replica may apply."""
        now = asyncio.get_running_loop().time()
        if self._offer is not None and now - self._offer.since >= LAG_SECONDS:
            self._floor = self._offer.version

    async def _serve(self, replica: Replica) -> None:
        """Push whenever the replica does not apply the newest snapshot."""
        while True:
            await replica.offered.wait()
            replica.offered.clear()
            retry = FIRST_RETRY_SECONDS
            while self._offer is not None and (
                replica.applied is None or replica.applied < self._offer.version
            ):
                if await self._push(replica, self._offer):
                    continue
                try:
                    async with asyncio.timeout(retry):
                        await replica.offered.wait()
                    replica.offered.clear()
                    retry = FIRST_RETRY_SECONDS
                except TimeoutError:
                    retry = min(retry * 2, LAST_RETRY_SECONDS)

    async def _push(self, replica: Replica, offer: Offer) -> bool:
        answer = await self._routers.push(replica.url, offer.body)
        if isinstance(answer, Refused) and answer.newer:
            answer = await self._routers.applied(replica.url)
        if isinstance(answer, Refused):
            self._note(replica, answer.reason)
            return False
        replica.pushes += 1
        self._learn(replica, answer.version)
        return answer.version >= offer.version

    def _learn(self, replica: Replica, version: int) -> None:
        if version == replica.applied:
            return
        replica.applied = version
        if self._offer is not None:
            if version < self._offer.version:
                replica.offered.set()
            elif version > self._offer.version:
                self.on_newer(version)
        self.on_applied()

    def _note(self, replica: Replica, problem: str | None) -> None:
        """Keep and log a change of what is wrong; not each failure, as there is one a second."""
        if (problem is None) != (replica.problem is None):
            if problem:
                logger.warning("router %s: %s", replica.url, problem)
            else:
                logger.info("router %s is heard again", replica.url)
        replica.problem = problem

"""One of several operators acts: it holds the Lease `finetune-operator`.

The client's own election (kubernetes.aio.leaderelection) measures by the wall clock, has no limit for a request that
hangs, and releases nothing; so this is a loop of our own over core/elections.py. Every write of the operator asks
`may_act` right before it is sent: a process that was stopped and goes on finds that its time is over.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import TypeVar

from finetune_operator.adapters import elapsed
from finetune_operator.adapters.api_errors import ApiError, ConflictError, UnavailableError
from finetune_operator.adapters.kube import Kube
from finetune_operator.core import elections
from finetune_operator.core.elections import LeaseFacts, Terms

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

NAME = "finetune-operator"
API_VERSION = "coordination.k8s.io/v1"
JITTER = 0.2  # share of the retry time that is added at random, so that candidates do not ask in step
RELEASE_SECONDS = 3.0
TRIES = 2  # that have their time within one renewal; client-go takes half of it for a request, too


class LeadershipLostError(Exception):
    """The Lease could not be renewed in time, or somebody else holds it: nothing may be done any more."""


def identity() -> str:
    """Host name (in a cluster the pod's) and something that no other process has: a restarted one is another."""
    return f"{socket.gethostname()}_{uuid.uuid4()}"


class Leadership:
    """`kube` must be a client of its own, without a fence and with no queue of other requests before it."""

    def __init__(
        self,
        kube: Kube,
        *,
        namespace: str,
        address: str,
        terms: Terms,
        name: str = NAME,
        me: str | None = None,
        clock: Callable[[], float] = elapsed.seconds,
    ) -> None:
        self._kube = kube
        self._namespace = namespace
        self._name = name
        self._address = address
        self._terms = terms
        self._clock = clock
        self.identity = me or identity()
        self._lease = LeaseFacts()
        self._seen_at = self._read_at = self._tried_at = clock()
        self._until = float("-inf")
        self._away_at = float("-inf")
        self._read_again = True
        self._led = False
        self._told = ""
        """What was wrong with the last try."""
        self._acquired = datetime.now(UTC)
        self._jitter = random.Random()  # noqa: S311 - spreads load, protects nothing

    def may_act(self) -> bool:
        """Whether we lead, by our own clock: false some seconds before anybody else can."""
        return self._clock() < self._until

    @property
    def leader_address(self) -> str | None:
        """Where the present leader takes reports; None where there is none or it is us."""
        lease = self._lease
        if lease.holder in ("", self.identity) or self._unchanged() >= self._terms.lease_seconds:
            return None
        return lease.address

    async def acquire(self) -> None:
        """Wait until we lead. A vanished API server only makes it take longer."""
        said = ""
        while not await self._try():
            if self._lease.holder != said:
                said = self._lease.holder
                logger.info("%s leads; this one (%s) stands by", said or "nobody", self.identity)
            await asyncio.sleep(self._pause())
        logger.info("this one (%s) leads now", self.identity)

    def may_push(self) -> bool:
        """Whether routers and agents may be told something: while we lead, and while the API server was away a moment
        ago. Then nobody can take the Lease, or we alone are cut off; routers refuse a snapshot that was overtaken."""
        return self.may_act() or self._clock() - self._away_at < 2 * self._terms.retry_seconds

    async def keep(self) -> None:
        """Renew for ever. Raises LeadershipLostError when another one has led, or may have.

        Where the Lease cannot be renewed in time nothing may be written any more. If it then turns out to be still
        ours, nobody else has led in between, and we lead on: an API server that was away costs no restart."""
        late = False
        while True:
            await asyncio.sleep(self._left_to_wait(late=late))
            await self._try()
            if self._lease.holder != self.identity:
                self._until = self._away_at = float("-inf")
                raise LeadershipLostError(f"{self._lease.holder or 'nobody'} holds the Lease now")
            if late != (not self.may_act()):
                late = not late
                if late:
                    logger.warning("the Lease is not renewed: nothing is written until it is")
                else:
                    logger.info("the Lease is renewed, and nobody else has led")

    async def release(self) -> None:
        """Hand over: the next one need not wait for the Lease to run out. Call it when nothing acts any more."""
        if not self.may_act():
            return
        self._until = float("-inf")
        body = elections.released_body(
            self._lease, namespace=self._namespace, name=self._name, now=datetime.now(UTC)
        )
        try:
            async with asyncio.timeout(RELEASE_SECONDS):
                await self._kube.replace(body)
        except (ApiError, TimeoutError) as error:
            logger.warning("the Lease was not released and will run out by itself: %s", error)
        else:
            logger.info("the Lease is released")

    async def _try(self) -> bool:
        """Take or renew the Lease once; false where that failed, or another one holds it."""
        began = self._tried_at = self._clock()
        limit = self._left() if self.may_act() else self._terms.renew_seconds
        try:
            async with asyncio.timeout(limit):
                taken = await self._take(began)
            self._told = ""
            return taken
        except ConflictError:  # somebody wrote, and be it we ourselves in a request whose answer was lost
            self._read_again = True
        except (ApiError, TimeoutError) as error:
            self._read_again = True
            if isinstance(error, UnavailableError | TimeoutError):
                self._away_at = self._clock()
            self._complain(str(error) or "no answer in time")
        return False

    def _complain(self, trouble: str) -> None:
        """Log it once for as long as it lasts: it is tried again every other second."""
        if trouble != self._told:
            logger.warning("the Lease %s/%s: %s", self._namespace, self._name, trouble)
        self._told = trouble

    async def _take(self, began: float) -> bool:
        if self._read_again or not self.may_act():
            body = await self._in_time(self._kube.get(API_VERSION, "Lease", self._namespace, self._name))
            self._note(elections.lease_facts(body))
            self._read_again = False
            if self._led and self._lease.holder != self.identity:
                return False  # whoever has led once never takes the Lease again: what it knows is old
            if not elections.may_take(
                self._lease, identity=self.identity, unchanged_seconds=self._unchanged(), terms=self._terms
            ):
                return False
        now = datetime.now(UTC)
        if self._lease.holder != self.identity:
            self._acquired = now
        body = elections.lease_body(
            self._lease,
            namespace=self._namespace,
            name=self._name,
            identity=self.identity,
            address=self._address,
            terms=self._terms,
            acquired=self._acquired,
            now=now,
        )
        write = self._kube.replace if self._lease.version else self._kube.create
        self._note(elections.lease_facts(await self._in_time(write(body))))
        self._until = began + self._terms.renew_seconds
        self._led = True
        return True

    async def _in_time(self, request: Awaitable[Answer]) -> Answer:
        """One request that hangs (a connection that died without a word) leaves time for another one."""
        async with asyncio.timeout(self._terms.renew_seconds / TRIES):
            return await request

    def _note(self, lease: LeaseFacts) -> None:
        """Since when the Lease is as it is. Time in which it could not be read counts for nothing: its holder could not
        renew it either, and gets its chance when the API server is back."""
        now = self._clock()
        if lease.version != self._lease.version or now - self._read_at > self._terms.renew_seconds:
            self._seen_at = now
        self._lease, self._read_at = lease, now

    def _unchanged(self) -> float:
        return self._clock() - self._seen_at

    def _left_to_wait(self, *, late: bool) -> float:
        """Tries begin `retry_seconds` after one another: one that hung has used that up."""
        wait = max(0.0, self._tried_at + self._terms.retry_seconds - self._clock())
        return wait if late else min(wait, self._left())

    def _left(self) -> float:
        return max(0.0, self._until - self._clock())

    def _pause(self) -> float:
        return self._terms.retry_seconds * self._jitter.uniform(1.0, 1.0 + JITTER)


def own_address(port: int, *, scheme: str, pod_ip: str | None) -> str:
    """Base URL under which other replicas reach our endpoint."""
    host = pod_ip or socket.gethostbyname(socket.gethostname())
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

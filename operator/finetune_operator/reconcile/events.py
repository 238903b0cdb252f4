"""Events about our objects, as `kubectl describe` shows them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from datetime import datetime
from typing import NamedTuple, Self

from finetune_operator.adapters.api_errors import ApiError
from finetune_operator.adapters.kube import Json, Kube
from finetune_operator.api.base import API_VERSION
from finetune_operator.core.facts import Event
from finetune_operator.manifests import naming
from finetune_operator.reconcile.facts import timestamp

logger = logging.getLogger(__name__)

MESSAGE_BYTES = 1024  # the limit of the API
MOST_WAITING = 10_000
POSTERS = 4  # requests under way at once
LAST_SECONDS = 2.0  # for what waits when the operator ends


class Subject(NamedTuple):
    """Which object an event is about."""

    kind: str
    namespace: str
    name: str
    uid: str

    @classmethod
    def of(cls, body: Json) -> Self:
        metadata = body["metadata"]
        return cls(body["kind"], metadata["namespace"], metadata["name"], metadata["uid"])


class Recorder:
    """Posts events in the background, a few at once, so that no job waits for the events of another. One that cannot
    be posted is lost, as the status already says the same; so is the oldest where more than MOST_WAITING wait."""

    def __init__(self, kube: Kube) -> None:
        self._kube = kube
        self._waiting: deque[tuple[Subject, Event, datetime]] = deque(maxlen=MOST_WAITING)
        self._arrived = asyncio.Event()

    def record(self, subject: Json, event: Event, *, now: datetime) -> None:
        """Post the event soon."""
        if len(self._waiting) == MOST_WAITING:
            logger.warning("event %s is not posted: too many wait", self._waiting[0][1].reason)
        self._waiting.append((Subject.of(subject), event, now))
        self._arrived.set()

    async def run(self) -> None:
        """Post what is recorded until cancelled, and then what still waits, as far as there is time."""
        try:
            while True:
                await self._arrived.wait()
                await self.flush()
        finally:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.flush(), timeout=LAST_SECONDS)

    async def flush(self) -> None:
        """Post what waits."""
        self._arrived.clear()
        async with asyncio.TaskGroup() as group:
            for _ in range(min(POSTERS, len(self._waiting))):
                group.create_task(self._post_all())

    async def _post_all(self) -> None:
        while self._waiting:
            subject, event, now = first = self._waiting.popleft()
            try:
                await self._kube.create(build(subject, event, now=now))
            except ApiError as error:
                logger.warning("event %s could not be posted: %s", event.reason, error)
            except asyncio.CancelledError:
                self._waiting.appendleft(first)
                raise


def build(subject: Subject, event: Event, *, now: datetime) -> Json:
    """A core/v1 Event about one of our objects."""
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": f"{subject.name}.", "namespace": subject.namespace},
        "involvedObject": {"apiVersion": API_VERSION, **subject._asdict()},
        "type": "Warning" if event.warning else "Normal",
        "reason": event.reason,
        "message": event.message.encode()[:MESSAGE_BYTES].decode(errors="ignore"),
        "source": {"component": naming.MANAGER},
        "reportingComponent": naming.MANAGER,
        "reportingInstance": naming.MANAGER,
        "firstTimestamp": timestamp(now),
        "lastTimestamp": timestamp(now),
        "count": 1,
    }

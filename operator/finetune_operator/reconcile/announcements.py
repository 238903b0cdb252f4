"""Events, event webhooks and alerts, each told once, also by an operator that was killed between two of them.

A transition is announced in the status, in the same write that makes it. What this process wrote itself it tells at
once: alerts and webhooks first, then the Event, whose existence says that all was told. What it finds announced may
have been told before: there the Event comes first, and only if none of that name was there the rest follows.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from finetune_operator.adapters.api_errors import ApiError, ConflictError, UnavailableError
from finetune_operator.adapters.kube import Json, Kube
from finetune_operator.api.adapterdeployment_status import AdapterDeploymentStatus, Announcement
from finetune_operator.api.adapterdeployment_strategy import Severity, WebhookType
from finetune_operator.core.facts import Event
from finetune_operator.core.rollout_facts import DeploymentFacts
from finetune_operator.reconcile import events, messages
from finetune_operator.reconcile.errands import Errands
from finetune_operator.reconcile.queue import Key

logger = logging.getLogger(__name__)

# The API server keeps Events for an hour (--event-ttl): of older ones nobody knows whether they were told.
MEMORY = timedelta(minutes=50)
PROVIDERS = (
    "providers are configured with the operator: value alerts.existingSecret of its chart, or the file in "
    "FINETUNE_ALERT_PROVIDERS_FILE"
)
DELIVERY_SECONDS = 5.0  # for alerts, before the Event is posted all the same; they are tried on


@dataclass
class Told:
    """What was done about the announcements of one deployment."""

    done: set[str] = field(default_factory=set)
    ours: set[str] = field(default_factory=set)
    """Those that this process has written, so that nobody can have told them before."""
    delivered: set[str] = field(default_factory=set)
    """Those whose alerts are out, and whose Event is not."""
    running: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Subject:
    """Whom announcements are about."""

    key: Key
    body: Json
    deployment: DeploymentFacts
    """As it was seen."""
    status: AdapterDeploymentStatus
    """As it was stored after that."""


class Announcer:
    """Tells in the background what stored statuses announce."""

    def __init__(
        self, *, kube: Kube, errands: Errands, clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._kube = kube
        self._errands = errands
        self._clock = clock
        self._told: dict[Key, Told] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def told(self, key: Key) -> frozenset[str]:
        """Names of the announcements that the status need not hold any longer."""
        return frozenset(self._of(key).done)

    def forget(self, key: Key) -> None:
        self._told.pop(key, None)

    def announce(self, subject: Subject, fresh: Sequence[Announcement]) -> None:
        """Tell what the stored status announces and was not told yet; `fresh` was written by this pass."""
        told = self._of(subject.key)
        for item in fresh:
            logger.info("%s/%s: %s: %s", *subject.key, item.reason, item.message)
        stored = (*subject.deployment.status.announcements, *subject.status.announcements)
        names = {item.name for item in stored}
        told.done &= names
        told.ours = (told.ours & names) | {item.name for item in fresh}
        for item in subject.status.announcements:
            if item.name in told.done | told.running:
                continue
            if item.name not in told.ours and self._clock() - item.time > MEMORY:
                told.done.add(item.name)
                continue
            told.running.add(item.name)
            self._start(self._tell(subject, item, told))

    async def _tell(self, subject: Subject, item: Announcement, told: Told) -> None:
        try:
            if item.name in told.ours:
                if item.name not in told.delivered:
                    await self._deliver(subject, item)
                    told.delivered.add(item.name)
                await self._post(subject, item)
            elif await self._post(subject, item):
                await self._deliver(subject, item)
            told.done.add(item.name)
            told.delivered.discard(item.name)
        except UnavailableError as error:  # a later pass tries again
            logger.warning("event %s could not be posted yet: %s", item.reason, error)
        finally:
            told.running.discard(item.name)

    async def _post(self, subject: Subject, item: Announcement) -> bool:
        """Post the Event. Returns whether it is new. Raises UnavailableError; one that is refused is given up, as the
        status says the same."""
        event = Event(warning=item.severity is not Severity.INFO, reason=item.reason, message=item.message)
        body = events.build(events.Subject.of(subject.body), event, now=item.time)
        body["metadata"] = {"name": item.name, "namespace": subject.deployment.namespace}
        try:
            await self._kube.create(body)
        except ConflictError:
            return False
        except UnavailableError:
            raise
        except ApiError as error:
            logger.warning("event %s could not be posted: %s", item.reason, error)
        return True

    async def _deliver(self, subject: Subject, item: Announcement) -> None:
        """Alerts and event webhooks, those of the spec of now."""
        spec = subject.deployment.spec
        if spec is None:
            return
        hooks = [hook for hook in spec.webhooks if hook.type is WebhookType.EVENT]
        payload = messages.webhook_payload(
            subject.deployment, subject.status, WebhookType.EVENT, announcement=item
        )
        tasks = self._errands.tell(subject.key, hooks, payload)
        for recipient in spec.alerts:
            if messages.is_for(item.severity, recipient):
                tasks.append(self._start(self._alert(subject, item, recipient.provider_ref.name)))
        if tasks:
            await asyncio.wait(tasks, timeout=DELIVERY_SECONDS)

    async def _alert(self, subject: Subject, item: Announcement, provider: str) -> None:
        """Tell a provider; what it did not get is an Event, whose name lets there be one at most."""
        alert = messages.alert_payload(subject.deployment, subject.status, item)
        problem = await self._errands.alert(subject.key, provider, alert)
        if problem is None:
            return
        failure = Announcement(
            name=f"{item.name}.{provider}",
            time=self._clock(),
            severity=Severity.WARN,
            reason="AlertNotDelivered",
            message=f"alert {item.reason}: {problem}; {PROVIDERS}",
        )
        with contextlib.suppress(UnavailableError):  # the log has it
            await self._post(subject, failure)

    def _start(self, telling: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(telling)
        self._tasks.add(task)  # the event loop itself keeps only a weak reference
        task.add_done_callback(self._tasks.discard)
        return task

    def _of(self, key: Key) -> Told:
        return self._told.setdefault(key, Told())

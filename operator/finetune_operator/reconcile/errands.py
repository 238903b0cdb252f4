"""What takes its time and must not hold up a rollback: Prometheus queries, webhooks, alerts.

Each runs in the background and at most once at a time per deployment and purpose; answers wait here until a pass has
written down what it made of them, so that a pass that starts over sees them again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from finetune_operator.adapters.prometheus import Prometheus, QueryError
from finetune_operator.adapters.webhooks import AlertError, Alerts, Webhooks
from finetune_operator.api.adapterdeployment_analysis import MetricSpec
from finetune_operator.api.adapterdeployment_strategy import WebhookSpec
from finetune_operator.core.durations import parse_duration
from finetune_operator.core.rollout_facts import Measurement, WebhookAnswer
from finetune_operator.reconcile.queue import Key

logger = logging.getLogger(__name__)

WEBHOOK_SECONDS = 10.0  # the default of spec.webhooks[].timeout
ALERT_ATTEMPTS = 4
ALERT_RETRY_SECONDS = 2.0  # doubled each time
Result = TypeVar("Result")


@dataclass
class Tray:
    """Answers for one deployment that no stored status holds yet."""

    measurements: dict[str, tuple[str, Measurement]] = field(default_factory=dict)
    """By name: what it was made for, and what it said."""
    webhooks: dict[str, tuple[str, WebhookAnswer]] = field(default_factory=dict)


class Errands:
    """Runs errands; `wake` asks for a pass once there is an answer."""

    def __init__(
        self, *, prometheus: Prometheus, webhooks: Webhooks, alerts: Alerts, wake: Callable[[Key], None]
    ) -> None:
        self._prometheus = prometheus
        self._webhooks = webhooks
        self._alerts = alerts
        self._wake = wake
        self._trays: dict[Key, Tray] = {}
        self._running: dict[tuple[Key, str], asyncio.Task[None]] = {}
        self._loose: set[asyncio.Task[Any]] = set()

    def measurements(self, key: Key, questions: Collection[str]) -> tuple[Measurement, ...]:
        """Those that were made for one of these questions: one that took its time may be about another candidate."""
        told = self._tray(key).measurements.values()
        return tuple(measurement for question, measurement in told if question in questions)

    def answers(self, key: Key, questions: Collection[str]) -> dict[str, WebhookAnswer]:
        """The same for webhooks: a yes to one step is none to the next."""
        told = self._tray(key).webhooks.items()
        return {name: answer for name, (question, answer) in told if question in questions}

    def settle(
        self, key: Key, measurements: Sequence[Measurement], answers: Mapping[str, WebhookAnswer]
    ) -> None:
        """The stored status holds what these answers led to: they are not needed any more."""
        tray = self._tray(key)
        for measurement in measurements:
            made = tray.measurements.get(measurement.name)
            if made is not None and made[1] is measurement:
                del tray.measurements[measurement.name]
        for name, answer in answers.items():
            told = tray.webhooks.get(name)
            if told is not None and told[1] is answer:
                del tray.webhooks[name]

    def forget(self, key: Key) -> None:
        """A deployment is gone."""
        self._trays.pop(key, None)
        for (other, _), task in list(self._running.items()):
            if other == key:
                task.cancel()

    def measure(
        self, key: Key, metrics: Sequence[MetricSpec], values: Mapping[str, str], *, question: str
    ) -> None:
        """Make one measurement of every metric. `values` replace {{alias}}, {{stable}} and {{candidate}}."""

        async def run() -> None:
            made = await asyncio.gather(*(self._measure(metric, values) for metric in metrics))
            self._tray(key).measurements.update({one.name: (question, one) for one in made})

        self._run(key, f"measure {question}", run())

    def ask(
        self, key: Key, webhooks: Sequence[WebhookSpec], payload: Mapping[str, Any], *, question: str
    ) -> None:
        """Ask these webhooks the same; their answers come together."""
        if webhooks:
            self._run(key, f"ask {question}", self._ask(key, webhooks, payload, question))

    def tell(
        self, key: Key, webhooks: Sequence[WebhookSpec], payload: Mapping[str, Any]
    ) -> list[asyncio.Task[None]]:
        """Tell these webhooks of an event, each once."""
        return [self._start(self._tell(key, webhook, payload)) for webhook in webhooks]

    def alert(self, key: Key, provider: str, payload: Mapping[str, Any]) -> asyncio.Task[str | None]:
        """Tell a provider, in several attempts. Returns why it could not be told, None where it was."""
        return self._start(self._alert(key, provider, payload))

    async def _measure(self, metric: MetricSpec, values: Mapping[str, str]) -> Measurement:
        query = metric.prometheus.query
        for name, value in values.items():
            query = query.replace("{{" + name + "}}", value)
        try:
            value_now = await self._prometheus.query(metric.prometheus.address, query)
        except QueryError as error:
            return Measurement(metric.name, None, error=str(error)[:500])
        return Measurement(metric.name, value_now)

    async def _ask(
        self, key: Key, webhooks: Sequence[WebhookSpec], payload: Mapping[str, Any], question: str
    ) -> None:
        answers = await asyncio.gather(
            *(self._webhooks.ask(hook.url, payload, seconds=_timeout(hook)) for hook in webhooks)
        )
        for hook, answer in zip(webhooks, answers, strict=True):
            self._tray(key).webhooks[hook.key] = question, WebhookAnswer(answer.accepted, answer.message)

    async def _tell(self, key: Key, webhook: WebhookSpec, payload: Mapping[str, Any]) -> None:
        answer = await self._webhooks.ask(webhook.url, payload, seconds=_timeout(webhook))
        if not answer.accepted:
            logger.warning("%s/%s: webhook %s did not take the event: %s", *key, webhook.key, answer.message)

    async def _alert(self, key: Key, provider: str, payload: Mapping[str, Any]) -> str | None:
        problem = None
        for attempt in range(ALERT_ATTEMPTS):
            if attempt:
                await asyncio.sleep(ALERT_RETRY_SECONDS * 2 ** (attempt - 1))
            try:
                await self._alerts.send(provider, payload)
                return None
            except AlertError as error:
                problem = str(error)
                logger.warning("%s/%s: alert not delivered (attempt %d): %s", *key, attempt + 1, problem)
        return problem

    def _tray(self, key: Key) -> Tray:
        return self._trays.setdefault(key, Tray())

    def _run(self, key: Key, purpose: str, errand: Coroutine[Any, Any, None]) -> None:
        """Start it, unless the same is under way; wake the deployment when it is done."""
        if (key, purpose) in self._running:
            errand.close()
            return

        def done(task: asyncio.Task[None]) -> None:
            self._running.pop((key, purpose), None)
            if not task.cancelled():
                self._wake(key)

        task = self._start(errand)
        self._running[key, purpose] = task
        task.add_done_callback(done)

    def _start(self, errand: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        task = asyncio.create_task(errand)
        self._loose.add(task)  # the event loop itself keeps only a weak reference
        task.add_done_callback(self._loose.discard)
        return task


def _timeout(webhook: WebhookSpec) -> float:
    if webhook.timeout is not None:
        return parse_duration(webhook.timeout)
    return webhook.timeout_seconds or WEBHOOK_SECONDS

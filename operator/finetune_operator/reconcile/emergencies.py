"""A candidate that does harm while its abort cannot be recorded: it is taken out of the route from memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from finetune_operator.adapters.kube import Json
from finetune_operator.api.adapterdeployment_status import AdapterDeploymentStatus
from finetune_operator.core import rollout_checks, rollouts
from finetune_operator.core.rollout_facts import Observed, Withdrawal
from finetune_operator.reconcile import deployment_facts, facts
from finetune_operator.reconcile.evidence import EvidenceBook
from finetune_operator.reconcile.queue import Key
from finetune_operator.reconcile.routes import Publisher

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Emergencies:
    """Remembers the deployments whose candidates answer requests, and what was done to them without a record."""

    publisher: Publisher
    book: EvidenceBook
    clock: Callable[[], datetime] = lambda: datetime.now(UTC)
    _known: dict[Key, Json] = field(default_factory=dict)
    _withdrawn: dict[Key, Withdrawal] = field(default_factory=dict)

    def withdrawal(self, key: Key) -> Withdrawal | None:
        """What was done to the route, until the status says the same."""
        return self._withdrawn.get(key)

    def remember(self, key: Key, body: Json, status: AdapterDeploymentStatus) -> None:
        """The object as it is stored now."""
        weights = status.weights
        if weights is None or not (weights.candidate > 0 or weights.mirror > 0):
            self.forget(key)
            return
        spec = body.get("spec")
        if key in self._known and deployment_facts.deployment_facts(body).problem is not None:
            spec = self._known[key].get("spec")  # the guardrails of the last one that could be read
        self._known[key] = {**body, "spec": spec, "status": facts.to_json(status)}
        known = self._withdrawn.get(key)
        if known is not None and not rollout_checks.concerns(known, status):
            del self._withdrawn[key]

    def forget(self, key: Key) -> None:
        self._known.pop(key, None)
        self._withdrawn.pop(key, None)

    async def look(self, key: Key) -> None:
        """Publish the route without the candidate if it is proved to do harm by now; else nothing."""
        body = self._known.get(key)
        if body is None:
            return
        deployment, claim = deployment_facts.deployment_facts(body), deployment_facts.claim(body)
        routing = self.publisher.facts(claim)
        seen = Observed(
            deployment=deployment,
            engines_problem="they are not looked at while the status cannot be written",
            routing=routing,
            evidence=self.book.peek(deployment, routing.published),
            withdrawal=self._withdrawn.get(key),
        )
        found = rollouts.withdraw(seen, now=self.clock().replace(microsecond=0))
        if found is None:
            return
        withdrawal, route = found
        if key not in self._withdrawn:
            logger.error("%s/%s: %s: %s: taken out of the route", *key, withdrawal.reason, withdrawal.message)
            self._withdrawn[key] = withdrawal
        await self.publisher.replace(claim, route)

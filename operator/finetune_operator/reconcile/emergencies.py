"""A candidate that does harm while its abort cannot be recorded: it is taken out of the route from memory."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime

from finetune_operator.api.routes import Route
from finetune_operator.core import rollout_checks, rollouts
from finetune_operator.core.rollout_facts import DeploymentFacts, Observed, Withdrawal
from finetune_operator.reconcile.aliases import Claim
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
    _known: dict[Key, tuple[DeploymentFacts, Claim]] = field(default_factory=dict)
    _withdrawn: dict[Key, Withdrawal] = field(default_factory=dict)

    def withdrawal(self, key: Key) -> Withdrawal | None:
        """What was done to the route, until the status says the same."""
        return self._withdrawn.get(key)

    def remember(self, key: Key, deployment: DeploymentFacts, claim: Claim) -> None:
        """The deployment as it is stored now."""
        status, weights = deployment.status, deployment.status.weights
        if weights is None or not (weights.candidate > 0 or weights.mirror > 0):
            self.forget(key)
            return
        self._known[key] = deployment, claim
        known = self._withdrawn.get(key)
        if known is not None and not rollout_checks.concerns(known, status):
            del self._withdrawn[key]

    def forget(self, key: Key) -> None:
        self._known.pop(key, None)
        self._withdrawn.pop(key, None)

    def is_due(self, key: Key) -> bool:
        """Whether what the routers have told by now proves harm that nothing was done about. Costs no request, so each
        poll may ask."""
        return key not in self._withdrawn and self._proof(key) is not None

    async def look(self, key: Key) -> None:
        """Publish the route without the candidate if it is proved to do harm by now; else nothing."""
        found = self._proof(key)
        if found is None:
            return
        withdrawal, route = found
        if key not in self._withdrawn:
            logger.error("%s/%s: %s: %s: taken out of the route", *key, withdrawal.reason, withdrawal.message)
            self._withdrawn[key] = withdrawal
        await self.publisher.replace(self._known[key][1], route)

    def _proof(self, key: Key) -> tuple[Withdrawal, Route] | None:
        if key not in self._known:
            return None
        deployment, claim = self._known[key]
        routing = self.publisher.facts(claim)
        seen = Observed(
            deployment=deployment,
            engines_problem="they are not looked at while the status cannot be written",
            routing=routing,
            evidence=self.book.peek(deployment, routing.published),
            withdrawal=self._withdrawn.get(key),
        )
        return rollouts.withdraw(seen, now=self.clock().replace(microsecond=0))

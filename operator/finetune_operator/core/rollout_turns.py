"""One pass over one AdapterDeployment: what was seen, and what the pass has decided so far."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from finetune_operator.api.adapterdeployment import AdapterDeploymentSpec
from finetune_operator.api.adapterdeployment_status import (
    AdapterDeploymentStatus,
    LoadedAdapter,
    Stage,
    Weights,
)
from finetune_operator.api.adapterdeployment_strategy import STEP_KINDS, Step
from finetune_operator.core.rollout_facts import Action, Observed

UNDERWAY = frozenset(
    {
        Stage.LOADING,
        Stage.VALIDATING,
        Stage.SHADOWING,
        Stage.CANARY,
        Stage.WAITING_PROMOTION,
        Stage.PROMOTING,
    }
)
ROUTED = frozenset({Stage.SHADOWING, Stage.CANARY, Stage.WAITING_PROMOTION, Stage.PROMOTING})
"""Stages in which the candidate is part of the route, whatever its weight: pinned users meet it too."""
OVER = frozenset({Stage.ABORTING, Stage.FAILED})


@dataclass(frozen=True)
class Turn:
    seen: Observed
    spec: AdapterDeploymentSpec
    now: datetime
    status: AdapterDeploymentStatus
    """The status to write, as far as it is decided."""
    actions: tuple[Action, ...] = ()
    note: tuple[str, str] | None = None
    """What is being waited for: a word and a sentence. None: the stage speaks for itself."""
    look_again: float | None = None
    """Seconds after which something may have changed that nobody tells of."""

    @property
    def before(self) -> AdapterDeploymentStatus:
        """The status as it is stored."""
        return self.seen.deployment.status

    @property
    def alias(self) -> str:
        return self.seen.deployment.alias

    @property
    def underway(self) -> bool:
        """Whether a candidate is on its way."""
        return self.status.candidate_revision is not None and self.status.stage in UNDERWAY

    @property
    def first(self) -> bool:
        """Whether nothing has served yet, so there is nothing to compare with."""
        return self.status.stable_revision is None

    @property
    def weights(self) -> Weights:
        return self.status.weights or Weights(stable=0 if self.first else 100)

    @property
    def stepless(self) -> bool:
        """Whether the rollout under way needs no steps and no confirmation: promote-full, or it served before."""
        return self.underway and self.status.current_step_hash is None

    @property
    def exposed(self) -> bool:
        """Whether the candidate answers requests by now, mirrored ones included."""
        weights = self.weights
        return self.underway and (weights.candidate > 0 or weights.mirror > 0)

    @property
    def routed(self) -> bool:
        """Whether the candidate is part of the route. A gate before the first weight is passed before any user meets
        it; one after a weight leaves the users where they are."""
        return self.status.stage in ROUTED or self.exposed

    def adapter(self, revision: str | None) -> LoadedAdapter | None:
        return next((a for a in self.status.adapters if a.revision == revision), None)

    @property
    def stable(self) -> LoadedAdapter | None:
        return self.adapter(self.status.stable_revision)

    @property
    def candidate(self) -> LoadedAdapter | None:
        return self.adapter(self.status.candidate_revision)

    def update(self, **fields: Any) -> Turn:
        return replace(self, status=self.status.model_copy(update=fields))

    def act(self, *actions: Action) -> Turn:
        return replace(self, actions=(*self.actions, *actions))

    def say(self, reason: str, message: str) -> Turn:
        return replace(self, note=(reason, message))

    def again_in(self, seconds: float) -> Turn:
        sooner = seconds if self.look_again is None else min(seconds, self.look_again)
        return replace(self, look_again=max(0.0, sooner))

    def weigh(self, *, candidate: float, mirror: float = 0.0) -> Turn:
        """Record who gets how much; it counts once every router said that it applies it."""
        weights = self.weights
        if (weights.candidate, weights.mirror) == (candidate, mirror) and self.status.weights is not None:
            return self
        stable = 0.0 if self.first else 100.0 - candidate
        return self.update(weights=Weights(stable=stable, candidate=candidate, mirror=mirror))

    def stage(self, stage: Stage) -> Turn:
        """Progress: the deadline counts anew."""
        since = self.status.stage_start_time if stage is self.status.stage else self.now
        return self.update(stage=stage, stage_start_time=since, last_progress_time=self.now)

    def with_adapter(self, adapter: LoadedAdapter) -> Turn:
        """The adapter's entry replaced, or a new one added."""
        known = self.status.adapters
        if any(a.revision == adapter.revision for a in known):
            adapters = [adapter if a.revision == adapter.revision else a for a in known]
        else:
            adapters = [*known, adapter]
        return self.update(adapters=adapters)

    def elapsed(self, since: datetime | None) -> float:
        """Seconds since then; 0 where it has not begun."""
        return 0.0 if since is None else (self.now - since).total_seconds()


def clock(moment: datetime) -> str:
    """A time for messages. Never an age: a status that changes by itself would be written for ever."""
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def engines(count: int) -> str:
    """`1 engine`, `2 engines`."""
    return f"{count} engine" if count == 1 else f"{count} engines"


def first_three(names: Sequence[str]) -> str:
    """`a; b; c and 2 more`."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return "; ".join(names[:3]) + more


def kind_of(step: Step) -> str:
    """Name of the one field that a step has set, in camelCase."""
    fields = step.model_dump(by_alias=True, exclude_none=True)
    return next(kind for kind in STEP_KINDS if kind in fields)


def hash_of(steps: Sequence[Step]) -> str:
    document = [step.model_dump(by_alias=True, exclude_none=True, mode="json") for step in steps]
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]

"""Routers that count, restart and die, as far as their answers tell: wire models from known traffic."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from finetune_operator.api.routes import (
    Arm,
    ArmCounters,
    EpochCounters,
    KeySample,
    Moments,
    RouterCounters,
)
from finetune_operator.core.statistics import AnalysisPlan, Evidence, GuardrailPlan, fold

ALIAS, STABLE, CANDIDATE, COMPARISON = "support", "aaaaaaaa", "bbbbbbbb", "bbbbbbbb:1"
REVISIONS = {Arm.STABLE: STABLE, Arm.CANDIDATE: CANDIDATE, Arm.SHADOW: CANDIDATE}
ERRORS = GuardrailPlan(name="errors").signal
_numbers = itertools.count(1)


@dataclass
class Worker:
    """One life of a worker process."""

    epoch: str = field(default_factory=lambda: f"worker-{next(_numbers)}")
    requests: dict[Arm, int] = field(default_factory=dict)
    errors: dict[Arm, int] = field(default_factory=dict)

    def serve(self, arm: Arm, requests: int, errors: int = 0) -> None:
        self.requests[arm] = self.requests.get(arm, 0) + requests
        self.errors[arm] = self.errors.get(arm, 0) + errors

    def wire(self) -> EpochCounters:
        arms = (
            arm_counters(arm, requests=requests, errors=self.errors[arm])
            for arm, requests in self.requests.items()
        )
        return EpochCounters(epoch=self.epoch, arms=tuple(arms))


@dataclass
class Router:
    """A replica: its workers and what it remembers of those that ended."""

    instance: str = field(default_factory=lambda: f"router-{next(_numbers)}")
    workers: list[Worker] = field(default_factory=lambda: [Worker(), Worker()])
    ended: list[Worker] = field(default_factory=list)

    def restart_worker(self, index: int) -> None:
        self.ended.append(self.workers[index])
        self.workers[index] = Worker()

    def kill(self, *, keeps_instance: bool) -> Router:
        """The replica that comes back; what the workers counted is lost."""
        return Router(instance=self.instance) if keeps_instance else Router()

    def answer(self) -> RouterCounters:
        lives = (*self.ended, *self.workers)
        return RouterCounters(
            instance=self.instance, version=1, epochs=tuple(worker.wire() for worker in lives)
        )


def arm_counters(
    arm: Arm,
    *,
    requests: int = 0,
    errors: int = 0,
    events: dict[str, int] | None = None,
    watched: dict[str, int] | None = None,
    seconds: Moments | None = None,
    scores: dict[str, Moments] | None = None,
    lengths: Sequence[int] = (),
    revision: str | None = None,
    alias: str = ALIAS,
) -> ArmCounters:
    return ArmCounters(
        alias=alias,
        arm=arm,
        revision=revision or REVISIONS[arm],
        requests=requests,
        events={ERRORS: errors} if events is None else events,
        watched=watched or {},
        seconds=seconds or Moments(),
        scores=scores or {},
        length_histogram=tuple(lengths),
    )


def answer(
    *arms: ArmCounters,
    epoch: str = "worker-a",
    instance: str = "router-a",
    samples: Sequence[KeySample] = (),
) -> RouterCounters:
    """An answer with one epoch."""
    return RouterCounters(
        instance=instance,
        version=1,
        epochs=(EpochCounters(epoch=epoch, arms=arms, samples=tuple(samples)),),
    )


def both(
    stable: tuple[int, int],
    candidate: tuple[int, int],
    *,
    epoch: str = "worker-a",
    instance: str = "router-a",
) -> RouterCounters:
    """An answer with (requests, errors) of both arms."""
    return answer(
        arm_counters(Arm.STABLE, requests=stable[0], errors=stable[1]),
        arm_counters(Arm.CANDIDATE, requests=candidate[0], errors=candidate[1]),
        epoch=epoch,
        instance=instance,
    )


def key_sample(stable: Sequence[int], candidate: Sequence[int], *, comparison: str = COMPARISON) -> KeySample:
    return KeySample(
        alias=ALIAS, comparison=comparison, stable=tuple(sorted(stable)), candidate=tuple(sorted(candidate))
    )


def folded(
    evidence: Evidence | None,
    *answers: RouterCounters,
    plan: AnalysisPlan | None = None,
    weight: float = 10.0,
    comparison: str = COMPARISON,
    rollout: str = "",
    share: float | None = None,
    is_settling: bool = False,
) -> Evidence:
    """`fold` with the names of this module."""
    return fold(
        evidence,
        answers,
        alias=ALIAS,
        stable_revision=STABLE,
        candidate_revision=CANDIDATE,
        plan=plan or AnalysisPlan(),
        weight=weight,
        comparison=comparison,
        rollout=rollout,
        share=share,
        is_settling=is_settling,
    )


def counted(evidence: Evidence) -> dict[Arm, tuple[int, int]]:
    """(requests, errors) by arm, for the arms that were counted."""
    totals = {arm: evidence.total(arm) for arm in Arm}
    return {
        arm: (int(total.get("requests", 0)), int(total.get(f"events/{ERRORS}", 0)))
        for arm, total in totals.items()
        if total
    }

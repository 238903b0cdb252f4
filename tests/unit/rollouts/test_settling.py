"""After a change of the weight, failures that end sooner than other answers are no proof of harm."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, cast

import pytest

from finetune_operator.adapters.kube import Kube
from finetune_operator.api.adapterdeployment_status import AdapterDeploymentStatus, CheckKind, Weights
from finetune_operator.api.routes import Route, RouterCounters, Target
from finetune_operator.core.rollout_facts import DeploymentFacts
from finetune_operator.reconcile.evidence import EvidenceBook
from finetune_operator.reconcile.fleet import Fleet
from tests.unit.rollouts.world import START, UID, spec_of
from tests.unit.statistics.fleets import ALIAS, CANDIDATE, STABLE, both


class Kept:
    """An API server that has no ConfigMap yet and takes all."""

    async def get(self, *_: str) -> None:
        return None

    async def create(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"metadata": {"resourceVersion": "1"}}

    apply = create


class Told:
    """Routers that tell one answer after the other."""

    def __init__(self) -> None:
        self.polls = 0
        self.answer = both((0, 0), (0, 0))

    def tell(self, answer: RouterCounters) -> None:
        self.polls, self.answer = self.polls + 1, answer

    def counters(self) -> Sequence[RouterCounters]:
        return [self.answer]

    async def poll(self) -> None:
        self.polls += 1

    def last_heard(self) -> datetime:
        return START


def facts(weight: float) -> DeploymentFacts:
    status = AdapterDeploymentStatus(
        rollout_start_time=START,
        last_progress_time=START,
        stable_revision=STABLE,
        candidate_revision=CANDIDATE,
        weights=Weights(stable=100 - weight, candidate=weight),
    )
    return DeploymentFacts("team", "bot", UID, 1, spec_of("b"), None, status)


def route(weight: float, mirror: float) -> Route:
    stable, candidate = (
        Target(revision=revision, served_name=f"bot--{revision}", upstreams=("http://e1:8000",))
        for revision in (STABLE, CANDIDATE)
    )
    return Route(
        alias=ALIAS, owner=f"team/bot/{UID}", stable=stable, candidate=candidate, weight=weight, mirror=mirror
    )


@pytest.mark.parametrize(("weight", "mirror"), [(50, 0), (0, 100)])
@pytest.mark.parametrize(("seconds", "proof"), [(30, False), (70, True)])
async def test_the_intended_share_counts_for_a_minute(
    weight: float, mirror: float, seconds: float, proof: bool
) -> None:
    now, told = START, Told()
    book = EvidenceBook(cast("Kube", Kept()), cast("Fleet", told), clock=lambda: now)
    deployment, published = facts(weight), route(weight, mirror)
    await book.begin(deployment, deployment.status, published)
    now += timedelta(seconds=seconds)
    told.tell(both((900, 10), (20, 10)))  # of the candidate, little but the failures has ended yet
    seen = await book.look(deployment, published)
    assert seen is not None
    (errors,) = [check for check in seen.checks if check.kind is CheckKind.GUARDRAIL]
    assert errors.e_value is not None
    assert (errors.e_value > 100) is proof

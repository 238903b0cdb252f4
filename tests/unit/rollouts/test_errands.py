"""Answers that took their time: to what they were asked, and to nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from finetune_operator.adapters.prometheus import Prometheus
from finetune_operator.adapters.webhooks import Alerts, Answer, Webhooks
from finetune_operator.api.adapterdeployment_analysis import MetricSpec
from finetune_operator.api.adapterdeployment_status import AdapterDeploymentStatus
from finetune_operator.api.adapterdeployment_strategy import WebhookSpec, WebhookType
from finetune_operator.core.rollout_facts import MEASURE, question
from finetune_operator.reconcile.errands import Errands
from tests.unit.rollouts.world import START

KEY = ("team", "bot")
INCREASE = WebhookType.CONFIRM_TRAFFIC_INCREASE


@dataclass
class Strangers:
    """Webhooks and a Prometheus that answer when they are let."""

    asked: list[Mapping[str, Any]] = field(default_factory=list)
    patience: list[float] = field(default_factory=list)
    let: asyncio.Event = field(default_factory=asyncio.Event)

    async def ask(self, url: str, payload: Mapping[str, Any], *, seconds: float) -> Answer:
        self.asked.append(payload)
        self.patience.append(seconds)
        await self.let.wait()
        return Answer(accepted=True, message="HTTP 200")

    async def query(self, address: str, query: str) -> float | None:
        await self.let.wait()
        return 7.0

    def errands(self) -> Errands:
        return Errands(
            prometheus=cast("Prometheus", self),
            webhooks=cast("Webhooks", self),
            alerts=cast("Alerts", None),
            wake=lambda key: None,
        )


def at(step: int, candidate: str = "bbbbbbbb") -> AdapterDeploymentStatus:
    return AdapterDeploymentStatus(
        candidate_revision=candidate,
        rollout_start_time=START,
        current_step_index=step,
        current_step_hash="h",
    )


def hook(kind: WebhookType) -> WebhookSpec:
    return WebhookSpec.model_validate({"name": "gate", "type": kind, "url": "http://hooks"})


async def test_a_yes_to_one_step_is_none_to_the_next() -> None:
    strangers = Strangers()
    errands = strangers.errands()
    first, second = question(at(0), INCREASE), question(at(2), INCREASE)
    errands.ask(KEY, [hook(INCREASE)], {"step": "1/4"}, question=first)
    errands.ask(KEY, [hook(INCREASE)], {"step": "1/4"}, question=first)
    await asyncio.sleep(0.01)
    assert len(strangers.asked) == 1, "the same is not asked twice at a time"
    strangers.let.set()
    await asyncio.sleep(0.01)
    assert errands.answers(KEY, {second}) == {}
    errands.ask(KEY, [hook(INCREASE)], {"step": "3/4"}, question=second)
    await asyncio.sleep(0.01)
    answers = errands.answers(KEY, {second})
    assert [answer.accepted for answer in answers.values()] == [True]
    errands.settle(KEY, (), answers)
    assert errands.answers(KEY, {first, second}) == {}


async def test_webhooks_without_a_name_are_told_apart_by_their_types() -> None:
    strangers = Strangers()
    strangers.let.set()
    errands = strangers.errands()
    hooks = [
        WebhookSpec.model_validate({"type": kind, "url": "http://hooks", **timeout})
        for kind, timeout in (
            (INCREASE, {}),
            (WebhookType.ROLLBACK, {"timeout": "1m"}),
            (WebhookType.CONFIRM_ROLLOUT, {"timeoutSeconds": 7}),
        )
    ]
    errands.ask(KEY, hooks, {}, question="q")
    await asyncio.sleep(0.01)
    assert set(errands.answers(KEY, {"q"})) == {"confirm-traffic-increase", "rollback", "confirm-rollout"}
    assert strangers.patience == [10.0, 60.0, 7.0]


async def test_a_question_that_hangs_keeps_no_other_one_from_being_asked() -> None:
    strangers = Strangers()
    errands = strangers.errands()
    for step in (0, 2):
        errands.ask(KEY, [hook(INCREASE)], {"step": step}, question=question(at(step), INCREASE))
    await asyncio.sleep(0.01)
    assert [payload["step"] for payload in strangers.asked] == [0, 2]
    strangers.let.set()
    await asyncio.sleep(0.01)


async def test_a_measurement_of_another_candidate_is_none_of_this_one() -> None:
    strangers = Strangers()
    errands = strangers.errands()
    prometheus = {"address": "http://prometheus", "query": "rate"}
    metric = MetricSpec.model_validate(
        {"name": "m", "prometheus": prometheus, "successCondition": "result < 1"}
    )
    errands.measure(KEY, [metric], {}, question=question(at(0), MEASURE))
    strangers.let.set()
    await asyncio.sleep(0.01)
    assert errands.measurements(KEY, {question(at(0, "cccccccc"), MEASURE)}) == ()
    made = errands.measurements(KEY, {question(at(2), MEASURE)})
    assert [one.value for one in made] == [7.0], "of the candidate, in whichever step"
    errands.settle(KEY, made, {})
    assert errands.measurements(KEY, {question(at(2), MEASURE)}) == ()


def test_a_candidate_is_wanted_back_in_whichever_step() -> None:
    assert question(at(0), WebhookType.ROLLBACK) == question(at(2), WebhookType.ROLLBACK)
    assert question(at(0), WebhookType.ROLLBACK) != question(at(0, "cccccccc"), WebhookType.ROLLBACK)

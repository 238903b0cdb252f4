"""Somebody else writes the object during each pass, as two controllers do that disagree on a label."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from finetune_operator import config, parts
from finetune_operator.adapters.api_errors import ConflictError
from finetune_operator.adapters.kube import Kube
from finetune_operator.adapters.telemetry import Telemetry
from finetune_operator.reconcile.adapterdeployment import CONFLICT_SECONDS, AdapterDeploymentReconciler
from finetune_operator.reconcile.emergencies import Emergencies
from finetune_operator.reconcile.queue import Key
from tests.integration.rollout_operator import GOOD, deployment

KEY = ("team", "bot")
Json = dict[str, Any]


class BusyKube:
    """`meddle` changes the object before the first write of a status."""

    def __init__(self, meddle: Callable[[Json], object]) -> None:
        self.body = deployment("bot", GOOD)
        self.body["metadata"] |= {"namespace": "team", "uid": "u", "generation": 1, "resourceVersion": "1"}
        self._meddle = meddle

    async def get(self, *_: Any) -> Json:
        return copy.deepcopy(self.body)

    async def patch_status(self, *_: Any, resource_version: str, patch: Json) -> None:
        metadata = self.body["metadata"]
        if metadata["resourceVersion"] == "1":
            self._meddle(self.body)
            metadata["resourceVersion"] = "2"
        if resource_version != metadata["resourceVersion"]:
            raise ConflictError("the object has been modified")
        self.body["status"] = patch

    async def create(self, *_: Any) -> Json:
        return {"metadata": {"resourceVersion": "1"}}


async def one_pass(kube: BusyKube) -> float | None:
    telemetry = Telemetry(CollectorRegistry())
    async with parts.build_rollouts(config.load({}), kube=cast("Kube", kube), telemetry=telemetry) as made:
        made.publisher._started.set()
        return await cast("AdapterDeploymentReconciler", made.queue._worker)(KEY)


async def test_what_nothing_was_decided_on_holds_up_no_status() -> None:
    kube = BusyKube(lambda body: body["metadata"].update(labels={"sync": "2"}))
    await one_pass(kube)
    assert kube.body["status"]["stage"] == "Loading"


@pytest.mark.parametrize(
    "meddle",
    [
        lambda body: body["metadata"].update(generation=2),
        lambda body: body["metadata"].update(annotations={"finetune.dev/action": "abort"}),
        lambda body: body["metadata"].update(deletionTimestamp="2026-01-01T00:00:00Z"),
        lambda body: body.update(status={"stage": "Failed"}),
    ],
)
async def test_anything_else_is_decided_anew_and_harm_is_looked_for_meanwhile(
    meddle: Callable[[Json], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Key] = []

    async def look(_: Emergencies, key: Key) -> None:
        looks.append(key)

    monkeypatch.setattr(Emergencies, "look", look)
    kube = BusyKube(meddle)
    assert await one_pass(kube) == CONFLICT_SECONDS
    assert kube.body.get("status", {}).get("stage") != "Loading"
    assert looks == [KEY]

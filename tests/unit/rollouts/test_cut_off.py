"""An API server that hangs: harm is looked for before and after each wait for it, not only once per try."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from prometheus_client import CollectorRegistry

from finetune_operator import config, parts
from finetune_operator.adapters.api_errors import ForbiddenError
from finetune_operator.adapters.kube import Kube
from finetune_operator.adapters.telemetry import Telemetry
from finetune_operator.reconcile import adapterdeployment
from finetune_operator.reconcile.adapterdeployment import AdapterDeploymentReconciler
from finetune_operator.reconcile.emergencies import Emergencies
from finetune_operator.reconcile.queue import Key

KEY = ("team", "bot")


class HangingKube:
    def __init__(self) -> None:
        self.waiting = 0
        self.hangs = True

    async def get(self, *_: Any) -> None:
        if self.hangs:
            self.waiting += 1
            await asyncio.sleep(60)


async def test_harm_is_looked_for_at_both_ends_of_each_wait(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kube = HangingKube()
    looks: list[int] = []

    async def look(_: Emergencies, key: Key) -> None:
        assert key == KEY
        looks.append(kube.waiting)

    monkeypatch.setattr(adapterdeployment, "READ_SECONDS", 0.05)
    monkeypatch.setattr(Emergencies, "look", look)
    telemetry = Telemetry(CollectorRegistry())
    async with parts.build_rollouts(config.load({}), kube=cast("Kube", kube), telemetry=telemetry) as made:
        reconciler = cast("AdapterDeploymentReconciler", made.queue._worker)
        made.publisher._started.set()
        await reconciler(KEY)
        assert looks == [1]
        await reconciler(KEY)
        assert looks == [1, 1, 2]
        assert len([line for line in caplog.messages if "team/bot" in line]) == 1, "it is tried each second"
        kube.hangs = False
        await reconciler(KEY)  # the object is gone
        await reconciler(KEY)
        assert looks == [1, 1, 2, 2], "no more once the API server answers"


async def test_what_the_api_server_refuses_is_a_line_of_the_log_without_a_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    kube = HangingKube()
    kube.get = _refuse  # type: ignore[method-assign]
    telemetry = Telemetry(CollectorRegistry())
    async with parts.build_rollouts(config.load({}), kube=cast("Kube", kube), telemetry=telemetry) as made:
        await made.queue._serve(KEY)
    (record,) = [record for record in caplog.records if "team/bot" in record.getMessage()]
    assert "no right" in record.getMessage()
    assert record.exc_info is None


async def _refuse(*_: Any) -> None:
    raise ForbiddenError("no right")

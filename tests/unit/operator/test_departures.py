"""Jobs whose deletion no watch told."""

from __future__ import annotations

import asyncio

import pytest

from finetune_operator.adapters.api_errors import ApiError
from finetune_operator.adapters.sightings import Sightings
from finetune_operator.reconcile import departures
from finetune_operator.reconcile.departures import Departures
from finetune_operator.reconcile.queue import Key
from tests.unit.operator.memory_api import KEY, Stage
from tests.waiting import until


def departures_of(stage: Stage, woken: list[Key]) -> Departures:
    return Departures(
        kube=stage.api, namespaces=[KEY[0]], shown=stage.reconcile.telemetry.shown_jobs, wake=woken.append
    )


async def test_the_series_of_a_job_go_though_no_watch_told_of_its_end() -> None:
    stage, woken = Stage(), list[Key]()
    await stage.passes(2)
    assert stage.reconcile.telemetry.shown_jobs() == {KEY}
    await departures_of(stage, woken).look()
    assert woken == [], "it is there"
    stage.api.remove("finetunejobs", KEY[1], told=False)
    stage.api.sightings = Sightings()  # nothing was heard of it for minutes
    await departures_of(stage, woken).look()
    assert woken == [KEY]
    await stage.reconcile(KEY)
    assert stage.reconcile.telemetry.shown_jobs() == set()


async def test_an_api_server_that_is_away_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(departures, "LOOK_SECONDS", 0.01)
    stage, woken = Stage(), list[Key]()
    await stage.passes(2)
    stage.api.remove("finetunejobs", KEY[1], told=False)
    failures = iter([ApiError("away")] * 3)
    stage.api.before = lambda method, path: next(failures, None)
    looking = asyncio.create_task(departures_of(stage, woken).run())
    await until(lambda: bool(woken))
    looking.cancel()
    assert next(failures, None) is None, "three looks failed before"


async def test_a_fault_of_its_own_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(departures, "LOOK_SECONDS", 0.01)
    stage, woken = Stage(), list[Key]()
    await stage.passes(2)
    stage.api.remove("finetunejobs", KEY[1], told=False)
    faults = iter([TypeError("'NoneType' object is not iterable")])
    stage.api.before = lambda method, path: next(faults, None)
    looking = asyncio.create_task(departures_of(stage, woken).run())
    await until(lambda: bool(woken))
    looking.cancel()
    assert "'NoneType' object is not iterable" in caplog.text

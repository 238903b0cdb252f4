"""Events of jobs: posted in the background, in order, and never more than fit."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest

from finetune_operator.adapters.api_errors import ApiError
from finetune_operator.adapters.kube import Json
from finetune_operator.core.facts import Event
from finetune_operator.reconcile import events
from finetune_operator.reconcile.events import Recorder
from tests.unit.operator.memory_api import MemoryApi
from tests.unit.operator.stories import START
from tests.waiting import until

JOB: Json = {"kind": "FineTuneJob", "metadata": {"name": "a", "namespace": "team", "uid": "u"}}


class Posted(MemoryApi):
    """Keeps the reasons of the events that it was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.reasons: list[str] = []
        self.answers = asyncio.Event()
        self.answers.set()

    async def create(self, body: Json) -> Json:
        await self.answers.wait()
        answer: Json = await super().create(body)
        self.reasons.append(body["reason"])
        return answer


def record(recorder: Recorder, *reasons: str) -> None:
    for reason in reasons:
        recorder.record(JOB, Event(warning=False, reason=reason, message="x"), now=START)


async def stop(task: asyncio.Task[Any]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_events_are_posted_in_order_and_one_that_is_refused_is_lost(
    caplog: pytest.LogCaptureFixture,
) -> None:
    api = Posted()
    numbers = itertools.count()
    api.before = lambda method, path: ApiError("no such namespace") if next(numbers) == 1 else None
    recorder = Recorder(api)
    task = asyncio.create_task(recorder.run())
    record(recorder, "A", "B", "C")
    await until(lambda: api.reasons == ["A", "C"])
    record(recorder, "D")
    await until(lambda: api.reasons == ["A", "C", "D"])
    await stop(task)
    assert "event B could not be posted: no such namespace" in caplog.text


async def test_what_waits_at_the_end_is_still_posted() -> None:
    api = Posted()
    recorder = Recorder(api)
    task = asyncio.create_task(recorder.run())
    api.answers.clear()
    record(recorder, "A", "B")
    await asyncio.sleep(0.02)
    task.cancel()
    await asyncio.sleep(0.02)
    api.answers.set()
    await asyncio.gather(task, return_exceptions=True)
    assert sorted(api.reasons) == ["A", "B"]


async def test_an_api_server_that_does_not_answer_is_not_waited_for_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(events, "LAST_SECONDS", 0.05)
    api = Posted()
    api.answers.clear()
    recorder = Recorder(api)
    task = asyncio.create_task(recorder.run())
    record(recorder, "A")
    await asyncio.sleep(0.02)
    async with asyncio.timeout(5):
        await stop(task)
    assert api.reasons == []


def test_the_oldest_are_lost_where_too_many_wait(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(events, "MOST_WAITING", 2)
    api = Posted()
    recorder = Recorder(api)
    record(recorder, "A", "B", "C")
    asyncio.run(recorder.flush())
    assert api.reasons == ["B", "C"]
    assert "event A is not posted" in caplog.text

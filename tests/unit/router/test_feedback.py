"""The feedback store: each value once, sums that survive."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
import time
from pathlib import Path

import pytest

from finetune_operator.api import routes as wire
from finetune_operator.api.routes import Arm
from finetune_router.__main__ import prune
from finetune_router.counters import Book
from finetune_router.errors import ApiError
from finetune_router.feedback import (
    FILE_NAME,
    METRICS_PER_ALIAS,
    SECONDS_PER_DAY,
    Feedback,
    FeedbackDesk,
    FeedbackStore,
)
from finetune_router.tables import Change, SchemaCache, Table, TableBuilder
from finetune_router.tickets import TicketOffice
from finetune_router.upstreams import Upstreams

OFFICE = TicketOffice(b"0123456789abcdef")


def mint(arm: Arm = Arm.CANDIDATE, *, counted: bool = True) -> str:
    return "chatcmpl-" + OFFICE.mint(b"bot", arm, b"ab12cd34", counted=counted)


def body(response_id: str, value: object, **more: object) -> bytes:
    return json.dumps({"response_id": response_id, "metric": "helpful", "value": value} | more).encode()


def scores(store: FeedbackStore) -> dict[tuple[str, str], tuple[int, float, float]]:
    return {
        (arm.arm, metric): (moments.n, moments.sum, moments.sum_squares)
        for arm in store.sums().arms
        for metric, moments in arm.scores.items()
    }


def groups_of(store: FeedbackStore) -> dict[int, tuple[int, float]]:
    """Count and sum by group of keys, of all that is stored."""
    told = [moments.groups for arm in store.sums().arms for moments in arm.scores.values()]
    return {number: sums for groups in told for number, sums in enumerate(groups) if sums[0]}


@pytest.fixture
def desk(tmp_path: Path) -> FeedbackDesk:
    return FeedbackDesk(FeedbackStore(tmp_path), OFFICE, days=90)


async def test_a_later_value_replaces_the_former(tmp_path: Path, desk: FeedbackDesk) -> None:
    response = mint()
    assert (await desk.take(body(response, True), Table())).is_new
    assert not (await desk.take(body(response, True), Table())).is_new
    assert scores(FeedbackStore(tmp_path)) == {("Candidate", "helpful"): (1, 1.0, 1.0)}
    assert not (await desk.take(body(response.removeprefix("chatcmpl-"), 0.5), Table())).is_new
    assert (await desk.take(body(mint(), False), Table())).is_new
    assert (await desk.take(body(mint(Arm.STABLE), 4), Table())).is_new
    assert scores(FeedbackStore(tmp_path)) == {
        ("Candidate", "helpful"): (2, 0.5, 0.25),
        ("Stable", "helpful"): (1, 4.0, 16.0),
    }


async def test_a_file_that_cannot_be_written_yet_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Requests must be answered meanwhile, also by a worker that starts on a disk that is full or read-only."""
    monkeypatch.setattr("finetune_router.feedback._BUSY_SECONDS", 0.1)
    folder = tmp_path / "state"
    desk = FeedbackDesk(FeedbackStore(folder), OFFICE, days=90)
    for _ in range(3):
        with pytest.raises(ApiError) as refused:
            await desk.take(body(mint(), True), Table())
        assert refused.value.code == "store_unavailable"
    assert len([line for line in caplog.messages if "cannot be stored" in line]) == 1, "once, not each time"
    folder.mkdir()
    assert (await desk.take(body(mint(), True), Table())).is_new


async def test_the_epoch_of_a_store_is_its_own_for_ever(tmp_path: Path, desk: FeedbackDesk) -> None:
    await desk.take(body(mint(), True), Table())
    first, again = FeedbackStore(tmp_path).sums(), FeedbackStore(tmp_path).sums()
    assert first == again
    assert first.epoch.startswith("feedback-")


async def test_pinned_requests_are_stored_and_not_counted(tmp_path: Path, desk: FeedbackDesk) -> None:
    outcome = await desk.take(body(mint(counted=False), True), Table())
    assert outcome.is_new
    assert json.loads(outcome.body)["counted"] is False
    assert scores(FeedbackStore(tmp_path)) == {}


async def test_only_what_the_route_asks_for_is_summed_by_group(tmp_path: Path, desk: FeedbackDesk) -> None:
    """Clients choose the names of metrics, and 32 sums for each of them would take room."""
    target = wire.Target(revision="base", served_name="base-model", upstreams=("http://e:1",))
    route = wire.Route(alias="bot", owner="o", stable=target, grouped=("scores/helpful",))
    builder = TableBuilder(upstreams=Upstreams(), book=Book(), schemas=SchemaCache())
    table = await builder.build(Change(1, [route.model_dump(mode="json", by_alias=True)], [], []))
    text = OFFICE.mint(b"bot", Arm.STABLE, b"base", counted=True, group=9)
    await desk.take(body(text, 3, metric="polite"), table)
    assert groups_of(FeedbackStore(tmp_path)) == {}
    await desk.take(body(text, 3), table)
    await desk.take(body(OFFICE.mint(b"bot", Arm.STABLE, b"base", counted=False, group=9), 3), table)
    assert groups_of(FeedbackStore(tmp_path)) == {9: (1, 3.0)}
    await desk.take(body(text, 1), table)
    assert groups_of(FeedbackStore(tmp_path)) == {9: (1, 1.0)}, "the later value replaces the former"


async def test_an_idempotency_key_counts_once(tmp_path: Path, desk: FeedbackDesk) -> None:
    response = mint()
    assert (await desk.take(body(response, 1, idempotency_key="k"), Table())).is_new
    assert not (await desk.take(body(response, 0, idempotency_key="k"), Table())).is_new
    assert scores(FeedbackStore(tmp_path)) == {("Candidate", "helpful"): (1, 1.0, 1.0)}


async def test_an_idempotency_key_is_one_of_its_response_and_metric(
    tmp_path: Path, desk: FeedbackDesk
) -> None:
    """Clients choose them: `1` of one client has nothing to do with `1` of another."""
    first, second = mint(), mint(Arm.STABLE)
    assert (await desk.take(body(first, 1, idempotency_key="1"), Table())).is_new
    assert (await desk.take(body(second, 0, idempotency_key="1"), Table())).is_new
    assert (await desk.take(body(first, 0, metric="polite", idempotency_key="1"), Table())).is_new
    assert scores(FeedbackStore(tmp_path)) == {
        ("Candidate", "helpful"): (1, 1.0, 1.0),
        ("Candidate", "polite"): (1, 0.0, 0.0),
        ("Stable", "helpful"): (1, 0.0, 0.0),
    }


async def test_the_file_of_an_older_router_is_taken_over(tmp_path: Path, desk: FeedbackDesk) -> None:
    old = mint()
    assert (await desk.take(body(old, 1, idempotency_key="1"), Table())).is_new
    with sqlite3.connect(tmp_path / FILE_NAME) as database:
        database.execute(
            "CREATE UNIQUE INDEX records_by_key ON records (idempotency_key) WHERE idempotency_key IS NOT NULL"
        )
    database.close()
    again = FeedbackDesk(FeedbackStore(tmp_path), OFFICE, days=90)
    assert not (await again.take(body(old, 0, idempotency_key="1"), Table())).is_new
    assert (await again.take(body(mint(), 0, idempotency_key="1"), Table())).is_new
    assert scores(FeedbackStore(tmp_path)) == {("Candidate", "helpful"): (2, 1.0, 1.0)}


async def test_request_id_does_as_well(desk: FeedbackDesk) -> None:
    data = json.dumps({"request_id": mint().removeprefix("chatcmpl-"), "metric": "helpful", "value": True})
    assert (await desk.take(data.encode(), Table())).is_new


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"response_id": "chatcmpl-123"}, "not an id of this router"),
        ({"response_id": ""}, "either response_id or request_id"),
        ({"request_id": "x"}, "either response_id or request_id"),
        ({"metric": "no spaces"}, "letters, digits"),
        ({"metric": "x" * 64}, "at most 63"),
        ({"value": "yes"}, "value"),
        ({"value": 1e12}, "between -1e9 and 1e9"),
        ({"value": 10**400}, "between -1e9 and 1e9"),
        ({"value": None}, "value"),
        ({"other": 1}, "other"),
    ],
)
async def test_bad_feedback_is_told_what_is_wrong(
    desk: FeedbackDesk, change: dict[str, object], said: str
) -> None:
    document = {"response_id": mint(), "metric": "helpful", "value": 1.0, **change}
    with pytest.raises(ApiError) as caught:
        await desk.take(json.dumps(document).encode(), Table())
    assert caught.value.status == 400
    assert said in caught.value.message


@pytest.mark.parametrize("value", [b"Infinity", b"-Infinity", b"NaN"])
async def test_infinity_is_no_value(desk: FeedbackDesk, value: bytes) -> None:
    data = body(mint(), 1).replace(b'"value": 1', b'"value": ' + value)
    with pytest.raises(ApiError, match="value"):
        await desk.take(data, Table())


@pytest.mark.parametrize("counted", [True, False], ids=["drawn", "pinned"])
async def test_clients_cannot_make_up_metrics_without_end(
    tmp_path: Path, desk: FeedbackDesk, counted: bool
) -> None:
    """Each is a label in the metrics of every worker, also where the answer is no part of the comparison."""
    for number in range(METRICS_PER_ALIAS):
        await desk.take(body(mint(counted=counted), 1, metric=f"m{number}"), Table())
    with pytest.raises(ApiError, match="50 metrics already"):
        await desk.take(body(mint(counted=counted), 1, metric="one-more"), Table())
    await desk.take(body(mint(counted=counted), 1, metric="m3"), Table())
    assert len(scores(FeedbackStore(tmp_path))) == (METRICS_PER_ALIAS if counted else 0)


async def test_old_records_go_and_sums_stay(tmp_path: Path, desk: FeedbackDesk) -> None:
    await desk.take(body(mint(), True), Table())
    store = FeedbackStore(tmp_path)
    assert store.prune(1) == 0
    assert store.prune(-1) == 1
    assert scores(store) == {("Candidate", "helpful"): (1, 1.0, 1.0)}


async def test_an_answer_whose_record_may_be_deleted_gets_no_value_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = FeedbackStore(tmp_path)
    desk = FeedbackDesk(store, OFFICE, days=2)
    response = mint()
    assert (await desk.take(body(response, True), Table())).is_new
    later = time.time() + 2 * SECONDS_PER_DAY + 60
    monkeypatch.setattr("finetune_router.feedback.time.time", lambda: later)
    assert store.prune(2) == 1
    with pytest.raises(ApiError, match=r"more than 2 days old \(--feedback-days\)") as refused:
        await desk.take(body(response, True), Table())
    assert refused.value.status == 400
    assert scores(store) == {("Candidate", "helpful"): (1, 1.0, 1.0)}


async def test_pruning_goes_on_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    class Store:
        calls = 0

        def prune(self, days: int) -> int:
            self.calls += 1
            raise sqlite3.OperationalError("database is locked")

    monkeypatch.setattr("finetune_router.__main__._PRUNE_SECONDS", 0.0)
    store = Store()
    task = asyncio.create_task(prune(store, 90))  # type: ignore[arg-type]
    async with asyncio.timeout(5):
        while store.calls < 2:
            assert not task.done()
            await asyncio.sleep(0.01)
    task.cancel()


async def test_a_file_that_is_no_database_is_put_aside(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"x" * 8192)
    (tmp_path / f"{FILE_NAME}-wal").write_bytes(b"y" * 8192)
    desk = FeedbackDesk(FeedbackStore(tmp_path), OFFICE, days=90)
    assert (await desk.take(body(mint(), True), Table())).is_new
    assert scores(FeedbackStore(tmp_path)) == {("Candidate", "helpful"): (1, 1.0, 1.0)}
    assert (tmp_path / f"{FILE_NAME}.broken").read_bytes() == b"x" * 8192


def test_several_writers_lose_nothing(tmp_path: Path) -> None:
    """Workers are processes; here threads with a connection each, which SQLite treats alike."""

    def write(group: int) -> None:
        store = FeedbackStore(tmp_path)
        for _ in range(50):
            text = OFFICE.mint(b"bot", Arm.STABLE, b"base", counted=True, group=group)
            feedback = Feedback(response_id=text, metric="helpful", value=True)
            store.put(text, OFFICE.read(text), feedback, is_grouped=True)

    threads = [threading.Thread(target=write, args=(group,)) for group in (0, 7, 7, 31)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert scores(FeedbackStore(tmp_path)) == {("Stable", "helpful"): (200, 200.0, 200.0)}
    assert groups_of(FeedbackStore(tmp_path)) == {0: (50, 50.0), 7: (100, 100.0), 31: (50, 50.0)}

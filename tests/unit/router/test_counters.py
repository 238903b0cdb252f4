"""What a worker counts, what the parent makes of it, and what Prometheus sees."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from finetune_operator.adapters.routers import COUNTERS_BYTES
from finetune_operator.api.routes import (
    GROUPS,
    Arm,
    ArmCounters,
    EpochCounters,
    KeySample,
    Moments,
    RouterCounters,
)
from finetune_router import counters, exposition
from finetune_router import ledger as ledgers
from finetune_router.counters import CANDIDATE_BIT, STABLE_BIT, Book, Histogram, RunningMoments, Sample
from finetune_router.exposition import Gauges, MetricsBoard, RouterCollector
from finetune_router.ledger import Ledger

NOTHING = EpochCounters(epoch="feedback-1")


@given(st.lists(st.integers(0, 400)), st.integers(1, 30))
def test_the_sample_is_the_smallest_distinct_hashes(values: list[int], limit: int) -> None:
    sample = Sample("bot", "c1", limit)
    for value in values:
        sample.add(value, CANDIDATE_BIT if value % 3 == 0 else STABLE_BIT)
    smallest = sorted(set(values))[:limit]
    wire = KeySample.model_validate(sample.wire())
    assert sorted(wire.stable + wire.candidate) == smallest
    assert all(value % 3 == 0 for value in wire.candidate)


def test_a_key_seen_on_both_arms_is_in_both_samples() -> None:
    sample = Sample("bot", "c1")
    assert sample.add(5, STABLE_BIT)
    assert not sample.add(5, STABLE_BIT)
    assert sample.add(5, CANDIDATE_BIT)
    assert (sample.wire()["stable"], sample.wire()["candidate"]) == ([5], [5])


def test_another_comparison_starts_another_sample() -> None:
    book = Book()
    book.sample("bot", "c1").add(1, STABLE_BIT)
    assert book.sample("bot", "c1").wire()["stable"] == [1]
    assert book.sample("bot", "c2").wire()["stable"] == []


def test_lengths_fall_into_powers_of_two() -> None:
    state = counters.ArmState("bot", Arm.STABLE, "base")
    for count in (0, 1, 2, 3, 4, 7, 8, 2**14 - 1, 2**14, 10**9):
        state.add_tokens(count)
    wire = ArmCounters.model_validate(state.wire())
    assert wire.length_histogram == (1, 1, 2, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 2)
    assert wire.completion_tokens.n == 10


def test_moments_and_histograms() -> None:
    moments = RunningMoments()
    histogram = Histogram((0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 2.0):
        moments.add(value)
        histogram.add(value)
    assert (moments.n, moments.sum) == (4, 2.65)
    assert abs(moments.sum_squares - (0.0025 + 0.01 + 0.25 + 4)) < 1e-12
    assert histogram.counts == [2, 1, 1]  # the bounds belong to their buckets, as in Prometheus


def test_sums_by_group_are_told_from_the_first_value_that_has_a_group() -> None:
    moments = RunningMoments()
    moments.add(5.0)
    assert "groups" not in moments.wire(), "a thousand aliases have no use for 32 zeros each"
    for value, group in ((1.0, 3), (2.0, 3), (4.0, 31)):
        moments.add(value, group)
    wire = Moments.model_validate(moments.wire())
    assert (wire.n, wire.sum) == (4, 12.0)
    assert len(wire.groups) == GROUPS
    assert {number: sums for number, sums in enumerate(wire.groups) if sums[0]} == {3: (2, 3.0), 31: (1, 4.0)}


def report(book: Book, **more: Any) -> dict[str, Any]:
    """All parts of a report as one message, over JSON as between the processes."""
    parts = list(book.take_reports())
    message = {
        "arms": [arm for part in parts for arm in part.arms],
        "samples": [sample for part in parts for sample in part.samples],
        "metrics": [metrics for part in parts for metrics in part.metrics],
        "forgotten": [key for part in parts for key in part.forgotten],
        "feedback": None,
        **more,
    }
    carried: dict[str, Any] = json.loads(json.dumps(message))
    return carried


def count_requests(book: Book, number: int, *, alias: str = "bot") -> None:
    state = book.state(alias, Arm.STABLE, "base")
    state.requests += number
    book.changed_states.add(state)
    metrics = book.metrics(alias, "Stable", "base")
    for _ in range(number):
        metrics.add_code(200)
        metrics.duration.add(0.2)
    book.changed_metrics.add(metrics)


def told(ledger: Ledger) -> RouterCounters:
    return RouterCounters.model_validate_json(ledger.wire(instance="i", version=1, feedback=NOTHING))


def test_an_ended_epoch_keeps_its_counts_over_a_restart_of_the_router(tmp_path: Path) -> None:
    ledger, book = Ledger(tmp_path), Book()
    first = ledger.begin("worker-1")
    count_requests(book, 3)
    ledger.update(first, report(book))
    count_requests(book, 2)
    ledger.update(first, report(book))
    ledger.update(first, report(book))  # nothing new: nothing changes
    ledger.end("worker-1")
    ledger.update(ledger.begin("worker-2"), report(Book()))
    ledger.save()
    again = Ledger(tmp_path)
    again.load()
    for kept in (ledger, again):
        wire = told(kept)
        counts = {epoch.epoch: sum(arm.requests for arm in epoch.arms) for epoch in wire.epochs}
        assert counts["worker-1"] == 5


def test_broken_epochs_on_disk_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "epochs.json").write_text('{"epochs": [{"nope": 1}]}')
    ledger = Ledger(tmp_path)
    ledger.load()
    assert [epoch for epoch in told(ledger).epochs if epoch.arms or epoch.samples] == []


def scrape(board: MetricsBoard) -> str:
    registry = CollectorRegistry()
    registry.register(RouterCollector(board, Gauges(workers=1, in_flight=0, restarts=0, version=3, unread=0)))
    return generate_latest(registry).decode()


def test_no_counter_goes_back_when_a_worker_dies() -> None:
    board, first, second = MetricsBoard(), Book(), Book()
    count_requests(first, 3)
    count_requests(second, 4)
    board.update("a", report(first, feedback=[["bot", "Stable", "helpful", 2]]))
    board.update("b", report(second))
    line = 'adapter_router_requests_total{alias="bot",arm="Stable",code="200",revision="base"} 7.0'
    assert line in scrape(board)
    board.end("a")
    text = scrape(board)
    assert line in text
    assert 'adapter_router_feedback_total{alias="bot",arm="Stable",metric="helpful"} 2.0' in text
    assert 'adapter_router_request_duration_seconds_bucket{alias="bot",arm="Stable",le="0.25"} 7.0' in text
    assert 'adapter_router_request_duration_seconds_bucket{alias="bot",arm="Stable",le="0.1"} 0.0' in text


def test_the_first_thousand_aliases_have_a_label_of_their_own() -> None:
    board, book = MetricsBoard(), Book()
    for number in range(1200):
        count_requests(book, 1, alias=f"bot-{number}")
    board.update("a", report(book))
    lines = [line for line in scrape(board).splitlines() if line.startswith("adapter_router_requests_total")]
    assert len(lines) == exposition.ALIAS_LIMIT + 1
    assert f'{{alias="{exposition.OTHER}",arm="Stable",code="200",revision=""}} 200.0' in "\n".join(lines)


def test_series_of_gone_revisions_are_dropped_after_an_hour_and_evidence_is_not() -> None:
    board, book = MetricsBoard(), Book()
    count_requests(book, 1)
    board.update("a", report(book))
    book.forget_gone(set(), now=0.0)
    book.forget_gone({("bot", "base")}, now=3000.0)  # it came back
    book.forget_gone(set(), now=4000.0)
    book.forget_gone(set(), now=7599.0)
    assert not report(book)["forgotten"]
    book.forget_gone(set(), now=7601.0)
    board.update("a", report(book))
    assert 'alias="bot"' not in scrape(board)
    assert book.state("bot", Arm.STABLE, "base").requests == 1


def test_a_report_in_the_midst_of_another_one_has_all_that_is_left() -> None:
    """The periodic one takes its time; who asks for counters meanwhile must get all of them."""
    book, names = Book(), {f"bot-{number}" for number in range(3 * counters.REPORT_PART + 1)}
    for name in names:
        count_requests(book, 1, alias=name)
        see_keys(book, "c1", [1], alias=name)
    periodic = book.take_reports()
    parts = [next(periodic)]
    count_requests(book, 1, alias="bot-0")
    parts += book.take_reports()
    assert {arm["alias"] for part in parts for arm in part.arms} == names
    assert {sample["alias"] for part in parts for sample in part.samples} == names
    assert [arm["requests"] for part in parts for arm in part.arms if arm["alias"] == "bot-0"][-1] == 2
    assert [part for part in periodic if part.arms or part.samples or part.metrics] == []
    assert all(len(part.arms) <= counters.REPORT_PART for part in parts)


def test_samples_of_several_workers_make_one_sample() -> None:
    """The promise of k minimum values: the union of two samples, cut to the limit, is the sample of the union."""
    generator = random.Random(7)
    values = [generator.getrandbits(53) for _ in range(5000)]
    whole, one, other = Sample("b", "c", 64), Sample("b", "c", 64), Sample("b", "c", 64)
    for number, value in enumerate(values):
        whole.add(value, STABLE_BIT)
        (one if number % 3 else other).add(value, STABLE_BIT)
    samples = [KeySample.model_validate(sample.wire()).stable for sample in (one, other, whole)]
    assert tuple(sorted({*samples[0], *samples[1]})[:64]) == samples[2]


@given(st.lists(st.tuples(st.integers(0, 100), st.sampled_from([STABLE_BIT, CANDIDATE_BIT]), st.booleans())))
def test_the_parent_has_the_workers_sample(steps: list[tuple[int, int, bool]]) -> None:
    """Only what is new goes over the line."""
    book, ledger = Book(), Ledger(Path("nowhere"))
    epoch = ledger.begin("worker-1")
    sample = book.sample("bot", "c1")
    for value, bit, is_report_due in steps:
        if sample.add(value, bit):
            book.changed_samples.add(sample)
        if is_report_due:
            ledger.update(epoch, report(book))
    ledger.update(epoch, report(book))
    assert samples_of(ledger) == [KeySample.model_validate(sample.wire())]


def samples_of(ledger: Ledger) -> list[KeySample]:
    return [sample for epoch in told(ledger).epochs for sample in epoch.samples]


def see_keys(book: Book, comparison: str, keys: Iterable[int], *, alias: str = "bot") -> None:
    sample = book.sample(alias, comparison)
    for key in keys:
        if sample.add(key, STABLE_BIT):
            book.changed_samples.add(sample)


def test_of_a_comparison_there_is_one_sample_and_it_survives_workers_and_restarts(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.compare({"bot": "c1"})
    for number, keys in enumerate(([1, 2], [2, 3], [9])):
        book = Book()
        count_requests(book, 1)
        see_keys(book, "c1", keys)
        ledger.update(ledger.begin(f"worker-{number}"), report(book))
        if number < 2:
            ledger.end(f"worker-{number}")
    assert [sample.stable for sample in samples_of(ledger)] == [(1, 2, 3, 9)]
    ledger.save()
    again = Ledger(tmp_path)
    again.load()
    again.compare({"bot": "c1", "other": ""})
    assert samples_of(again) == samples_of(ledger)


def test_samples_of_comparisons_that_are_over_are_dropped(tmp_path: Path) -> None:
    ledger, book = Ledger(tmp_path), Book()
    epoch = ledger.begin("worker-1")
    ledger.compare({"bot": "c1"})
    see_keys(book, "c1", [1])
    ledger.update(epoch, report(book))
    ledger.compare({"bot": "c2"})
    assert samples_of(ledger) == []
    see_keys(book, "c1", [2])  # of a worker that has not applied the snapshot yet
    ledger.update(epoch, report(book))
    assert samples_of(ledger) == []
    see_keys(book, "c2", [3])
    ledger.update(epoch, report(book))
    assert [sample.stable for sample in samples_of(ledger)] == [(3,)]
    ledger.compare({"bot": ""})
    assert samples_of(ledger) == []


def test_the_epochs_of_an_older_router_are_read(tmp_path: Path) -> None:
    sample = KeySample(alias="bot", comparison="c1", stable=(1, 2), candidate=(3,))
    arm = ArmCounters(alias="bot", arm=Arm.STABLE, revision="base", requests=4)
    old = EpochCounters(epoch="worker-1", arms=(arm,), samples=(sample,))
    (tmp_path / "epochs.json").write_text(
        json.dumps({"epochs": [old.model_dump(mode="json", by_alias=True)]})
    )
    ledger = Ledger(tmp_path)
    ledger.load()
    assert samples_of(ledger) == [sample]
    assert [arms for epoch in told(ledger).epochs for arms in epoch.arms] == [arm]


@pytest.mark.parametrize("groups", [0, GROUPS], ids=["no objectives", "three objectives each"])
def test_the_answer_to_the_operator_stays_small_with_many_aliases_and_many_lives(
    tmp_path: Path, groups: int
) -> None:
    """All thousand aliases in a rollout, with full samples; 40 workers have died."""
    aliases = [f"tenant-{number}-support-bot" for number in range(1000)]
    ledger = Ledger(tmp_path)
    ledger.compare(dict.fromkeys(aliases, "ab12cd34:20261129T120000Z:20"))
    generator = random.Random(3)
    keys = [generator.getrandbits(53) for _ in range(1024)]
    book = Book()
    for alias in aliases:
        see_keys(book, "ab12cd34:20261129T120000Z:20", keys, alias=alias)
        for arm, revision in ((Arm.STABLE, "11112222"), (Arm.CANDIDATE, "ab12cd34")):
            state = book.state(alias, arm, revision)
            state.requests = 123_456
            state.events = {"errors": 1234, "slow-ttft": 567, "refusal": 89}
            for group in range(groups) or (None,) * 3:
                state.seconds.add(generator.random(), group)
                state.ttft.add(generator.random(), group)
                state.add_tokens(generator.randrange(500), group)
            book.changed_states.add(state)
    parts = list(book.take_reports())
    message = {
        "arms": [arm for part in parts for arm in part.arms],
        "samples": [s for part in parts for s in part.samples],
    }
    for number in range(41):
        told_keys = message["samples"] if number == 0 else []
        ledger.update(ledger.begin(f"worker-{number:032}"), {**message, "samples": told_keys})
        if number < 40:
            ledger.end(f"worker-{number:032}")
    began = time.process_time()
    body = ledger.wire(instance="i", version=1, feedback=NOTHING)
    seconds = time.process_time() - began
    assert len(body) < COUNTERS_BYTES / 2, f"{len(body) / 2**20:.0f} MiB"
    assert seconds < 2.0  # of the parent, while the operator waits
    assert body.count(b'"limit":1024') == 1000
    ledger.compare(dict.fromkeys(aliases, ""))
    without = ledger.wire(instance="i", version=1, feedback=NOTHING)
    print(f"{len(body) / 2**20:.1f} MiB in {seconds:.2f} s; {len(without) / 2**20:.1f} MiB without samples")
    assert len(body) - len(without) < COUNTERS_BYTES / 3


def test_of_ended_lives_the_newest_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledgers, "MOST_ENDED_ARMS", 25)
    ledger, book = Ledger(tmp_path), Book()
    for number in range(10):
        count_requests(book, 1, alias=f"bot-{number}")
    message = report(book)
    for number in range(5):
        ledger.update(ledger.begin(f"worker-{number}"), message)
        ledger.end(f"worker-{number}")
    assert [epoch.epoch for epoch in told(ledger).epochs if epoch.arms] == ["worker-3", "worker-4"]

"""What a worker counts, what the parent makes of it, and what Prometheus sees."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest

from finetune_operator.api.routes import Arm, ArmCounters, EpochCounters, KeySample
from finetune_router import counters, exposition
from finetune_router.counters import CANDIDATE_BIT, STABLE_BIT, Book, Histogram, RunningMoments, Sample
from finetune_router.exposition import Gauges, MetricsBoard, RouterCollector
from finetune_router.ledger import Epoch, Ledger

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


def test_an_ended_epoch_keeps_its_counts_over_a_restart_of_the_router(tmp_path: Path) -> None:
    ledger, book = Ledger(tmp_path), Book()
    first = ledger.begin("worker-1")
    count_requests(book, 3)
    first.update(report(book))
    count_requests(book, 2)
    first.update(report(book))
    first.update(report(book))  # nothing new: nothing changes
    ledger.end("worker-1")
    ledger.begin("worker-2").update(report(Book()))
    ledger.save()
    again = Ledger(tmp_path)
    again.load()
    for kept in (ledger, again):
        wire = kept.wire(instance="i", version=1, feedback=NOTHING)
        counts = {epoch.epoch: sum(arm.requests for arm in epoch.arms) for epoch in wire.epochs}
        assert counts["worker-1"] == 5


def test_broken_epochs_on_disk_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "epochs.json").write_text('{"epochs": [{"nope": 1}]}')
    ledger = Ledger(tmp_path)
    ledger.load()
    assert ledger.wire(instance="i", version=1, feedback=NOTHING).epochs == (NOTHING,)


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
    book, epoch = Book(), Epoch("worker-1")
    sample = book.sample("bot", "c1")
    for value, bit, is_report_due in steps:
        if sample.add(value, bit):
            book.changed_samples.add(sample)
        if is_report_due:
            epoch.update(report(book))
    epoch.update(report(book))
    assert [one.model_dump() for one in epoch.wire().samples] == (
        [KeySample.model_validate(sample.wire()).model_dump()]
    )

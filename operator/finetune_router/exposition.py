"""Prometheus metrics of a router: what its workers counted, added up, ended workers included."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from finetune_router import counters

ALIAS_LIMIT = 1000
OTHER = "_other"  # the label of all aliases after the first thousand
_PREFIX = "adapter_router"
_BUCKETS = {
    "duration": counters.DURATION_BUCKETS,
    "ttft": counters.TTFT_BUCKETS,
    "tpot": counters.TPOT_BUCKETS,
    "overhead": counters.OVERHEAD_BUCKETS,
}
_HISTOGRAMS = (
    ("duration", "request_duration_seconds", "Time to the last byte."),
    ("ttft", "ttft_seconds", "Time to the first byte of the body."),
    ("tpot", "tpot_seconds", "Time per token after the first one, streams only."),
    ("overhead", "overhead_seconds", "Time spent in the router itself until the first byte."),
)

Key = tuple[str, str, str]


@dataclass
class Series:
    """Values of one (alias, arm, revision)."""

    codes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    invalid: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    mirrors: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    fallbacks: int = 0
    tokens: int = 0
    histograms: dict[str, tuple[list[int], float]] = field(default_factory=dict)

    def add(self, wire: dict[str, Any]) -> None:
        for name in ("codes", "invalid", "mirrors"):
            mine: dict[str, int] = getattr(self, name)
            for label, count in wire[name].items():
                mine[label] += count
        self.fallbacks += wire["fallbacks"]
        self.tokens += wire["tokens"]
        for name, (counts, total) in wire["histograms"].items():
            known, sum_before = self.histograms.get(name, ([0] * len(counts), 0.0))
            self.histograms[name] = ([a + b for a, b in zip(known, counts, strict=True)], sum_before + total)


class MetricsBoard:
    """The last values of every worker."""

    def __init__(self) -> None:
        self._live: dict[str, dict[Key, dict[str, Any]]] = defaultdict(dict)
        self._ended: dict[Key, Series] = defaultdict(Series)
        self._feedback: dict[str, dict[Key, int]] = defaultdict(dict)
        self._ended_feedback: dict[Key, int] = defaultdict(int)
        self._aliases: dict[str, None] = {}

    def update(self, worker: str, message: dict[str, Any]) -> None:
        for wire in message["metrics"]:
            self._live[worker][_key(wire["key"])] = wire
        for key in message["forgotten"]:
            self._live[worker].pop(_key(key), None)
            self._ended.pop(_key(key), None)
        for alias, arm, metric, count in message["feedback"] or ():
            self._feedback[worker][alias, arm, metric] = count

    def end(self, worker: str) -> None:
        """Keep the counts of a worker that is gone, so that no counter goes back."""
        for key, wire in self._live.pop(worker, {}).items():
            self._ended[key].add(wire)
        for key, count in self._feedback.pop(worker, {}).items():
            self._ended_feedback[key] += count

    def label(self, alias: str) -> str:
        """The alias as a label; the first thousand that are seen have one of their own."""
        if alias not in self._aliases:
            if len(self._aliases) >= ALIAS_LIMIT:
                return OTHER
            self._aliases[alias] = None
        return alias

    def series(self) -> dict[Key, Series]:
        total: dict[Key, Series] = defaultdict(Series)
        for key, series in self._ended.items():
            total[self._labelled(key)].add(_wire(series))
        for documents in self._live.values():
            for key, wire in documents.items():
                total[self._labelled(key)].add(wire)
        return total

    def feedback(self) -> dict[Key, int]:
        total: dict[Key, int] = defaultdict(int)
        for counts in (self._ended_feedback, *self._feedback.values()):
            for (alias, arm, metric), count in counts.items():
                total[self.label(alias), arm, metric] += count
        return total

    def _labelled(self, key: Key) -> Key:
        alias = self.label(key[0])
        return key if alias == key[0] else (alias, key[1], "")


@dataclass
class Gauges:
    """What is so just now."""

    workers: int
    in_flight: int
    restarts: int
    version: int
    unread: int
    """Answers counted without a look at their output, because too many waited."""


class RouterCollector(Collector):
    """What a scrape of /metrics gets."""

    def __init__(self, board: MetricsBoard, gauges: Gauges) -> None:
        self._board = board
        self._gauges = gauges

    def collect(self) -> Iterator[Metric]:
        series = self._board.series()
        requests = CounterMetricFamily(
            f"{_PREFIX}_requests",
            "Requests by what they were answered with.",
            labels=("alias", "arm", "revision", "code"),
        )
        invalid = CounterMetricFamily(
            f"{_PREFIX}_output_invalid",
            "Answers that fired an output signal.",
            labels=("alias", "arm", "kind"),
        )
        fallback = CounterMetricFamily(
            f"{_PREFIX}_fallback", "Requests that stable answered for the candidate.", labels=("alias",)
        )
        tokens = CounterMetricFamily(
            f"{_PREFIX}_completion_tokens", "Tokens of answers.", labels=("alias", "arm", "revision")
        )
        mirror = CounterMetricFamily(f"{_PREFIX}_mirror", "Mirrored requests.", labels=("alias", "outcome"))
        fallbacks: dict[str, int] = defaultdict(int)
        kinds: dict[tuple[str, str, str], int] = defaultdict(int)
        mirrors: dict[tuple[str, str], int] = defaultdict(int)
        for (alias, arm, revision), values in series.items():
            for code, count in values.codes.items():
                requests.add_metric((alias, arm, revision, code), count)
            if arm:
                tokens.add_metric((alias, arm, revision), values.tokens)
            for kind, count in values.invalid.items():
                kinds[alias, arm, kind] += count
            for outcome, count in values.mirrors.items():
                mirrors[alias, outcome] += count
            if arm == "Candidate":
                fallbacks[alias] += values.fallbacks
        for alias, count in fallbacks.items():
            fallback.add_metric((alias,), count)
        for labels, count in kinds.items():
            invalid.add_metric(labels, count)
        for pair, count in mirrors.items():
            mirror.add_metric(pair, count)
        yield from (requests, tokens, invalid, fallback, mirror)
        yield self._feedback()
        yield from self._histograms(series)
        yield from self._states()

    def _feedback(self) -> Metric:
        family = CounterMetricFamily(
            f"{_PREFIX}_feedback", "Feedback values taken.", labels=("alias", "arm", "metric")
        )
        for labels, count in self._board.feedback().items():
            family.add_metric(labels, count)
        return family

    def _histograms(self, series: dict[Key, Series]) -> Iterator[Metric]:
        for name, suffix, text in _HISTOGRAMS:
            family = HistogramMetricFamily(f"{_PREFIX}_{suffix}", text, labels=("alias", "arm"))
            merged: dict[tuple[str, str], tuple[list[int], float]] = {}
            for (alias, arm, _), values in series.items():
                if arm and name in values.histograms:
                    counts, total = values.histograms[name]
                    before, sum_before = merged.get((alias, arm), ([0] * len(counts), 0.0))
                    merged[alias, arm] = (
                        [a + b for a, b in zip(before, counts, strict=True)],
                        sum_before + total,
                    )
            bounds = [*(str(bound) for bound in _BUCKETS[name]), "+Inf"]
            for pair, (counts, total) in merged.items():
                running, buckets = 0, []
                for bound, count in zip(bounds, counts, strict=True):
                    running += count
                    buckets.append((bound, running))
                family.add_metric(pair, buckets, total)
            yield family

    def _states(self) -> Iterator[Metric]:
        gauges = self._gauges
        for name, text, value in (
            ("workers", "Workers that serve.", gauges.workers),
            ("requests_in_flight", "Requests under way.", gauges.in_flight),
            ("snapshot_version", "Version of the routes that all workers apply.", gauges.version),
        ):
            yield GaugeMetricFamily(f"{_PREFIX}_{name}", text, value=value)
        for name, text, value in (
            ("worker_restarts", "Workers that died and were started anew.", gauges.restarts),
            ("outputs_unread", "Answers counted without a look at their output.", gauges.unread),
        ):
            yield CounterMetricFamily(f"{_PREFIX}_{name}", text, value=value)


def _key(items: list[str] | tuple[str, ...]) -> Key:
    return (items[0], items[1], items[2])


def _wire(series: Series) -> dict[str, Any]:
    return {
        "codes": series.codes,
        "invalid": series.invalid,
        "mirrors": series.mirrors,
        "fallbacks": series.fallbacks,
        "tokens": series.tokens,
        "histograms": {name: [counts, total] for name, (counts, total) in series.histograms.items()},
    }

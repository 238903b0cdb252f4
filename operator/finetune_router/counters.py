"""What one worker counts, cumulative over its life: the evidence for the operator and the numbers for Prometheus.

Both are plain slots that the data path adds to; whoever reports takes those that changed since the last report.
"""

from __future__ import annotations

import heapq
import math
import time
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from finetune_operator.api.routes import GROUPS, LENGTH_BINS, WORD_BINS, Arm, Route

SAMPLE_LIMIT = 1024
KEEP_GONE_SECONDS = 3600.0  # counters of a revision that no route names any more
STABLE_BIT, CANDIDATE_BIT = 1, 2

# Upper bounds in seconds; the last bucket is open.
DURATION_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TTFT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
TPOT_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0)
OVERHEAD_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5)

REPORT_PART = 10  # of each kind in one message; a fifth of a millisecond of work

Wire = dict[str, object]
StateKey = tuple[str, Arm, str]
MetricsKey = tuple[str, str, str]


class RunningMoments:
    """Count, sum and sum of squares; count and sum by group of keys from the first value that tells its group."""

    __slots__ = ("groups", "n", "sum", "sum_squares")

    def __init__(self) -> None:
        self.n = 0
        self.sum = 0.0
        self.sum_squares = 0.0
        self.groups: list[list[float]] = []

    def add(self, value: float, group: int | None = None) -> None:
        self.n += 1
        self.sum += value
        self.sum_squares += value * value
        if group is not None:
            if not self.groups:
                self.groups = [[0, 0.0] for _ in range(GROUPS)]
            sums = self.groups[group]
            sums[0] += 1
            sums[1] += value

    def wire(self) -> Wire:
        plain: Wire = {"n": self.n, "sum": self.sum, "sumSquares": self.sum_squares}
        return plain | {"groups": self.groups} if self.groups else plain


class ArmState:
    """Evidence about one arm of one alias at one revision."""

    __slots__ = (
        "alias", "arm", "events", "fallbacks", "lengths", "requests", "revision", "seconds", "tokens", "ttft",
        "watched", "words",
    )  # fmt: skip

    def __init__(self, alias: str, arm: Arm, revision: str) -> None:
        self.alias = alias
        self.arm = arm
        self.revision = revision
        self.requests = 0
        self.events: dict[str, int] = {}
        self.watched: dict[str, int] = {}
        self.seconds = RunningMoments()
        self.ttft = RunningMoments()
        self.tokens = RunningMoments()
        self.lengths = [0] * LENGTH_BINS
        self.words: list[int] = []
        self.fallbacks = 0

    def add_signals(self, fired: Collection[str], watched: Collection[str]) -> None:
        """`watched`: signals of which it is known now whether the request has them; the fired ones are among them."""
        for name in watched:
            self.watched[name] = self.watched.get(name, 0) + 1
        for name in fired:
            self.events[name] = self.events.get(name, 0) + 1

    def add_tokens(self, count: int, group: int | None = None) -> None:
        self.tokens.add(count, group)
        self.lengths[min(count.bit_length(), LENGTH_BINS - 1)] += 1

    def add_words(self, bins: Iterable[int]) -> None:
        if not self.words:
            self.words = [0] * WORD_BINS
        for index in bins:
            self.words[index] += 1

    def wire(self) -> Wire:
        """An ArmCounters as JSON has it. Made by hand: thousands of them may have changed within a second."""
        return {
            "alias": self.alias,
            "arm": self.arm.value,
            "revision": self.revision,
            "requests": self.requests,
            "events": self.events,
            "watched": self.watched,
            "seconds": self.seconds.wire(),
            "ttftSeconds": self.ttft.wire(),
            "completionTokens": self.tokens.wire(),
            "lengthHistogram": self.lengths,
            "wordHistogram": self.words,
            "fallbacks": self.fallbacks,
        }


class Histogram:
    """Counts per bucket and the sum, as Prometheus wants them."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class ArmMetrics:
    """Prometheus series of one arm, pinned requests included. The arm is "" for answers of the router itself."""

    __slots__ = (
        "codes", "duration", "fallbacks", "gone_since", "invalid", "key", "mirrors", "overhead", "tokens", "tpot",
        "ttft",
    )  # fmt: skip

    def __init__(self, key: MetricsKey) -> None:
        self.key = key
        self.codes: dict[str, int] = {}
        self.invalid: dict[str, int] = {}
        self.mirrors: dict[str, int] = {}
        self.fallbacks = 0
        self.tokens = 0
        self.duration = Histogram(DURATION_BUCKETS)
        self.ttft = Histogram(TTFT_BUCKETS)
        self.tpot = Histogram(TPOT_BUCKETS)
        self.overhead = Histogram(OVERHEAD_BUCKETS)
        self.gone_since: float | None = None

    def add_code(self, code: int) -> None:
        name = str(code)
        self.codes[name] = self.codes.get(name, 0) + 1

    def wire(self) -> Wire:
        return {
            "key": self.key,
            "codes": self.codes,
            "invalid": self.invalid,
            "mirrors": self.mirrors,
            "fallbacks": self.fallbacks,
            "tokens": self.tokens,
            "histograms": {
                "duration": [self.duration.counts, self.duration.sum],
                "ttft": [self.ttft.counts, self.ttft.sum],
                "tpot": [self.tpot.counts, self.tpot.sum],
                "overhead": [self.overhead.counts, self.overhead.sum],
            },
        }


def comparison_of(route: Route) -> str:
    """Identity of the comparison that needs a sample of keys; "" where nothing is compared."""
    return route.comparison if route.candidate is not None else ""


class Sample:
    """The distinct keys with the smallest hashes, and on which arms their outcomes were recorded."""

    def __init__(self, alias: str, comparison: str, limit: int = SAMPLE_LIMIT) -> None:
        self.alias = alias
        self.comparison = comparison
        self._limit = limit
        self._arms: dict[int, int] = {}
        self._heap: list[int] = []  # negated hashes: the largest kept one is on top
        self._news: list[tuple[int, int]] = []

    def add(self, value: int, bit: int) -> bool:
        """Record a key's hash for an arm (STABLE_BIT or CANDIDATE_BIT); whether the sample changed."""
        known = self._arms.get(value)
        if known is not None:
            if known & bit:
                return False
            self._arms[value] = known | bit
            self._news.append((value, bit))
            return True
        if len(self._heap) < self._limit:
            heapq.heappush(self._heap, -value)
        elif value >= -self._heap[0]:
            return False
        else:
            del self._arms[-heapq.heapreplace(self._heap, -value)]
        self._arms[value] = bit
        self._news.append((value, bit))
        return True

    def take_news(self) -> Wire:
        """What was added since the last call; whoever adds it to a sample of theirs has the same one."""
        news, self._news = self._news, []
        return {"alias": self.alias, "comparison": self.comparison, "added": news}

    def wire(self) -> Wire:
        """A KeySample as JSON has it."""
        return {
            "alias": self.alias,
            "comparison": self.comparison,
            "limit": self._limit,
            "stable": sorted(value for value, arms in self._arms.items() if arms & STABLE_BIT),
            "candidate": sorted(value for value, arms in self._arms.items() if arms & CANDIDATE_BIT),
        }


T = TypeVar("T")


def _some_of(changed: set[T]) -> list[T]:
    """As many as are a part, taken out."""
    return [changed.pop() for _ in range(min(len(changed), REPORT_PART))]


@dataclass(frozen=True)
class Report:
    """A part of what changed since the last report."""

    arms: list[Wire]
    samples: list[Wire]
    metrics: list[Wire]
    forgotten: list[MetricsKey]


@dataclass
class Book:
    """All counters of a worker."""

    _states: dict[StateKey, ArmState] = field(default_factory=dict)
    _metrics: dict[MetricsKey, ArmMetrics] = field(default_factory=dict)
    _samples: dict[str, Sample] = field(default_factory=dict)
    changed_states: set[ArmState] = field(default_factory=set)
    changed_metrics: set[ArmMetrics] = field(default_factory=set)
    changed_samples: set[Sample] = field(default_factory=set)
    _forgotten: list[MetricsKey] = field(default_factory=list)

    def state(self, alias: str, arm: Arm, revision: str) -> ArmState:
        key = (alias, arm, revision)
        if key not in self._states:
            self._states[key] = ArmState(alias, arm, revision)
        return self._states[key]

    def metrics(self, alias: str, arm: str, revision: str) -> ArmMetrics:
        key = (alias, arm, revision)
        if key not in self._metrics:
            self._metrics[key] = ArmMetrics(key)
        return self._metrics[key]

    def sample(self, alias: str, comparison: str) -> Sample:
        """The alias's sample; a new one when the comparison is another."""
        known = self._samples.get(alias)
        if known is None or known.comparison != comparison:
            known = self._samples[alias] = Sample(alias, comparison)
            self.changed_samples.add(known)
        return known

    def end_sample(self, alias: str) -> None:
        """Nothing is compared any more."""
        self._samples.pop(alias, None)

    def take_reports(self) -> Iterator[Report]:
        """As much as has changed by now, in parts, at least one. Between them others may have their turn, and may
        take reports of their own: what has not been handed out is still to be reported."""
        changed = max(len(self.changed_states), len(self.changed_metrics), len(self.changed_samples))
        for _ in range(max(1, math.ceil(changed / REPORT_PART))):
            forgotten, self._forgotten = self._forgotten, []
            yield Report(
                arms=[state.wire() for state in _some_of(self.changed_states)],
                samples=[
                    sample.take_news()
                    for sample in _some_of(self.changed_samples)
                    if self._samples.get(sample.alias) is sample
                ],
                metrics=[one.wire() for one in _some_of(self.changed_metrics)],
                forgotten=forgotten,
            )

    def forget_gone(self, live: set[tuple[str, str]], now: float | None = None) -> None:
        """Drop series that belong to no live (alias, revision) for an hour, so that years of revisions do not add up.

        Evidence stays: a reader relies on its being cumulative for as long as the epoch lasts.
        """
        now = time.monotonic() if now is None else now
        for (alias, _, revision), metrics in list(self._metrics.items()):
            if (alias, revision) in live or not alias:
                metrics.gone_since = None
            elif metrics.gone_since is None:
                metrics.gone_since = now
            elif now - metrics.gone_since > KEEP_GONE_SECONDS:
                self.changed_metrics.discard(self._metrics.pop(metrics.key))
                self._forgotten.append(metrics.key)
        aliases = {alias for alias, _ in live}
        for alias in [name for name in self._samples if name not in aliases]:
            del self._samples[alias]

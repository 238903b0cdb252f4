"""From one finished request to the counters: off the data path, in slices, with a bound on what waits.

The data path only notes times and keeps the answer's bytes; they are parsed here, after the user has them. Nothing of
a text is kept or logged.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from enum import StrEnum

import jsonschema_rs

from finetune_operator.api.routes import Arm, SignalEvent
from finetune_router import outputs
from finetune_router.bodies import Body
from finetune_router.counters import CANDIDATE_BIT, STABLE_BIT, ArmMetrics, ArmState, Book
from finetune_router.outputs import EventReader, Output
from finetune_router.tables import Route, SchemaCache

ANSWER_LIMIT = 4 * 1024 * 1024  # bytes kept of one answer that is no stream
PENDING_LIMIT = (
    64 * 1024 * 1024
)  # bytes of answers that wait to be read; more are counted without their output
PIECE = 32 * 1024  # bytes of a stream that are read at once
REQUEST_SCHEMA_LIMIT = 32 * 1024  # bytes; a larger schema in a request is not compiled
SLICE_SECONDS = 0.002  # the event loop is given back after this time


class End(StrEnum):
    """How a request ended, as far as the comparison is concerned."""

    ANSWERED = "Answered"
    ERROR = "Error"  # of the engine, not of the client
    CLIENT = "Client"  # the client's own 4xx: part of no comparison
    GONE = "Gone"  # the client went away


class Observation:
    """What the data path notes about one request to one arm."""

    __slots__ = (
        "answered_at", "bytes_kept", "code", "counted", "encoding", "end", "first_byte_at", "is_readable", "is_stream",
        "metrics", "output", "overhead", "pending", "queued", "reader", "response_format", "route", "sample_bit",
        "sample_hash", "started_at", "state",
    )  # fmt: skip

    def __init__(
        self, *, route: Route, state: ArmState | None, metrics: ArmMetrics, body: Body, started_at: float
    ) -> None:
        self.route = route
        self.state = state
        self.metrics = metrics
        self.response_format = body.response_format
        self.counted = state is not None
        self.started_at = started_at
        self.first_byte_at = 0.0
        self.answered_at = 0.0
        self.overhead = 0.0
        self.code = 0
        self.end = End.ANSWERED
        self.is_stream = False
        self.is_readable = True
        """False for an answer that is no JSON, or of which a part was not kept."""
        self.encoding = ""
        self.sample_hash: int | None = None
        self.sample_bit = 0
        self.pending: list[bytes] = []
        self.bytes_kept = 0
        self.queued = False
        self.reader: EventReader | None = None
        self.output: Output | None = None

    def set_unit(self, sample_hash: int, arm: Arm) -> None:
        self.sample_hash = sample_hash
        self.sample_bit = CANDIDATE_BIT if arm is Arm.CANDIDATE else STABLE_BIT


class Recorder:
    """Turns observations into counts."""

    def __init__(self, book: Book, schemas: SchemaCache) -> None:
        self._book = book
        self._schemas = schemas
        self._queue: deque[Observation] = deque()
        self._pending_bytes = 0
        self._wake = asyncio.Event()
        self.unread = 0
        """Answers that were counted without a look at their output."""

    def keep(self, seen: Observation, data: bytes) -> None:
        """Keep a piece of the answer for later."""
        if not seen.is_readable:
            return
        size = len(data)
        in_pieces = seen.is_stream and not seen.encoding
        if self._pending_bytes + size > PENDING_LIMIT or (
            not in_pieces and seen.bytes_kept + size > ANSWER_LIMIT
        ):
            self.unread += 1
            seen.is_readable = False
            self._drop(seen)
            return
        seen.pending.append(data)
        seen.bytes_kept += size
        self._pending_bytes += size
        if in_pieces and seen.bytes_kept > PIECE:
            self._enqueue(seen)

    def finish(self, seen: Observation, end: End, code: int) -> None:
        """The request is over."""
        seen.end = end
        seen.code = code
        seen.answered_at = time.perf_counter()
        self._enqueue(seen)

    async def run(self) -> None:
        """Work off the queue for ever."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            started = time.perf_counter()
            while self._queue:
                self._take(self._queue.popleft())
                if time.perf_counter() - started > SLICE_SECONDS:
                    await asyncio.sleep(0)
                    started = time.perf_counter()

    def flush(self) -> None:
        """Work off the queue at once, before a worker ends."""
        while self._queue:
            self._take(self._queue.popleft())

    def _enqueue(self, seen: Observation) -> None:
        if not seen.queued:
            seen.queued = True
            self._queue.append(seen)
            self._wake.set()

    def _take(self, seen: Observation) -> None:
        seen.queued = False
        self._read(seen)
        if seen.code:
            self._count(seen)

    def _drop(self, seen: Observation) -> None:
        self._pending_bytes -= seen.bytes_kept
        seen.pending = []
        seen.bytes_kept = 0

    def _read(self, seen: Observation) -> None:
        if not seen.is_readable:
            seen.output = None
            return
        if not seen.pending:
            return
        data = seen.pending[0] if len(seen.pending) == 1 else b"".join(seen.pending)
        self._drop(seen)
        if seen.end is End.CLIENT or seen.end is End.GONE:
            return
        if seen.encoding:
            plain = outputs.decoded(data, seen.encoding, ANSWER_LIMIT)
            if plain is None:
                return
            data = plain
        if seen.is_stream:
            if seen.reader is None or seen.output is None:
                seen.reader, seen.output = EventReader(), Output()
            seen.reader.feed(data, seen.output)
        else:
            seen.output = outputs.read_answer(data)

    def _count(self, seen: Observation) -> None:
        if seen.end is End.ANSWERED and seen.output is not None and seen.output.error:
            seen.end = End.ERROR
        tokens = self._tokens(seen)
        fired = frozenset[SignalEvent]()
        if seen.end is End.ANSWERED and seen.output is not None:
            fired = outputs.fired_events(seen.output, seen.route.watch.wanted, self._validator(seen))
        self._count_metrics(seen, tokens, fired)
        if seen.counted and seen.state is not None and seen.end in {End.ANSWERED, End.ERROR}:
            self._count_evidence(seen, seen.state, tokens, fired)

    def _tokens(self, seen: Observation) -> int | None:
        """Completion tokens: as the engine says, else one per event of a stream."""
        if seen.output is None or not seen.output.generative:
            return None
        if seen.output.completion_tokens is not None:
            return seen.output.completion_tokens
        return seen.reader.events if seen.reader is not None else None

    def _count_metrics(self, seen: Observation, tokens: int | None, fired: frozenset[SignalEvent]) -> None:
        metrics = seen.metrics
        metrics.add_code(seen.code)
        metrics.duration.add(seen.answered_at - seen.started_at)
        if seen.first_byte_at:
            metrics.ttft.add(seen.first_byte_at - seen.started_at)
            if seen.is_stream and tokens is not None and tokens > 1:
                metrics.tpot.add((seen.answered_at - seen.first_byte_at) / (tokens - 1))
        if seen.overhead:
            metrics.overhead.add(seen.overhead)
        metrics.tokens += tokens or 0
        for event in fired:
            metrics.invalid[event.value] = metrics.invalid.get(event.value, 0) + 1
        self._book.changed_metrics.add(metrics)

    def _count_evidence(
        self, seen: Observation, state: ArmState, tokens: int | None, fired: frozenset[SignalEvent]
    ) -> None:
        watch = seen.route.watch
        seconds = seen.answered_at - seen.started_at
        ttft = seen.first_byte_at - seen.started_at if seen.first_byte_at else None
        state.requests += 1
        if seen.end is End.ERROR:
            state.add_events(watch.errors)
        else:
            state.seconds.add(seconds)
            if ttft is not None:
                state.ttft.add(ttft)
            if tokens is not None:
                state.add_tokens(tokens)
        # No first byte at all: it is late since the request was given up.
        waited = seconds if ttft is None else ttft
        state.add_events(tuple(name for name, limit in watch.ttft if waited > limit))
        state.add_events(tuple(name for name, limit in watch.latency if seconds > limit))
        if fired:
            state.add_events(tuple(name for name, event in watch.outputs if event in fired))
        self._book.changed_states.add(state)
        if seen.sample_hash is not None and seen.route.sample is not None:
            sample = seen.route.sample
            if sample.add(seen.sample_hash, seen.sample_bit):
                self._book.changed_samples.add(sample)

    def _validator(self, seen: Observation) -> jsonschema_rs.Validator | None:
        """The route's schema, else the one that the request itself asked for (response_format)."""
        route = seen.route
        if route.validator is not None or not seen.response_format:
            return route.validator
        if len(seen.response_format) > REQUEST_SCHEMA_LIMIT:
            return None
        if SignalEvent.SCHEMA_INVALID not in route.watch.wanted:
            return None
        try:
            asked = json.loads(seen.response_format)
            schema = asked["json_schema"]["schema"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return None
        return self._schemas.get(schema)

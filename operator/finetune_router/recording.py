"""From one finished request to the counters: off the data path, in slices, with a bound on what waits.

The data path only notes times and keeps the answer's bytes; they are parsed here, after the user has them. Nothing of
a text is kept or logged.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections import deque

import jsonschema_rs

from finetune_operator.api.routes import SignalEvent
from finetune_router import outputs, schemas
from finetune_router.counters import ArmState, Book
from finetune_router.observations import End, Observation
from finetune_router.outputs import EventReader, Output
from finetune_router.tables import SchemaCache

logger = logging.getLogger(__name__)

ANSWER_LIMIT = 4 * 1024 * 1024  # bytes kept of one answer that is no stream
PENDING_LIMIT = (
    64 * 1024 * 1024
)  # bytes of answers that wait to be read; more are counted without their output
PIECE = 32 * 1024  # bytes of a stream that are read at once
REQUEST_SCHEMA_LIMIT = 32 * 1024  # bytes; a larger schema in a request is not compiled
BATCH_SECONDS = 0.02  # answers wait for so long: in a burst, requests come first
SLICE_SECONDS = 0.0005  # the event loop is given back after this time


class Recorder:
    """Turns observations into counts."""

    def __init__(self, book: Book, schemas: SchemaCache) -> None:
        self._book = book
        self._schemas = schemas
        self._queue: deque[Observation] = deque()
        self._pending_bytes = 0
        self._wake = asyncio.Event()
        self._watched: set[Observation] = set()
        self.unread = 0
        """Answers that were counted without a look at their output."""

    def begin(self, seen: Observation) -> None:
        """The request is under way: from now on `sweep` looks whether it is late."""
        if seen.counted:
            seen.set_alarm(seen.started_at)
            if seen.alarm_at < math.inf:
                self._watched.add(seen)

    def sweep(self) -> None:
        """Count what is late by now. A candidate that hangs must be seen before its requests are given up."""
        now = time.perf_counter()
        for seen in self._watched:
            if now > seen.alarm_at and seen.state is not None:
                seen.set_alarm(now)
                if names := seen.late(now):
                    self._count_request(seen, seen.state, names, watched=names)

    def forget(self, seen: Observation) -> None:
        """The engine's part is over: nothing that comes now is its delay."""
        self._watched.discard(seen)

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

    def finish(self, seen: Observation, end: End, code: int, *, at: float | None = None) -> None:
        """The request is over; `at` (time.perf_counter), where it was so before now."""
        seen.code = code
        seen.answered_at = time.perf_counter() if at is None else at
        seen.end = End.ERROR if seen.answered_at > seen.given_up_at else end
        self._watched.discard(seen)
        if seen.attempt is not None:  # its connection soon belongs to another request
            seen.first_byte_at = seen.first_byte_at or seen.attempt.first_byte_at
            seen.held_up = seen.held_up or seen.attempt.is_held_up
            seen.attempt = None
        self._enqueue(seen)

    async def run(self) -> None:
        """Work off the queue for ever."""
        while True:
            await self._wake.wait()
            await asyncio.sleep(BATCH_SECONDS)
            started = time.perf_counter()
            while self._queue:
                self._take(self._queue.popleft())
                if time.perf_counter() - started > SLICE_SECONDS:
                    await asyncio.sleep(0)
                    started = time.perf_counter()
            self._wake.clear()

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
        """Whatever an engine or a client made of it, the next ones must be counted."""
        seen.queued = False
        try:
            self._read(seen)
            if seen.code:
                self._count(seen)
        except Exception as error:  # its message might quote the text
            logger.error("an answer is not counted: %s", type(error).__name__)

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
            try:
                plain = outputs.decoded(data, seen.encoding, ANSWER_LIMIT)
            except ValueError:
                seen.output = Output(error=True)
                return
            if plain is None:
                self.unread += 1
                return
            data = plain
        if seen.is_stream:
            if seen.reader is None or seen.output is None:
                seen.reader, seen.output = EventReader(), Output()
            seen.reader.feed(data, seen.output)
        else:
            seen.output = outputs.read_answer(data)

    def _count(self, seen: Observation) -> None:
        if seen.reader is not None and seen.output is not None:
            seen.reader.end(seen.output)
        if seen.end is End.ANSWERED and seen.output is not None and not seen.output.is_answer(seen.path):
            seen.end = End.ERROR
        tokens = self._tokens(seen)
        fired = frozenset[SignalEvent]()
        if seen.end is End.ANSWERED and seen.output is not None:
            fired = outputs.fired_events(seen.output, seen.route.watch.wanted, self._validator(seen))
        self._count_metrics(seen, tokens, fired)
        if seen.counted and seen.state is not None:
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
        """A client's own mistake is no evidence; one that left is, where it had waited too long."""
        watch = seen.route.watch
        if seen.end is End.CLIENT:
            return
        # No first byte at all: it is late since the request was given up.
        names = seen.late(seen.answered_at)
        if seen.end is End.GONE:
            if names:
                self._count_request(seen, state, names, watched=names)
            return
        if seen.end is not End.ERROR:
            state.seconds.add(seen.answered_at - seen.started_at, seen.group("seconds"))
            if seen.first_byte_at:
                state.ttft.add(seen.first_byte_at - seen.started_at, seen.group("ttft_seconds"))
            if tokens is not None:
                state.add_tokens(tokens, seen.group("completion_tokens"))
            if seen.route.counts_words and seen.output is not None:
                for choice in seen.output.choices.values():
                    state.add_words(outputs.word_bins(choice.text))
        if fired:
            names += tuple(name for name, event in watch.outputs if event in fired)
        self._count_request(seen, state, names, watched=watch.names)

    def _count_request(
        self, seen: Observation, state: ArmState, names: tuple[str, ...], *, watched: tuple[str, ...]
    ) -> None:
        """Count signals of a request, and with the first call the request itself.

        Of a request that is late, nobody knows yet whether it will fail. If it counted among those that did not, and
        its error later among others, another share of the candidate's among those would look like harm.
        """
        if not seen.is_counted:
            seen.is_counted = True
            state.requests += 1
            sample = seen.route.sample
            if (
                seen.sample_hash is not None
                and sample is not None
                and sample.add(seen.sample_hash, seen.sample_bit)
            ):
                self._book.changed_samples.add(sample)
        known = seen.fired
        state.add_signals(
            [name for name in names if name not in known], [name for name in watched if name not in known]
        )
        seen.fired += names
        self._book.changed_states.add(state)

    def _validator(self, seen: Observation) -> jsonschema_rs.Validator | None:
        """The schema that the request itself asked for (response_format), else the route's."""
        route = seen.route
        if not seen.response_format or SignalEvent.SCHEMA_INVALID not in route.watch.wanted:
            return route.validator
        # Of a schema that is too large, only that the answer is JSON is checked: the route's is not what was asked for.
        if len(seen.response_format) > REQUEST_SCHEMA_LIMIT:  # before it is read: 16 MB would take seconds
            return None
        try:
            asked = json.loads(seen.response_format)
            schema = asked["json_schema"]["schema"]
        except (ValueError, KeyError, TypeError, RecursionError):
            return route.validator
        if not schemas.is_bounded(schema):
            return None
        return self._schemas.get(schema, is_clients=True)

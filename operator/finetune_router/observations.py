"""One request to one arm, as the data path notes it: times, its end, and the answer's bytes until they are read."""

from __future__ import annotations

import math
from enum import StrEnum

from finetune_operator.api.routes import Arm
from finetune_router.assignment import group_of
from finetune_router.bodies import Body
from finetune_router.counters import CANDIDATE_BIT, STABLE_BIT, ArmMetrics, ArmState
from finetune_router.forwarding import Attempt
from finetune_router.outputs import EventReader, Output
from finetune_router.tables import Route


class End(StrEnum):
    """How a request ended, as far as the comparison is concerned."""

    ANSWERED = "Answered"
    ERROR = "Error"  # of the engine, not of the client
    CLIENT = "Client"  # the client's own 4xx: part of no comparison
    GONE = "Gone"  # the client went away


class Observation:
    """What the data path notes about one request to one arm."""

    __slots__ = (
        "alarm_at", "answered_at", "attempt", "bytes_kept", "code", "counted", "encoding", "end", "fired",
        "first_byte_at", "given_up_at", "held_up", "is_counted", "is_readable", "is_stream", "metrics", "output",
        "overhead", "path", "pending", "queued", "reader", "response_format", "route", "sample_bit", "sample_hash",
        "started_at", "state",
    )  # fmt: skip

    def __init__(
        self,
        *,
        route: Route,
        state: ArmState | None,
        metrics: ArmMetrics,
        path: str,
        body: Body,
        started_at: float,
    ) -> None:
        self.route = route
        self.state = state
        self.metrics = metrics
        self.path = path
        self.response_format = body.response_format
        self.counted = state is not None
        self.started_at = started_at
        self.first_byte_at = 0.0
        self.answered_at = 0.0
        self.overhead = 0.0
        self.attempt: Attempt | None = None
        """Where the request is now."""
        self.alarm_at = math.inf
        """When the next limit of a signal passes."""
        self.given_up_at = math.inf
        """When a candidate that had said nothing yet would have been given up: stable has more time for its answer,
        but is not held to be better for that."""
        self.held_up = False
        """Whether it took so long because the client did not read."""
        self.is_counted = False
        self.fired: tuple[str, ...] = ()
        """Names of the signals that were counted already."""
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

    def group(self, quantity: str) -> int | None:
        """The key's group, where the quantity is summed by group."""
        if quantity not in self.route.grouped or self.sample_hash is None:
            return None
        return group_of(self.sample_hash)

    def late(self, now: float) -> tuple[str, ...]:
        """Names of the signals of time and of failure that have fired by then."""
        watch, seconds = self.route.watch, now - self.started_at
        first = self.first_byte_at or (self.attempt.first_byte_at if self.attempt is not None else 0.0)
        waited = first - self.started_at if first else seconds
        names = [name for name, limit in watch.ttft if waited > limit]
        if not (self.held_up or (self.attempt is not None and self.attempt.is_held_up)):
            names += [name for name, limit in watch.latency if seconds > limit]
        if self.end is End.ERROR or now > self.given_up_at:
            names += watch.errors
        return tuple(names)

    def set_alarm(self, now: float) -> None:
        """For the next limit of a signal."""
        seconds = now - self.started_at
        following = (limit for limit in self.route.watch.limits if limit >= seconds)
        self.alarm_at = self.started_at + next(following, math.inf)
        if self.given_up_at >= now:
            self.alarm_at = min(self.alarm_at, self.given_up_at)

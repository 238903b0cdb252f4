"""The route snapshot, made ready for the data path: everything that does not depend on the request is done here."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import random
import time
from dataclasses import dataclass
from typing import Any, Self

import jsonschema_rs

from finetune_operator.api import routes as wire
from finetune_operator.api.routes import Arm, SignalEvent
from finetune_router import schemas
from finetune_router.assignment import KeyKind, KeySource
from finetune_router.counters import ArmMetrics, ArmState, Book, Sample, comparison_of
from finetune_router.upstreams import Upstream, Upstreams

logger = logging.getLogger(__name__)

BASE_REVISION = "base"
BASE_ARM = "Base"  # label of requests that ask for a base model by its name
_BACKTRACK_LIMIT = 10_000
_ROUTES_AT_ONCE = 20  # about a millisecond of work
_ROUTES_KEPT = 256  # schemas
_CLIENTS_KEPT = 32  # schemas; of 2 MiB each at most, which anybody may send
_SHARED = 256  # parts that routes have in common
_CREATED = 0  # the list of models has no creation times to tell; OpenAI's field is a Unix time


@dataclass(frozen=True, slots=True)
class Leg:
    """A revision on its engines, and where its requests are counted."""

    revision: str
    revision_bytes: bytes
    served_name: str
    quoted_name: bytes
    """The served name as a JSON string, ready to be put into a body."""
    upstreams: tuple[Upstream, ...]
    metrics: ArmMetrics
    state: ArmState | None
    """None for base models, which are compared with nothing."""
    shadow: ArmState | None = None
    shadow_metrics: ArmMetrics | None = None

    def pick(self, tried: list[Upstream]) -> Upstream | None:
        """The engine with the fewest requests under way from this worker; one that refused a connection just now
        only when there is no other. None when all were tried."""
        if len(self.upstreams) == 1:
            return None if tried else self.upstreams[0]
        left = [upstream for upstream in self.upstreams if upstream not in tried]
        if len(left) <= 1:
            return left[0] if left else None
        now = time.perf_counter()
        up = [upstream for upstream in left if upstream.down_until <= now] or left
        fewest = min(upstream.outstanding for upstream in up)
        return random.choice([upstream for upstream in up if upstream.outstanding == fewest])  # noqa: S311


@dataclass(frozen=True, slots=True)
class Watch:
    """Signals of a route, by what makes them fire."""

    names: tuple[str, ...] = ()
    """All of them."""
    errors: tuple[str, ...] = ()
    ttft: tuple[tuple[str, float], ...] = ()
    latency: tuple[tuple[str, float], ...] = ()
    outputs: tuple[tuple[str, SignalEvent], ...] = ()
    limits: tuple[float, ...] = ()
    """Seconds of `ttft` and `latency`, ascending."""
    wanted: frozenset[SignalEvent] = frozenset()
    """The events of `outputs`."""

    @classmethod
    @functools.lru_cache(maxsize=_SHARED)
    def build(cls, signals: tuple[wire.Signal, ...]) -> Self:
        """Routes with the same signals share one: of a thousand copies, each would be cold at its next request."""

        def limits(event: SignalEvent) -> tuple[tuple[str, float], ...]:
            return tuple(
                (s.name, s.threshold) for s in signals if s.event == event and s.threshold is not None
            )

        others = {SignalEvent.TTFT_OVER, SignalEvent.LATENCY_OVER, SignalEvent.ERROR}
        outputs = tuple((s.name, s.event) for s in signals if s.event not in others)
        ttft, latency = limits(SignalEvent.TTFT_OVER), limits(SignalEvent.LATENCY_OVER)
        return cls(
            names=tuple(s.name for s in signals),
            errors=tuple(s.name for s in signals if s.event == SignalEvent.ERROR),
            ttft=ttft,
            latency=latency,
            outputs=outputs,
            limits=tuple(sorted({limit for _, limit in (*ttft, *latency)})),
            wanted=frozenset(event for _, event in outputs),
        )


@dataclass(frozen=True, slots=True)
class Pin:
    """A rule that overrides the draw."""

    headers: tuple[tuple[str, str], ...]
    arm: Arm


@dataclass(frozen=True, slots=True)
class Route:
    """One alias, or one base model (then only `stable` is set)."""

    alias: str
    alias_bytes: bytes
    stable: Leg | None
    candidate: Leg | None = None
    weight: float = 0.0
    mirror: float = 0.0
    sticky: bool = True
    keys: tuple[KeySource, ...] = ()
    salt: bytes = b"\0"
    pins: tuple[Pin, ...] = ()
    retry_stable: bool = True
    watch: Watch = Watch()
    validator: jsonschema_rs.Validator | None = None
    counts_words: bool = False
    grouped: frozenset[str] = frozenset()
    """Quantities that are also summed by group of keys."""
    sample: Sample | None = None
    """None where nothing is compared."""
    is_base: bool = False
    entry: bytes = b""
    """The alias in the list of models."""

    @property
    def legs(self) -> tuple[Leg, ...]:
        return tuple(leg for leg in (self.stable, self.candidate) if leg is not None)


@dataclass(frozen=True, slots=True)
class Table:
    """All routes of one snapshot. A request works with the table that it started with."""

    version: int = -1
    """-1: no snapshot has come yet."""
    by_model: dict[str, Route] | None = None
    body_keys: frozenset[str] = frozenset()
    models: bytes = b'{"object":"list","data":[]}'
    """Answer of GET /v1/models."""
    model_entries: dict[str, bytes] | None = None

    def find(self, model: str) -> Route | None:
        return None if self.by_model is None else self.by_model.get(model)


@dataclass(frozen=True, slots=True)
class Change:
    """What a snapshot has other than the one before; documents as on the wire. `base_models` is always complete."""

    version: int
    changed: list[dict[str, Any]]
    removed: list[str]
    base_models: list[dict[str, Any]]


class SchemaCache:
    """Compiled output schemas by their text: snapshots come often, schemas change rarely."""

    def __init__(self) -> None:
        self._routes: dict[str, jsonschema_rs.Validator | None] = {}
        self._clients: dict[str, jsonschema_rs.Validator | None] = {}

    def get(self, schema: object, *, is_clients: bool = False) -> jsonschema_rs.Validator | None:
        """None for a schema that is not valid, or a client's that takes too much: then only whether the text is JSON
        is checked."""
        text = json.dumps(schema, sort_keys=True)
        kept, most = (self._clients, _CLIENTS_KEPT) if is_clients else (self._routes, _ROUTES_KEPT)
        if text not in kept:
            if len(kept) >= most:
                kept.pop(next(iter(kept)))
            room = schemas.room_for_patterns(schema) if is_clients else schemas.Room()
            kept[text] = compile_schema(text, room)
        return kept[text]


def compile_schema(text: str, room: schemas.Room) -> jsonschema_rs.Validator | None:
    """A validator that opens no other document. Patterns run in linear time, or, where one looks around, with a limit
    on backtracking."""
    plain = jsonschema_rs.RegexOptions(size_limit=room.plain, dfa_size_limit=room.plain)
    limited = jsonschema_rs.FancyRegexOptions(
        backtrack_limit=_BACKTRACK_LIMIT, size_limit=room.piece, dfa_size_limit=room.piece
    )
    for patterns in (plain, limited):
        try:
            return jsonschema_rs.validator_for(text, pattern_options=patterns, offline=True)
        except (ValueError, jsonschema_rs.ReferencingError) as error:
            reason = type(error).__name__
    logger.warning("an output schema is not usable, only JSON as such is checked: %s", reason)
    return None


class TableBuilder:
    """Makes tables from changes, a few routes at a time: a push that moves one weight among a thousand aliases must
    not hold up requests."""

    def __init__(self, *, upstreams: Upstreams, book: Book, schemas: SchemaCache) -> None:
        self._upstreams = upstreams
        self._book = book
        self._schemas = schemas
        self._routes: dict[str, Route] = {}

    async def build(self, change: Change) -> Table:
        """The table after the change. Raises ValueError for a document that is no route; then nothing has changed."""
        routes = dict(self._routes)
        for alias in change.removed:
            routes.pop(alias, None)
        for number, document in enumerate(change.changed, start=1):
            route = wire.Route.model_validate(document)
            routes[route.alias] = _route(
                route, upstreams=self._upstreams, book=self._book, schemas=self._schemas
            )
            if number % _ROUTES_AT_ONCE == 0:
                await asyncio.sleep(0)
        self._routes = routes
        by_model: dict[str, Route] = {}
        for document in change.base_models:
            base = wire.BaseModelRoute.model_validate(document)
            by_model[base.name] = _base_route(base, upstreams=self._upstreams, book=self._book)
        by_model |= routes
        entries = {name: route.entry for name, route in sorted(by_model.items()) if route.stable is not None}
        return Table(
            version=change.version,
            by_model=by_model,
            body_keys=frozenset(
                source.name
                for route in by_model.values()
                for source in route.keys
                if source.kind is KeyKind.BODY
            ),
            models=b'{"object":"list","data":[' + b",".join(entries.values()) + b"]}",
            model_entries=entries,
        )


def _route(route: wire.Route, *, upstreams: Upstreams, book: Book, schemas: SchemaCache) -> Route:
    def leg(arm: Arm, target: wire.Target | None) -> Leg | None:
        if target is None or not target.upstreams:
            return None
        shadow = arm is Arm.CANDIDATE
        return Leg(
            revision=target.revision,
            revision_bytes=target.revision.encode(),
            served_name=target.served_name,
            quoted_name=json.dumps(target.served_name).encode(),
            upstreams=tuple(upstreams.get(url) for url in target.upstreams),
            metrics=book.metrics(route.alias, arm, target.revision),
            state=book.state(route.alias, arm, target.revision),
            shadow=book.state(route.alias, Arm.SHADOW, target.revision) if shadow else None,
            shadow_metrics=book.metrics(route.alias, Arm.SHADOW, target.revision) if shadow else None,
        )

    return Route(
        alias=route.alias,
        alias_bytes=route.alias.encode(),
        stable=leg(Arm.STABLE, route.stable),
        candidate=leg(Arm.CANDIDATE, route.candidate),
        weight=route.weight,
        mirror=route.mirror,
        sticky=route.sticky,
        keys=_key_sources(route.keys),
        salt=route.salt.encode() + b"\0",
        pins=tuple(
            Pin(tuple((match.name.lower(), match.exact) for match in pin.headers), Arm(pin.arm))
            for pin in route.pins
            if pin.headers
        ),
        retry_stable=route.retry_stable,
        watch=Watch.build(route.signals),
        validator=None if route.output_schema is None else schemas.get(route.output_schema),
        counts_words=route.counts_words,
        grouped=frozenset(route.grouped),
        sample=_sample(route, book),
        entry=_model_entry(route.alias),
    )


@functools.lru_cache(maxsize=_SHARED)
def _key_sources(texts: tuple[str, ...]) -> tuple[KeySource, ...]:
    return tuple(source for text in texts if (source := KeySource.parse(text)) is not None)


def _sample(route: wire.Route, book: Book) -> Sample | None:
    comparison = comparison_of(route)
    if not comparison:
        book.end_sample(route.alias)
        return None
    return book.sample(route.alias, comparison)


def _base_route(base: wire.BaseModelRoute, *, upstreams: Upstreams, book: Book) -> Route:
    leg = Leg(
        revision=BASE_REVISION,
        revision_bytes=BASE_REVISION.encode(),
        served_name=base.name,
        quoted_name=json.dumps(base.name).encode(),
        upstreams=tuple(upstreams.get(url) for url in base.upstreams),
        metrics=book.metrics(base.name, BASE_ARM, BASE_REVISION),
        state=None,
    )
    return Route(
        alias=base.name,
        alias_bytes=base.name.encode(),
        stable=leg if base.upstreams else None,
        is_base=True,
        entry=_model_entry(base.name),
    )


def _model_entry(name: str) -> bytes:
    return json.dumps(
        {"id": name, "object": "model", "created": _CREATED, "owned_by": "finetune-router"}
    ).encode()

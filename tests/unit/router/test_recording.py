"""What is counted of a request, and when."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import pytest

from finetune_operator.api import routes as wire
from finetune_operator.api.routes import GROUPS, Arm, Signal, SignalEvent
from finetune_router import bodies, outputs
from finetune_router.counters import ArmState, Book
from finetune_router.forwarding import Attempt
from finetune_router.observations import End, Observation
from finetune_router.recording import Recorder
from finetune_router.tables import Change, Route, SchemaCache, TableBuilder
from finetune_router.upstreams import Upstreams

SIGNALS = (
    Signal(name="errors", event=SignalEvent.ERROR),
    Signal(name="slow", event=SignalEvent.TTFT_OVER, threshold=1.0),
    Signal(name="long", event=SignalEvent.LATENCY_OVER, threshold=10.0),
    Signal(name="invalid", event=SignalEvent.SCHEMA_INVALID),
)


class Exchange:
    """The part of a connection that the recorder looks at."""

    def __init__(self, *, first_body_at: float = 0.0, paused: bool = False) -> None:
        self.started = bool(first_body_at)
        self.first_body_at = first_body_at
        self.paused = paused


class Desk:
    """A recorder, and requests of one candidate."""

    def __init__(self, route: Route) -> None:
        self.book = Book()
        self.recorder = Recorder(self.book, SchemaCache())
        self._route = route
        self.state: ArmState = self.book.state("bot", Arm.CANDIDATE, "ab12cd34")

    def begin(
        self,
        *,
        ago: float,
        format: object = None,  # noqa: A002
        path: str = "/v1/chat/completions",
        patience: float = math.inf,
        **exchange: Any,
    ) -> Observation:
        """A request that came so many seconds ago."""
        data = json.dumps({"model": "bot", "response_format": format}).encode()
        seen = Observation(
            route=self._route,
            state=self.state,
            metrics=self.book.metrics("bot", "Candidate", "ab12cd34"),
            path=path,
            body=bodies.parse_body(data, frozenset()),
            started_at=time.perf_counter() - ago,
        )
        seen.given_up_at = seen.started_at + patience
        seen.set_unit(7, Arm.CANDIDATE)
        seen.attempt = Attempt(connection=Exchange(**exchange))  # type: ignore[arg-type]
        self.recorder.begin(seen)
        return seen

    def finish(self, seen: Observation, end: End, code: int = 200, *, text: str = "{}") -> None:
        if end is End.ANSWERED:
            answer = {"choices": [{"index": 0, "message": {"content": text}, "finish_reason": "stop"}]}
            self.recorder.keep(seen, json.dumps(answer).encode())
        self.recorder.finish(seen, end, code)
        self.recorder.flush()

    @property
    def counted(self) -> tuple[int, dict[str, int]]:
        return self.state.requests, self.state.events


async def build_route(**more: Any) -> Route:
    target = wire.Target(revision="base", served_name="base-model", upstreams=("http://e:1",))
    route = wire.Route(
        alias="bot", owner="o", stable=target, candidate=target, signals=SIGNALS, comparison="c1", **more
    )
    builder = TableBuilder(upstreams=Upstreams(), book=Book(), schemas=SchemaCache())
    table = await builder.build(Change(1, [route.model_dump(mode="json", by_alias=True)], [], []))
    found = table.find("bot")
    assert found is not None
    return found


@pytest.fixture
async def desk() -> Desk:
    return Desk(await build_route())


async def test_what_hangs_is_counted_when_the_limit_passes_and_only_once(desk: Desk) -> None:
    seen = desk.begin(ago=0.5)
    desk.recorder.sweep()
    assert desk.counted == (0, {})
    seen.started_at -= 1.0
    seen.alarm_at -= 1.0
    desk.recorder.sweep()
    desk.recorder.sweep()
    assert desk.counted == (1, {"slow": 1})
    seen.started_at -= 9.0
    seen.alarm_at -= 9.0
    desk.recorder.sweep()
    assert desk.counted == (1, {"slow": 1, "long": 1})
    assert desk.state.watched == {"slow": 1, "long": 1}, "whether it fails is not known yet"
    desk.finish(seen, End.ERROR, 504)
    assert desk.counted == (1, {"slow": 1, "long": 1, "errors": 1})
    assert desk.state.watched == dict.fromkeys(("slow", "long", "errors", "invalid"), 1)
    desk.recorder.sweep()
    assert desk.counted == (1, {"slow": 1, "long": 1, "errors": 1})


async def test_of_a_user_who_left_in_time_nothing_is_known_and_of_a_late_one_only_that(desk: Desk) -> None:
    desk.finish(desk.begin(ago=0.5), End.GONE)
    assert (desk.counted, desk.state.watched) == ((0, {}), {})
    desk.finish(desk.begin(ago=2.0), End.GONE)
    assert (desk.counted, desk.state.watched) == ((1, {"slow": 1}), {"slow": 1})
    desk.finish(desk.begin(ago=0.1), End.ANSWERED)
    assert desk.state.watched == {"slow": 2, "long": 1, "errors": 1, "invalid": 1}


async def test_a_first_byte_in_time_is_not_late_however_long_the_rest_takes(desk: Desk) -> None:
    desk.begin(ago=5.0, first_body_at=time.perf_counter() - 4.5)
    desk.recorder.sweep()
    assert desk.counted == (0, {})


@pytest.mark.parametrize("end", [End.ANSWERED, End.CLIENT, End.GONE, End.ERROR])
async def test_an_answer_that_takes_longer_than_a_candidate_may_is_an_error_from_then_on(
    desk: Desk, end: End
) -> None:
    seen = desk.begin(ago=0.5, patience=0.4)
    desk.recorder.sweep()
    assert desk.counted == (1, {"errors": 1})
    assert desk.state.watched == {"errors": 1}
    desk.finish(seen, end, text="no json")
    assert desk.counted == (1, {"errors": 1})
    assert desk.state.watched == dict.fromkeys(("slow", "long", "errors", "invalid"), 1)
    assert desk.state.seconds.n == 0
    desk.finish(desk.begin(ago=0.5, patience=0.6), End.ANSWERED)
    assert desk.counted == (2, {"errors": 1})


@pytest.mark.parametrize(
    ("ago", "exchange", "counted"),
    [
        (0.5, {}, (0, {})),
        (3.0, {}, (1, {"slow": 1})),
        (11.0, {}, (1, {"slow": 1, "long": 1})),
        (11.0, {"first": 10.5}, (1, {"long": 1})),
        (11.0, {"first": 10.5, "paused": True}, (0, {})),
    ],
    ids=["soon", "no first byte", "nothing", "slow rest", "slow reader"],
)
async def test_a_client_that_left_counts_where_it_had_waited_too_long(
    desk: Desk, ago: float, exchange: dict[str, Any], counted: tuple[int, dict[str, int]]
) -> None:
    first = exchange.pop("first", None)
    if first is not None:
        exchange["first_body_at"] = time.perf_counter() - first
    seen = desk.begin(ago=ago, **exchange)
    desk.finish(seen, End.GONE, 499)
    assert desk.counted == counted


async def test_a_late_answer_has_its_signals_and_its_latency_once(desk: Desk) -> None:
    seen = desk.begin(ago=3.0)
    desk.recorder.sweep()
    desk.finish(seen, End.ANSWERED, text="no json")
    assert desk.counted == (1, {"slow": 1, "invalid": 1})
    assert (desk.state.seconds.n, round(desk.state.seconds.sum)) == (1, 3)


async def test_a_request_that_ended_before_is_as_long_as_it_was(desk: Desk) -> None:
    seen = desk.begin(ago=20.0)
    desk.recorder.finish(seen, End.ERROR, 400, at=seen.started_at + 0.2)
    desk.recorder.flush()
    assert desk.counted == (1, {"errors": 1})


async def test_pinned_requests_are_not_watched(desk: Desk) -> None:
    seen = desk.begin(ago=0.0)
    desk.recorder.forget(seen)
    seen.counted = False
    seen.started_at -= 100
    desk.recorder.begin(seen)
    desk.recorder.sweep()
    desk.finish(seen, End.ANSWERED)
    assert desk.counted == (0, {})


@pytest.mark.parametrize(
    ("path", "body", "events"),
    [
        ("/v1/responses", b"", {"errors": 1}),
        ("/v1/responses", b": ping\n\n", {"errors": 1}),
        ("/v1/responses", b"data: [DONE]\n\n", {"errors": 1}),
        ("/v1/responses", b'data: {"type": "response.created"}\n\n', {}),
        ("/v1/responses", b"data: no json\n\n", {"errors": 1}),
        ("/v1/completions", b'data: {"choices": []}\n\n', {"errors": 1}),
        ("/v1/completions", b'data: {"choices": [{"delta": {"role": "assistant"}}]}\n\n', {"errors": 1}),
        ("/v1/completions", b'data: {"choices": [{"finish_reason": "stop"}]}\n\n', {"invalid": 1}),
        ("/v1/completions", b'data: {"choices": [{"text": "{}"}]}\n\n', {}),
    ],
)
async def test_a_stream_that_says_nothing_has_failed_and_one_that_ends_without_text_is_empty(
    desk: Desk, path: str, body: bytes, events: dict[str, int]
) -> None:
    seen = desk.begin(ago=0.1, path=path)
    seen.is_stream = True
    desk.recorder.keep(seen, body)
    desk.recorder.finish(seen, End.ANSWERED, 200)
    desk.recorder.flush()
    assert desk.counted == (1, events)


@pytest.mark.parametrize(
    ("path", "is_stream", "body", "events"),
    [
        ("/v1/chat/completions", False, b"{}", {"errors": 1}),
        ("/v1/chat/completions?a=b", False, b"[]", {"errors": 1}),
        ("/v1/completions", False, b'{"choices": null}', {"errors": 1}),
        ("/v1/completions", False, b'{"choices": []}', {"invalid": 1}),
        ("/v1/chat/completions", True, b"data: {}\n\ndata: [DONE]\n\n", {"errors": 1}),
        ("/v1/chat/completions", True, b'event: error\ndata: {"message": "x"}\n\n', {"errors": 1}),
        ("/v1/responses", False, b'{"output": []}', {}),
        ("/v1/embeddings", False, b'{"data": []}', {}),
    ],
)
async def test_an_answer_without_choices_is_an_error_where_there_must_be_some(
    desk: Desk, path: str, is_stream: bool, body: bytes, events: dict[str, int]
) -> None:
    seen = desk.begin(ago=0.1, path=path)
    seen.is_stream = is_stream
    desk.recorder.keep(seen, body)
    desk.recorder.finish(seen, End.ANSWERED, 200)
    desk.recorder.flush()
    assert desk.counted == (1, events)


async def test_an_answer_that_is_not_packed_as_it_says_is_an_error(desk: Desk) -> None:
    seen = desk.begin(ago=0.1)
    seen.encoding = "gzip"
    desk.recorder.keep(seen, b'{"choices": []}')
    desk.recorder.finish(seen, End.ANSWERED, 200)
    desk.recorder.flush()
    assert desk.counted == (1, {"errors": 1})
    assert desk.recorder.unread == 0


async def test_an_answer_that_cannot_be_counted_takes_no_other_with_it(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def stumble(*_: object) -> None:
        raise OverflowError("the text of a user")

    with monkeypatch.context() as broken:
        broken.setattr(outputs, "fired_events", stumble)
        desk.finish(desk.begin(ago=0.1), End.ANSWERED)
    assert "OverflowError" in caplog.text
    assert "the text of a user" not in caplog.text
    desk.finish(desk.begin(ago=0.1), End.ANSWERED)
    assert desk.counted == (1, {})


COUNT = {"type": "object", "required": ["count"]}
NAME = {"type": "object", "required": ["name"]}


def json_schema(schema: object, **more: object) -> dict[str, object]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **more}}


@pytest.mark.parametrize(
    ("format", "text", "valid"),
    [
        (None, '{"count": 1}', True),
        (None, '{"name": "a"}', False),
        (json_schema(NAME), '{"name": "a"}', True),
        (json_schema(NAME), '{"count": 1}', False),
        ({"type": "json_object"}, '{"name": "a"}', False),
        ({"type": "json_schema"}, '{"name": "a"}', False),
        (json_schema({"type": "no such type"}), "[]", True),
        (json_schema({"$defs": {"n": NAME}, "$ref": "#/$defs/n"}), '{"count": 1}', False),
        (json_schema({**NAME, "items": {"$ref": "#"}}), "{}", True),
        (json_schema(NAME, description="x" * 40_000), "[]", True),
        (json_schema(NAME, description="x" * 40_000), "no json", False),
        (json_schema({**NAME, "patternProperties": {r"\p{L}{200}": {}}}), "{}", True),
    ],
    ids=[
        "none", "none, bad", "own", "own, bad", "json_object", "no schema", "unusable", "references, bad", "recursive",
        "too large", "too large, bad", "pattern too large",
    ],
)  # fmt: skip
async def test_the_schema_of_the_request_goes_before_the_routes(
    format: object,  # noqa: A002
    text: str,
    valid: bool,
) -> None:
    desk = Desk(await build_route(output_schema=COUNT))
    desk.finish(desk.begin(ago=0.1, format=format), End.ANSWERED, text=text)
    assert desk.counted == (1, {} if valid else {"invalid": 1})


async def test_quantities_that_the_route_names_are_summed_by_group_of_keys() -> None:
    desk = Desk(await build_route(grouped=("seconds", "completion_tokens")))
    desk.finish(desk.begin(ago=2.0), End.ANSWERED)
    other = desk.begin(ago=2.0)
    other.set_unit(3 + 5 * GROUPS, Arm.CANDIDATE)
    desk.finish(other, End.ANSWERED)
    unasked = desk.begin(ago=2.0)
    unasked.sample_hash = None  # pinned
    desk.finish(unasked, End.ANSWERED)
    state = desk.state
    assert state.seconds.n == 3
    assert [number for number, (n, _) in enumerate(state.seconds.groups) if n] == [3, 7]
    assert state.seconds.groups[7][1] == pytest.approx(2.0, abs=0.5)
    assert state.ttft.groups == []


async def test_words_are_counted_where_drift_asks_for_them() -> None:
    desk = Desk(await build_route(counts_words=True))
    desk.finish(desk.begin(ago=0.1), End.ANSWERED, text="Reset it in the settings")
    desk.finish(desk.begin(ago=0.1), End.ERROR, 502)
    assert sum(desk.state.words) == 5
    other = Desk(await build_route())
    other.finish(other.begin(ago=0.1), End.ANSWERED, text="Reset it in the settings")
    assert other.state.words == []

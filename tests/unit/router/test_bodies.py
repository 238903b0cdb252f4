"""The router's reading of request bodies, against json.loads."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_router import bodies, scanner
from finetune_router.bodies import Body
from finetune_router.scanner import BrokenBodyError

WANTED = frozenset(("user", "model", "stream"))
KEYS = st.sampled_from(["model", "user", "stream", "messages", 'mo"del', "\\", "MODEL", ""])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
    | st.sampled_from(["model", '"model": "x"', '\\"', "}{][", "\\\\"])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(KEYS | st.text(), inner), max_leaves=12
)
BLANKS = st.text(alphabet=" \t\r\n", max_size=3)


@st.composite
def documents(draw: st.DrawFn) -> bytes:
    """A JSON object with repeated keys, odd white space and escapes where they are not needed."""
    pairs = draw(st.lists(st.tuples(KEYS | st.text(), VALUES), max_size=6))
    parts = []
    for key, value in pairs:
        quoted = json.dumps(key, ensure_ascii=draw(st.booleans()))
        if draw(st.booleans()):
            quoted = '"' + "".join(f"\\u{ord(sign):04x}" for sign in key if ord(sign) < 0x10000) + '"'
        text = json.dumps(value, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 1])))
        parts.append(draw(BLANKS) + quoted + draw(BLANKS) + ":" + draw(BLANKS) + text + draw(BLANKS))
    return (draw(BLANKS) + "{" + ",".join(parts) + "}" + draw(BLANKS)).encode("utf-8", "surrogatepass")


def loads(data: bytes) -> dict[str, Any]:
    document = json.loads(data.decode())
    assert isinstance(document, dict)
    return document


def scanned(data: bytes) -> Body:
    return asyncio.run(bodies.scan_body(data, WANTED))


def check_same_as_json(body: Body, data: bytes) -> None:
    expected = loads(data)
    model = expected.get("model")
    assert body.model == (model if isinstance(model, str) else None)
    assert body.stream is (expected.get("stream") is True)
    user = expected.get("user")
    assert body.texts.get("user") == (user if isinstance(user, str) and user else None)


@settings(max_examples=150)
@given(documents())
def test_both_ways_of_reading_give_what_json_loads_gives(data: bytes) -> None:
    check_same_as_json(bodies.parse_body(data, WANTED), data)
    check_same_as_json(scanned(data), data)


@settings(max_examples=150)
@given(documents(), st.text())
def test_only_the_model_changes_and_no_reader_sees_the_old_one(data: bytes, name: str) -> None:
    expected = loads(data)
    quoted = json.dumps(name).encode()
    for body in (bodies.parse_body(data, WANTED), scanned(data)):
        if body.model is None:
            continue
        pairs = json.loads(body.for_model(quoted).decode(), object_pairs_hook=list)
        assert {value for key, value in pairs if key == "model"} == {name}
        assert loads(body.for_model(quoted)) == {**expected, "model": name}


@settings(max_examples=150)
@given(documents(), st.data())
def test_what_json_loads_refuses_is_refused_when_it_is_short(data: bytes, draws: st.DataObject) -> None:
    position = draws.draw(st.integers(0, len(data) - 1))
    broken = data[:position] + draws.draw(st.binary(max_size=2)) + data[position + 1 :]
    try:
        valid = isinstance(json.loads(broken.decode()), dict)
    except ValueError:
        valid = False
    if valid:
        check_same_as_json(bodies.parse_body(broken, WANTED), broken)
        check_same_as_json(scanned(broken), broken)
    else:
        with pytest.raises(BrokenBodyError):
            bodies.parse_body(broken, WANTED)


@settings(max_examples=200)
@given(st.binary(max_size=60) | st.text(alphabet='{}[]":,\\ a1u0', max_size=40).map(str.encode))
def test_the_scan_ends_on_anything(data: bytes) -> None:
    try:
        scanner.scan_at_once(data, WANTED)
    except BrokenBodyError:
        return
    assert data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '"model"',
        "{",
        '{"model"',
        '{"model":',
        '{"model":"x"',
        '{"model":"x",}',
        '{"model" "x"}',
        "{'model':'x'}",
        '{"model":"x"} extra',
        '{"model":"x\\"}',
        '{"messages":[{"content":"never closed}]}',
        '{"model":tru}',
        '{model:"x"}',
    ],
)
def test_a_broken_outer_object_is_refused_by_both(text: str) -> None:
    with pytest.raises(BrokenBodyError):
        bodies.parse_body(text.encode(), WANTED)
    with pytest.raises(BrokenBodyError):
        scanned(text.encode())


def test_utf16_is_refused_and_a_byte_order_mark_is_not() -> None:
    text = '{"model":"x"}'
    with pytest.raises(BrokenBodyError):
        scanned(text.encode("utf-16"))
    assert scanned(b"\xef\xbb\xbf" + text.encode()).model == "x"
    assert bodies.parse_body(b"\xef\xbb\xbf" + text.encode(), WANTED).model == "x"


def test_deep_nesting_breaks_nothing() -> None:
    nested = '{"model":"x","a":' + "[" * 100_000 + "]" * 100_000 + "}"
    assert scanned(nested.encode()).model == "x"
    with pytest.raises(BrokenBodyError, match="not JSON"):
        bodies.parse_body(b'{"a":' + b"[" * 10_000, WANTED)


@pytest.mark.parametrize("depth", [500, 900, 960, 980, 1000, 1020])
def test_a_response_format_that_is_nested_too_deeply_is_refused(depth: int) -> None:
    data = b'{"model":"x","response_format":' + b"[" * depth + b"]" * depth + b"}"
    try:
        assert bodies.parse_body(data, WANTED).model == "x"
    except BrokenBodyError:
        assert depth > 500


async def test_other_tasks_have_their_turn_during_a_nasty_long_body() -> None:
    """Each bracket is a step: a body of nothing else is the slowest that there is."""
    data = b'{"model":"x","a":[' + b"[]," * 400_000 + b"1]}"
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    body = await bodies.scan_body(data, WANTED)
    counting.cancel()
    assert body.model == "x"
    assert turns > 100


def test_the_response_format_comes_along() -> None:
    shape = {"type": "json_schema", "json_schema": {"schema": {"type": "object"}}}
    data = json.dumps({"model": "x", "response_format": shape}).encode()
    for body in (bodies.parse_body(data, WANTED), scanned(data)):
        assert body.response_format is not None
        assert json.loads(body.response_format) == shape


def bare(data: bytes) -> bytes:
    return zlib.compress(data)[2:-4]


@pytest.mark.parametrize(
    ("encoding", "pack"),
    [("gzip", gzip.compress), ("x-gzip", gzip.compress), ("deflate", zlib.compress), ("deflate", bare)],
)
def test_a_packed_body_is_unpacked_piece_by_piece(encoding: str, pack: Callable[[bytes], bytes]) -> None:
    data = bytes(1_000_000) + b"end"
    pieces = list(bodies.unpack(pack(data), encoding))
    assert b"".join(pieces) == data
    assert max(map(len, pieces)) < 100_000, "it would hold up everybody else"
    for broken in (pack(data)[:-20], b"", b"\x1f\x8bno", b'{"model": "x"}'):
        with pytest.raises(BrokenBodyError, match=f"the body is not {encoding}: "):
            list(bodies.unpack(broken, encoding))

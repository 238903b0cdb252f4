"""What the router reads off an answer after the user has it."""

from __future__ import annotations

import gzip
import itertools
import json
import time
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_operator.api.routes import WORD_BINS, SignalEvent
from finetune_router import outputs, tables
from finetune_router.outputs import EventReader, Output

EVERY = frozenset(SignalEvent)


def answer(text: str | None, *, finish: str = "stop", **message: object) -> bytes:
    return json.dumps(
        {
            "choices": [
                {
                    "index": 0,
                    "finish_reason": finish,
                    "message": {"role": "assistant", "content": text, **message},
                }
            ],
            "usage": {"completion_tokens": 7},
        }
    ).encode()


def fired(body: bytes, schema: dict[str, Any] | None = None) -> set[str]:
    validator = None if schema is None else tables.SchemaCache().get(schema)
    return {str(event) for event in outputs.fired_events(outputs.read_answer(body), EVERY, validator)}


def test_a_good_answer_fires_only_what_asks_for_json() -> None:
    assert fired(answer("Reset it in the settings.")) == {"schema_invalid"}
    assert fired(answer('{"intent": "reset"}')) == set()


@pytest.mark.parametrize(
    ("body", "event"),
    [
        (answer(""), "empty_output"),
        (answer("  \n"), "empty_output"),
        (answer("and then", finish="length"), "truncated"),
        (answer("no", finish="content_filter"), "flagged"),
        (answer(None, refusal="I will not"), "refusal"),
        (answer("I'm sorry, but I can't help with that."), "refusal"),
        (answer("I’m sorry, I cannot assist with this request."), "refusal"),
        (answer("Sorry, but I am unable to do that."), "refusal"),
        (answer("As an AI language model, I cannot do this."), "refusal"),
        (answer("Unfortunately, I can't share that."), "refusal"),
        (answer("The cat sat. " * 12), "repetition"),
        (answer("Well, " + "ha" * 60), "repetition"),
    ],
)
def test_each_signal(body: bytes, event: str) -> None:
    assert event in fired(body)


def test_words_are_counted_whatever_their_case_and_marks() -> None:
    assert list(outputs.word_bins("Reset it, in the settings!")) == list(
        outputs.word_bins("reset IT in the Settings")
    )
    assert len(list(outputs.word_bins("one two three"))) == 3
    assert len(list(outputs.word_bins("設定でリセット"))) == 7, "a script without blanks between words"
    assert list(outputs.word_bins(" \n")) == []
    assert len(list(outputs.word_bins("word " * 100_000))) == 32
    assert all(0 <= index < WORD_BINS for index in outputs.word_bins("half a pair \ud800 x"))


@pytest.mark.parametrize(
    "text",
    [
        "You can't reset it there; use the settings.",
        "I can help with that.",
        "I am sorry to hear that. Let us look at your order.",
        "Sorry for the delay! Your order is on its way.",
        "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24",
        "It is a long sentence, it has commas, it has more commas, but it does not say one thing over and over.",
    ],
)
def test_ordinary_answers_are_no_refusals_and_no_loops(text: str) -> None:
    assert not fired(answer(text)) & {"refusal", "repetition", "empty_output"}


@pytest.mark.parametrize("text", [" " * 5000, "\n" * 200, ",\t" * 100, "I'm sorry" + " " * 191])
def test_a_text_of_blanks_is_judged_at_once(text: str) -> None:
    began = time.process_time()
    for _ in range(10):
        assert not outputs.is_refusal(text)
    assert time.process_time() - began < 0.05  # with each way to share them out, 20 ms a text


@pytest.mark.parametrize("tokens", [-5, 10**400, 1.5, "7", None])
def test_a_number_of_tokens_that_is_none_is_not_taken(tokens: object) -> None:
    body = json.dumps({"choices": [], "usage": {"completion_tokens": tokens}}).encode()
    assert outputs.read_answer(body).completion_tokens is None


def test_a_tool_call_is_neither_empty_nor_invalid() -> None:
    assert fired(answer(None, tool_calls=[{"id": "1"}])) == set()


def test_an_answer_without_choices_shows_nothing() -> None:
    assert fired(b'{"object":"list","data":[{"embedding":[0.1]}]}') == set()


def test_any_of_several_choices_counts() -> None:
    body = json.dumps(
        {"choices": [{"index": 0, "text": "{}"}, {"index": 1, "text": "", "finish_reason": "length"}]}
    ).encode()
    assert fired(body) == {"schema_invalid", "empty_output", "truncated"}


def test_the_schema_is_applied() -> None:
    schema = {"type": "object", "required": ["intent"], "properties": {"intent": {"enum": ["reset", "buy"]}}}
    assert "schema_invalid" not in fired(answer('{"intent": "reset"}'), schema)
    assert "schema_invalid" in fired(answer('{"intent": "sing"}'), schema)
    assert "schema_invalid" in fired(answer("```json\n{}\n```"), schema)


@pytest.mark.parametrize(
    "schema", [{"type": "nonsense"}, {"$ref": "http://127.0.0.1:1/x.json"}, {"$ref": "#/nowhere"}]
)
def test_a_schema_of_no_use_leaves_the_check_for_json(schema: dict[str, Any]) -> None:
    assert "schema_invalid" not in fired(answer("{}"), schema)
    assert "schema_invalid" in fired(answer("no"), schema)


def test_a_pattern_that_backtracks_for_ever_does_not() -> None:
    schema = {"type": "string", "pattern": "^(?=(a+)+$)(a+)+$"}
    assert "schema_invalid" in fired(answer(json.dumps("a" * 5000 + "b")), schema)


def event(document: object) -> bytes:
    return b"data: " + json.dumps(document).encode() + b"\n\n"


STREAM = (
    event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    + b": a comment\r\n\r\n"
    + event({"choices": [{"index": 0, "delta": {"content": '{"größe": '}}]})
    + event({"choices": [{"index": 0, "delta": {"content": "1}"}, "finish_reason": "stop"}]})
    + event({"choices": [], "usage": {"completion_tokens": 9}})
    + b"data: [DONE]\n\n"
)


@settings(max_examples=100)
@given(st.lists(st.integers(0, len(STREAM)), max_size=6))
def test_a_stream_reads_the_same_however_it_is_cut(cuts: list[int]) -> None:
    output, reader = Output(), EventReader()
    edges = [0, *sorted(cuts), len(STREAM)]
    for start, end in itertools.pairwise(edges):
        reader.feed(STREAM[start:end], output)
    assert output.choices[0].text == '{"größe": 1}'
    assert output.choices[0].finish_reason == "stop"
    assert output.completion_tokens == 9
    assert reader.events == 4


def test_an_error_in_a_stream_is_an_error() -> None:
    output = Output()
    EventReader().feed(STREAM + event({"error": {"message": "out of memory"}}), output)
    assert output.error


@pytest.mark.parametrize(
    "document",
    [
        {"error": {"message": "x"}},
        {"object": "error", "message": "x"},
        {"type": "error", "error": {"message": "x"}},
        {"type": "error", "code": "server_error", "message": "x"},
    ],
)
@pytest.mark.parametrize("before", [b"", b": waiting\n\n", b"event: error\r\n", b"\xef\xbb\xbf: hi\n\n"])
@pytest.mark.parametrize("encoding", ["", "gzip"])
def test_a_stream_that_begins_with_an_error_is_seen_as_soon_as_its_first_event_is_there(
    document: dict[str, Any], before: bytes, encoding: str
) -> None:
    data = before + event(document)
    for size in range(len(data) + 1):
        part = gzip.compress(data[:size]) if encoding else data[:size]
        found = outputs.begins_with_error(part, encoding, 1000)
        assert found is (None if size < len(data) - 1 else True)


def test_the_last_event_may_come_without_an_end_of_its_line() -> None:
    output, reader = Output(), EventReader()
    reader.feed(STREAM + event({"error": {"message": "x"}}).rstrip(), output)
    assert not output.error
    reader.end(output)
    assert output.error


def test_what_begins_with_no_error() -> None:
    assert outputs.begins_with_error(STREAM, "", 1000) is False
    assert outputs.begins_with_error(event({"error": None, "choices": []}), "", 1000) is False
    assert outputs.begins_with_error(b": " + b"x" * 1000, "", 1000) is False, "no longer kept back"
    assert outputs.begins_with_error(b"data:\n\n" + STREAM, "", 1000) is False, "a sign of life"
    assert outputs.begins_with_error(b'data: {\ndata: "choices": []}\n\n', "", 1000) is False, (
        "two lines of one"
    )


def test_a_stream_that_cannot_be_read_begins_with_an_error() -> None:
    assert outputs.begins_with_error(b"no gzip", "gzip", 1000) is True
    assert outputs.begins_with_error(b"data: loading\n\n", "", 1000) is True
    assert outputs.begins_with_error(b"data: load", "", 1000) is None


@pytest.mark.parametrize("encoding", ["", "gzip"])
@pytest.mark.parametrize(
    "stream", [b"", b": waiting\n\n", b"data:\n\n", b"data: [DONE]\r\n\r\n", b'data: {"error": 1}']
)
def test_a_stream_that_ends_before_it_begins_is_an_error(stream: bytes, encoding: str) -> None:
    packed = gzip.compress(stream) if encoding else stream
    assert outputs.begins_with_error(packed, encoding, 1000, is_whole=True) is True


def test_a_whole_stream_may_end_without_the_end_of_its_line() -> None:
    assert outputs.begins_with_error(b'data: {"choices": []}', "", 1000) is None
    assert outputs.begins_with_error(b'data: {"choices": []}', "", 1000, is_whole=True) is False


@pytest.mark.parametrize(
    ("stream", "is_error"),
    [
        (b"data: loading\n\n", True),
        (b'data: {"choices": [', True),
        (b'data: {\r\ndata: "choices": []}\r\n\r\n', False),
        (b"data:\n\ndata: [DONE]\n\n", False),
    ],
)
def test_data_that_is_no_json_is_an_error(stream: bytes, is_error: bool) -> None:
    output, reader = Output(), EventReader()
    reader.feed(STREAM + stream, output)
    reader.end(output)
    assert output.error is is_error


def test_lines_may_end_in_a_carriage_return() -> None:
    assert outputs.begins_with_error(b': hi\r\rdata: {"error": 1}', "", 1000) is None
    assert outputs.begins_with_error(b': hi\r\rdata: {"error": 1}\r', "", 1000) is True


def test_a_very_long_text_is_kept_in_part_and_not_judged() -> None:
    output, reader = Output(), EventReader()
    piece = event({"choices": [{"index": 0, "delta": {"content": "word " * 2000}}]})
    for _ in range(150):
        reader.feed(piece, output)
    choice = output.choices[0]
    assert choice.cut
    assert len(choice.text) <= outputs.TEXT_LIMIT
    assert SignalEvent.SCHEMA_INVALID not in outputs.fired_events(output, EVERY, None)


def test_lines_without_end_that_are_no_json_cost_no_more_than_others() -> None:
    output, reader = Output(), EventReader()
    started = time.perf_counter()
    for _ in range(20):
        reader.feed(b"data: loading\n" * 10_000, output)
    assert time.perf_counter() - started < 2
    assert output.error, "no more than the text of an answer is kept of an event"


def test_a_response_that_fails_in_its_stream_is_an_error() -> None:
    """As /v1/responses tells it."""
    output, reader = Output(), EventReader()
    reader.feed(event({"type": "response.created", "response": {"error": None}}), output)
    assert not output.error
    failed = {"status": "failed", "error": {"code": "server_error"}}
    reader.feed(event({"type": "response.failed", "response": failed}), output)
    assert output.error


def test_how_an_answer_begins() -> None:
    body = b'\xef\xbb\xbf\r\n {"choices": []}'
    for data, encoding, expected in (
        (body, "", True),
        (gzip.compress(body), "gzip", True),
        (gzip.compress(b" " * 10_000_000)[:1000], "gzip", True),
        (b" " * 300 + body, "", True),
        (body, "br", True),
        (body, "gzip", False),
        (b"", "", False),
        (b"It works!", "", False),
        (gzip.compress(b"<html>"), "gzip", False),
    ):
        assert outputs.begins_as_json(data, encoding) is expected, (data[:20], encoding)


def test_compressed_answers_are_read_and_bombs_are_not() -> None:
    body = answer("hello")
    assert outputs.decoded(gzip.compress(body), "gzip", 10_000) == body
    assert outputs.decoded(gzip.compress(b"0" * 10_000_000), "gzip", 1000) is None
    assert outputs.decoded(body, "br", 1000) is None
    bare = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    assert outputs.decoded(bare.compress(body) + bare.flush(), "deflate", 10_000) == body
    for encoding in ("gzip", "deflate"):
        with pytest.raises(ValueError, match=encoding):
            outputs.decoded(b"not packed", encoding, 1000)

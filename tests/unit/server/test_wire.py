"""What clients send: read as OpenAI says, and refused by name where this engine would ignore it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from finetune_server import wire
from finetune_server.errors import BadRequest

MESSAGES = [{"role": "user", "content": "SECRET-PROMPT"}]


def chat(**more: Any) -> wire.ChatRequest:
    return wire.parse(json.dumps({"model": "m", "messages": MESSAGES, **more}).encode(), wire.ChatRequest)


def schema_format(**more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}, **more}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 2}, "n"),
        ({"n": 0}, "n"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format"),
        ({"response_format": schema_format(strict=True)}, "response_format"),
        ({"response_format": ["json_schema"]}, "response_format"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"guided_json": {}}, "guided_json"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens"),
        ({"include_stop_str_in_output": True}, "include_stop_str_in_output"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"seed": 2**64}, "seed"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"model": None}, "model"),
    ],
)
def test_errors_name_the_field_and_never_repeat_the_prompt(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        chat(**fields)
    assert caught.value.param == param
    assert param in str(caught.value)
    assert "SECRET" not in str(caught.value)
    assert "[type=" not in str(caught.value)


def test_too_many_are_told_as_too_many() -> None:
    """Not as the other type that the field may have."""
    with pytest.raises(BadRequest, match=r"stop.*at most 16"):
        chat(stop=["x"] * 17)
    with pytest.raises(BadRequest, match=r"stop.*at least 1 character"):
        chat(stop=["x", ""])
    prompts = json.dumps({"model": "m", "prompt": ["x"] * 65}).encode()
    with pytest.raises(BadRequest, match=r"prompt.*at most 64"):
        wire.parse(prompts, wire.CompletionRequest)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        (wire.CompletionRequest, {"prompt": ["x"] * 1000}),
        (wire.CompletionRequest, {"prompt": [["x"] * 1000]}),
        (wire.ChatRequest, {"messages": [1] * 1000}),
        (wire.ChatRequest, {"messages": [{"role": "user", "content": [1] * 1000}]}),
        (wire.ChatRequest, {"messages": MESSAGES, "stop": [1] * 1000}),
        (wire.ChatRequest, {"messages": MESSAGES, "stop_token_ids": ["x"] * 1000}),
    ],
)
def test_a_long_list_is_refused_at_its_first_wrong_item(
    kind: type[wire.Request], fields: dict[str, Any]
) -> None:
    """A prompt of two million texts took twelve seconds, in which nobody else was answered."""
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"model": "m", **fields})
    assert caught.value.error_count() < 10


def test_so_many_messages_are_refused_before_all_are_read() -> None:
    """300,000 of them took more than a second, in which nobody else was answered."""
    many = [{"role": "user", "content": "a"}] * wire.MAX_MESSAGES
    with pytest.raises(BadRequest, match=r"messages.*at most 10000"):
        chat(messages=[*many, {"role": "user", "content": "a"}, "not read"])


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"nul", b"\xff", b'"x"', b"[" * 100_000])
def test_bodies_that_are_no_object_are_refused(body: bytes) -> None:
    with pytest.raises(BadRequest, match="the body is not"):
        wire.parse(body, wire.ChatRequest)


def test_neutral_values_and_unknown_fields_are_accepted() -> None:
    asked = chat(n=1, tools=[], response_format={"type": "text"}, logit_bias={}, user="u", metadata={"a": 1})
    settings = asked.sampling(max_tokens=5, defaults={"temperature": 0.6, "top_k": 50}, logprobs=None)
    assert (settings.temperature, settings.top_p, settings.top_k) == (0.6, 1.0, 50)
    assert (
        chat(temperature=0).sampling(max_tokens=5, defaults={"temperature": 0.6}, logprobs=None).temperature
        == 0
    )


def test_null_is_as_good_as_left_out() -> None:
    asked = chat(stream=None, stream_options={"include_usage": None}, ignore_eos=None, stop=None, seed=None)
    assert not asked.stream
    assert not asked.wants_usage()
    assert asked.sampling(max_tokens=5, defaults={}, logprobs=None).ignore_eos is False


def test_contents_of_several_text_parts_are_one_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = chat(messages=[{"role": "user", "name": "x", "content": parts}])
    assert asked.messages[0].render() == {"role": "user", "name": "x", "content": "a\nb"}
    image = chat(messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])
    with pytest.raises(BadRequest, match="'image_url' is not supported"):
        image.messages[0].render()


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2]], [[1], [2]])],
)
def test_completions_take_texts_and_tokens(prompt: Any, expected: list[Any]) -> None:
    body = json.dumps({"model": "m", "prompt": prompt}).encode()
    assert wire.parse(body, wire.CompletionRequest).prompts() == expected


@pytest.mark.parametrize("more", [{}, {"strict": False}, {"strict": None}])
def test_a_schema_that_is_not_strict_promises_nothing_and_is_taken(more: dict[str, Any]) -> None:
    assert chat(response_format=schema_format(**more)).model == "m"

"""Formats: recognized by their columns, mapped, and refused with the line, the value and the remedy."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_trainer.data.files import Row
from finetune_trainer.data.formats import detect_format, parse_rows
from finetune_trainer.data.shapes import Chat, Pair
from finetune_trainer.failures import BadConfig, BadData
from finetune_trainer.runfile import DataFormat, Source

USER = {"role": "user", "content": "hello"}
ASSISTANT = {"role": "assistant", "content": "hi"}


def rows(*values: dict[str, Any]) -> list[Row]:
    return [Row(value, "file:///data/rows.jsonl", number) for number, value in enumerate(values, start=1)]


def source(**parts: Any) -> Source:
    return Source(uri="file:///data/rows.jsonl", **parts)


def refusal(*values: dict[str, Any], **parts: Any) -> str:
    with pytest.raises(BadData) as caught:
        parse_rows(rows(*values), source(**parts))
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"messages": [USER, ASSISTANT]}, DataFormat.MESSAGES),
        ({"prompt": "a", "completion": "b", "id": 1}, DataFormat.PROMPT_COMPLETION),
        ({"instruction": "a", "input": "", "output": "b"}, DataFormat.ALPACA),
        ({"instruction": "a", "output": "b", "text": "a b"}, DataFormat.ALPACA),
        ({"text": "a"}, DataFormat.TEXT),
    ],
)
def test_auto_recognizes_the_format_by_the_columns(values: dict[str, Any], expected: DataFormat) -> None:
    assert detect_format(rows(values)[0], source())[0] is expected


def test_columns_are_mapped_before_recognition() -> None:
    examples = parse_rows(
        rows({"question": "q", "answer": "a"}), source(columns={"prompt": "question", "completion": "answer"})
    )
    assert examples == [
        Pair(prompt="q", completion="a", chat_prompt="q", where="file:///data/rows.jsonl line 1")
    ]


def test_alpaca_joins_instruction_and_input_for_chat_and_has_headings_for_raw_text() -> None:
    first, second = parse_rows(
        rows(
            {"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Greet.", "output": "Hi"}
        ),
        source(),
    )
    assert isinstance(first, Pair)
    assert isinstance(second, Pair)
    assert first.chat_prompt == "Add.\n\n1 2"
    assert "### Input:\n1 2\n\n### Response:\n" in first.prompt
    assert second.chat_prompt == "Greet."
    assert "### Input" not in second.prompt


def test_prompt_completion_of_messages_is_a_chat_whose_prompt_is_context() -> None:
    (example,) = parse_rows(rows({"prompt": [USER, ASSISTANT, USER], "completion": [ASSISTANT]}), source())
    assert isinstance(example, Chat)
    assert example.context == 3


def test_messages_in_a_csv_cell_are_json() -> None:
    (example,) = parse_rows(
        rows({"messages": '[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]'}),
        source(),
    )
    assert isinstance(example, Chat)
    assert [turn["content"] for turn in example.turns] == ["q", "a"]


@pytest.mark.parametrize("indent", [None, 1])
def test_messages_in_a_csv_cell_may_be_indented(indent: int | None) -> None:
    cells = [json.dumps([turn], indent=indent) for turn in (USER, ASSISTANT)]
    (example,) = parse_rows(rows(dict(zip(("prompt", "completion"), cells, strict=True))), source())
    assert example == Chat(turns=(USER, ASSISTANT), context=1, where="file:///data/rows.jsonl line 1")


@pytest.mark.parametrize("answer", ['[{"name": "Ann", "role": "editor"}]', "[{}]", "[1, 2]", "[{"])
def test_an_answer_that_is_a_json_list_is_text(answer: str) -> None:
    (example,) = parse_rows(rows({"prompt": "List them.", "completion": answer}), source())
    assert isinstance(example, Pair)
    assert example.completion == answer


def test_empty_cells_of_parquet_structs_are_dropped() -> None:
    (example,) = parse_rows(rows({"messages": [{**USER, "name": None}, ASSISTANT]}), source())
    assert isinstance(example, Chat)
    assert "name" not in example.turns[0]


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"ask": "a", "reply": "b"}, ["line 1", "[ask, reply]", "prompt and completion", "columns"]),
        (
            {"messages": [USER, {"role": "martian", "content": "x"}]},
            ["messages[1].role", '"martian"', "assistant, tool"],
        ),
        ({"messages": [USER]}, ["no assistant turn", "roles: [user]"]),
        ({"messages": [ASSISTANT]}, ["begins with an assistant turn"]),
        ({"messages": []}, ["must be a list of messages", "[]"]),
        ({"messages": "hello"}, ["must be a list of messages", '"hello"']),
        ({"messages": [USER, {"role": "assistant"}]}, ["messages[1] has no 'content'", "[role]"]),
        (
            {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{}]}]},
            ["messages[1] has no 'content', found keys [role, tool_calls]", "calls of tools are not learnt"],
        ),
        ({"messages": [{"from": "human", "value": "x"}]}, ["has no 'role'", "ShareGPT"]),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, ["content is empty (assistant)"]),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, ["content must be text, found 3"]),
        ({"messages": ["hello"]}, ["messages[0] must be an object"]),
        ({"text": "   "}, ["column 'text' is empty"]),
        ({"text": None}, ["column 'text' must be text, found null"]),
        ({"prompt": "a", "completion": ""}, ["column 'completion' is empty"]),
        ({"prompt": "a", "completion": [ASSISTANT]}, ["must both be text or both be lists"]),
        ({"prompt": [USER], "completion": [USER]}, ["'completion' has no assistant turn"]),
        ({"instruction": "a", "input": 5, "output": "b"}, ["column 'input' must be text, found 5"]),
    ],
)
def test_bad_rows_name_line_value_and_remedy(values: dict[str, Any], parts: list[str]) -> None:
    text = refusal(values)
    assert "rows.jsonl line 1" in text
    for part in parts:
        assert part in text


def test_a_file_that_mixes_formats_names_the_row_that_differs() -> None:
    text = refusal({"text": "a"}, {"text": "b"}, {"prompt": "a", "completion": "b"})
    assert "line 3: column 'text' is missing, found [prompt, completion]" in text
    assert "as on line 1; one file holds one format" in text


def test_a_given_format_names_what_it_expects() -> None:
    text = refusal({"text": "a"}, format=DataFormat.PROMPT_COMPLETION)
    assert (
        "column 'prompt' is missing, found [text]. Format PromptCompletion expects [prompt, completion]"
        in text
    )


def test_a_mapping_to_a_column_that_is_not_there_is_bad_data() -> None:
    text = refusal({"q": "a", "answer": "b"}, columns={"prompt": "question"})
    assert "maps 'prompt' to 'question', but the columns are [q, answer]" in text


def test_a_mapping_from_a_name_that_no_format_has_is_bad_config() -> None:
    with pytest.raises(BadConfig, match="'ask' is no column of the format"):
        parse_rows(rows({"q": "a"}), source(columns={"ask": "q"}))

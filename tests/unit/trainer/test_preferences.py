"""Preferences and prompts: what is read, and how a wrong row is refused."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_trainer.data.files import Row
from finetune_trainer.data.formats import parse_for
from finetune_trainer.data.shapes import Chat, Pair, Preference, Prompt
from finetune_trainer.failures import BadConfig, BadData
from finetune_trainer.runfile import Objective, Source

USER = {"role": "user", "content": "hello"}
GOOD = {"role": "assistant", "content": "hi, how can I help?"}
BAD = {"role": "assistant", "content": "what?"}
WHERE = "file:///data/rows.jsonl line 1"


def parse(objective: Objective, *values: dict[str, Any], **parts: Any) -> list[Any]:
    rows = [Row(value, "file:///data/rows.jsonl", number) for number, value in enumerate(values, start=1)]
    return list(parse_for(objective, rows, Source(uri="file:///data/rows.jsonl", **parts)))


def preference(*values: dict[str, Any], **parts: Any) -> Preference:
    (row,) = parse(Objective.DPO, *values, **parts)
    assert isinstance(row, Preference)
    return row


def test_text_becomes_two_pairs_with_one_prompt() -> None:
    row = preference({"prompt": "q", "chosen": "a", "rejected": "b", "score": 3})
    assert row.chosen == Pair("q", "a", chat_prompt="q", where=WHERE)
    assert row.rejected == Pair("q", "b", chat_prompt="q", where=WHERE)


@pytest.mark.parametrize(
    "values",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": "hello", "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": GOOD["content"], "rejected": BAD["content"]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "hello", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {
            "chosen": '[{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi, how can I help?"}]',
            "rejected": '[{"role": "user", "content": "hello"}, {"role": "assistant", "content": "what?"}]',
        },
    ],
    ids=["prompt", "text prompt", "text answers", "implicit prompt", "copy of the prompt", "csv"],
)
def test_messages_are_read_with_and_without_a_prompt_of_their_own(values: dict[str, Any]) -> None:
    row = preference(values)
    assert row.chosen == Chat(turns=(USER, GOOD), context=1, where=WHERE)
    assert row.rejected == Chat(turns=(USER, BAD), context=1, where=WHERE)


def test_what_two_conversations_share_is_their_prompt() -> None:
    row = preference({"chosen": [USER, BAD, USER, GOOD], "rejected": [USER, BAD, USER, BAD]})
    assert isinstance(row.chosen, Chat)
    assert row.chosen.context == 3


def test_columns_are_mapped() -> None:
    columns = {"prompt": "q", "chosen": "better", "rejected": "worse"}
    row = preference({"q": "q", "better": "a", "worse": "b"}, columns=columns)
    assert row.rejected == Pair("q", "b", chat_prompt="q", where=WHERE)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            {"prompt": "q", "chosen": "a"},
            ["fit no format", "Preference has chosen and rejected", "{chosen: better"],
        ),
        ({"messages": [USER, GOOD]}, ["columns [messages] fit no format", "Preference"]),
        ({"chosen": "a", "rejected": "b"}, ["'prompt' is missing", "needs the prompt that it answers"]),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, ["are the same", "remove the row"]),
        ({"prompt": "q", "chosen": [GOOD], "rejected": "b"}, ["both be text or both be lists"]),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, ["'chosen' is empty"]),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, ["'chosen' must be text, found 3"]),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, ["'prompt' is empty"]),
        ({"chosen": [GOOD], "rejected": [BAD]}, ["begins with the assistant's turn", "'prompt'"]),
        ({"chosen": [USER], "rejected": [USER, BAD]}, ["'chosen' ends with a turn of user"]),
        (
            {"chosen": [USER, GOOD], "rejected": [{**USER, "content": "other"}, BAD]},
            ["begin differently", "same prompt"],
        ),
        ({"prompt": "q", "chosen": [{"role": "bot", "content": "a"}], "rejected": [BAD]}, ["role", "bot"]),
    ],
)
def test_a_wrong_preference_names_line_value_and_remedy(values: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises(BadData) as caught:
        preference(values)
    assert str(caught.value).startswith(WHERE)
    for part in expected:
        assert part in str(caught.value)


def test_a_later_row_without_the_column_is_named() -> None:
    with pytest.raises(BadData, match=r"line 2: column 'rejected' is missing.*as on line 1"):
        parse(Objective.DPO, {"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "chosen": "a"})


def test_prompts_keep_their_other_columns_for_reward_functions() -> None:
    rows = parse(Objective.RLOO, {"prompt": "q", "answer": 4}, {"prompt": [USER]})
    assert rows == [
        Prompt("q", WHERE, {"answer": 4}),
        Prompt((USER,), "file:///data/rows.jsonl line 2", {}),
    ]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"text": "a"}, ["columns [text] fit no format", "PromptOnly has prompt", "{prompt: question}"]),
        ({"prompt": ""}, ["'prompt' is empty"]),
        ({"prompt": [USER, GOOD]}, ["ends with the assistant's turn, which the model is to write"]),
        ({"prompt": None}, ["'prompt' must be text"]),
    ],
)
def test_a_wrong_prompt_names_line_value_and_remedy(values: dict[str, Any], expected: list[str]) -> None:
    with pytest.raises(BadData) as caught:
        parse(Objective.GRPO, values)
    for part in (WHERE, *expected):
        assert part in str(caught.value)


def test_a_mapping_of_columns_that_the_objective_does_not_read_is_refused() -> None:
    with pytest.raises(BadConfig, match=r"'completion' is no column of the format; use \[prompt\]"):
        parse(Objective.RLOO, {"prompt": "q", "a": "b"}, columns={"completion": "a"})

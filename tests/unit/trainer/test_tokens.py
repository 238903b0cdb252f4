"""Tokens and labels: only answers are learnt, each with its end token, and nothing is dropped silently."""

from __future__ import annotations

import json
from typing import Any

import pytest

from finetune_trainer.data import tokens
from finetune_trainer.data.shapes import Chat, Pair
from finetune_trainer.failures import BadConfig, BadData
from finetune_trainer.runfile import ApplyChatTemplate
from tests import tiny

WHERE = "file:///rows.jsonl line 3"
AUTO = ApplyChatTemplate.AUTO
NO_MARKS = tiny.CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")
# Rewrites earlier answers, as templates of reasoning models do.
FORGETFUL = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% if message['role'] == 'assistant' %}"
    "{% generation %}{% if loop.last %}(thought) {% endif %}{{ message['content'] }}{% endgeneration %}<|im_end|>\n"
    "{% else %}{{ message['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


TWO_TURNS = Chat(
    (turn("user", "one?"), turn("assistant", "One."), turn("user", "two?"), turn("assistant", "Two!")),
    0,
    WHERE,
)


def learnt(row: tokens.TokenRow, tokenizer: Any) -> str:
    assert len(row.input_ids) == len(row.labels)
    assert all(
        label in (tokens.IGNORED, token) for token, label in zip(row.input_ids, row.labels, strict=True)
    )
    return str(tokenizer.decode([label for label in row.labels if label != tokens.IGNORED]))


@pytest.mark.parametrize("template", [tiny.CHAT_TEMPLATE, NO_MARKS])
def test_every_answer_is_learnt_with_its_end_token_and_nothing_else(template: str) -> None:
    tokenizer = tiny.build_tokenizer(chat_template=template)
    row = tokens.encode_example(TWO_TURNS, tokenizer, choice=AUTO)
    assert learnt(row, tokenizer) == "One.<|im_end|>Two!<|im_end|>"


def test_the_tokens_are_those_of_the_whole_conversation() -> None:
    tokenizer = tiny.build_tokenizer()
    row = tokens.encode_example(TWO_TURNS, tokenizer, choice=AUTO)
    assert row.input_ids == tokenizer.apply_chat_template(list(TWO_TURNS.turns), return_dict=False)


def test_answers_of_the_prompt_are_context() -> None:
    tokenizer = tiny.build_tokenizer()
    chat = Chat(TWO_TURNS.turns, 3, WHERE)
    assert learnt(tokens.encode_example(chat, tokenizer, choice=AUTO), tokenizer) == "Two!<|im_end|>"


def test_a_template_that_rewrites_turns_is_read_by_its_marks() -> None:
    tokenizer = tiny.build_tokenizer(chat_template=FORGETFUL)
    row = tokens.encode_example(TWO_TURNS, tokenizer, choice=AUTO)
    assert learnt(row, tokenizer) == "One.<|im_end|>(thought) Two!<|im_end|>"
    context = tokens.encode_example(Chat(TWO_TURNS.turns, 3, WHERE), tokenizer, choice=AUTO)
    assert learnt(context, tokenizer).endswith("Two!<|im_end|>")
    assert "One." not in learnt(context, tokenizer)


def test_a_template_that_rewrites_turns_without_marks_is_refused() -> None:
    template = FORGETFUL.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    with pytest.raises(BadConfig, match=r"model.chatTemplate.*generation.*ChatML"):
        tokens.encode_example(TWO_TURNS, tiny.build_tokenizer(chat_template=template), choice=AUTO)


def test_a_template_without_end_mark_gets_the_end_token() -> None:
    tokenizer = tiny.build_tokenizer(
        chat_template="{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    row = tokens.encode_example(TWO_TURNS, tokenizer, choice=AUTO)
    assert learnt(row, tokenizer) == "One.Two!<|im_end|>"


@pytest.mark.parametrize(
    ("template", "error", "text"),
    [
        ("{% for m in %}", BadConfig, "not a valid Jinja template, line 1"),
        (
            "{{ raise_exception('roles must alternate') }}",
            BadData,
            "line 3: the model's chat template refuses",
        ),
        ("{{ messages[0]['content'] + 1 }}", BadData, "line 3: .* fails on these messages .TypeError"),
        ("{% for _ in range(999999) %}{% endfor %}", BadData, "OverflowError: Range too big"),
    ],
)
def test_template_errors_are_the_users(template: str, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        tokens.encode_example(TWO_TURNS, tiny.build_tokenizer(chat_template=template), choice=AUTO)


def test_messages_without_template_name_the_remedy() -> None:
    with pytest.raises(BadConfig, match=r'set model.chatTemplate to "ChatML"'):
        tokens.encode_example(TWO_TURNS, tiny.build_tokenizer(chat_template=None), choice=AUTO)


def test_chatml_by_name_works_for_a_tokenizer_without_template() -> None:
    tokenizer = tiny.build_tokenizer(chat_template=None)
    tokens.set_chat_template(tokenizer, "ChatML")
    row = tokens.encode_example(TWO_TURNS, tokenizer, choice=AUTO)
    assert learnt(row, tokenizer) == "One.<|im_end|>Two!<|im_end|>"
    assert tokenizer.decode(row.input_ids).startswith(
        "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n"
    )


PAIR = Pair(prompt="Q: one? A:", completion=" One.", chat_prompt="one?", where=WHERE)


@pytest.mark.parametrize(
    ("choice", "template", "text"),
    [
        (
            AUTO,
            tiny.CHAT_TEMPLATE,
            "<|im_start|>user\none?<|im_end|>\n<|im_start|>assistant\n One.<|im_end|>\n",
        ),
        (AUTO, None, "Q: one? A: One.<|im_end|>"),
        (ApplyChatTemplate.NEVER, tiny.CHAT_TEMPLATE, "Q: one? A: One.<|im_end|>"),
    ],
)
def test_pairs_become_turns_only_when_asked_and_possible(
    choice: ApplyChatTemplate, template: str | None, text: str
) -> None:
    tokenizer = tiny.build_tokenizer(chat_template=template)
    row = tokens.encode_example(PAIR, tokenizer, choice=choice)
    assert tokenizer.decode(row.input_ids) == text
    assert learnt(row, tokenizer) == " One.<|im_end|>"


def test_always_without_template_is_bad_config() -> None:
    with pytest.raises(BadConfig, match=r"dataset\.applyChatTemplate is Always"):
        tokens.encode_example(PAIR, tiny.build_tokenizer(chat_template=None), choice=ApplyChatTemplate.ALWAYS)


def test_text_is_learnt_whole_and_ends() -> None:
    tokenizer = tiny.build_tokenizer()
    text = Pair(prompt="", completion="a story", chat_prompt=None, where=WHERE)
    assert learnt(tokens.encode_example(text, tokenizer, choice=AUTO), tokenizer) == "a story<|im_end|>"


def test_rows_are_cut_to_max_length() -> None:
    tokenizer = tiny.build_tokenizer()
    (row,) = tokens.encode_examples([TWO_TURNS], tokenizer, max_length=30, choice=AUTO)
    assert len(row.input_ids) == len(row.labels) == 30


def test_a_template_that_leaves_out_the_answers_is_told_and_no_other_length_asked_for() -> None:
    tokenizer = tiny.build_tokenizer(
        chat_template="{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    )
    with pytest.raises(BadData, match=r"1 of 1 rows .*model\.chatTemplate") as caught:
        tokens.encode_examples([TWO_TURNS], tokenizer, max_length=64, choice=AUTO)
    assert WHERE in str(caught.value)
    assert "maxLength" not in str(caught.value)


def test_rows_with_nothing_left_to_learn_are_bad_data_with_the_length_that_would_do() -> None:
    tokenizer = tiny.build_tokenizer()
    with pytest.raises(BadData) as caught:
        tokens.encode_examples([PAIR, TWO_TURNS], tokenizer, max_length=8, choice=ApplyChatTemplate.AUTO)
    text = str(caught.value)
    assert "2 of 2 rows have no learnt token within hyperparameters.maxLength 8" in text
    assert WHERE in text
    whole = [tokens.encode_example(example, tokenizer, choice=AUTO) for example in (PAIR, TWO_TURNS)]
    longest = max(next(i for i, label in enumerate(row.labels) if label != tokens.IGNORED) for row in whole)
    assert f"up to {longest} tokens" in text
    assert len(tokens.encode_examples([PAIR, TWO_TURNS], tokenizer, max_length=longest + 1, choice=AUTO)) == 2


def test_the_model_learns_what_inference_will_ask_of_it() -> None:
    """The tokens before the first learnt one are exactly the prompt that a server would send."""
    tokenizer = tiny.build_tokenizer()
    for row in tiny.chat_rows():
        turns = tuple(row["messages"])
        encoded = tokens.encode_example(Chat(turns, 0, WHERE), tokenizer, choice=AUTO)
        prompt = tokenizer.apply_chat_template([turns[0]], add_generation_prompt=True, return_dict=False)
        first = next(i for i, label in enumerate(encoded.labels) if label != tokens.IGNORED)
        assert encoded.input_ids[:first] == prompt, json.dumps(row)

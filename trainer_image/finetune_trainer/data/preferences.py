"""Rows of the formats Preference and PromptOnly."""

from __future__ import annotations

from typing import Any

from finetune_trainer.data.cells import Turn, maybe_messages, read_text, read_turns
from finetune_trainer.data.files import Row
from finetune_trainer.data.shapes import Chat, Pair, Preference, Prompt
from finetune_trainer.failures import BadData


def parse_preference(row: Row, columns: dict[str, str]) -> Preference:
    chosen, rejected = (maybe_messages(row.values[columns[name]]) for name in ("chosen", "rejected"))
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise BadData(
            f"{row.where}: {columns['chosen']!r} and {columns['rejected']!r} "
            "must both be text or both be lists of messages"
        )
    if chosen == rejected:
        raise BadData(
            f"{row.where}: {columns['chosen']!r} and {columns['rejected']!r} are the same, so neither is preferred; "
            "remove the row"
        )
    prompt = maybe_messages(row.values.get(columns["prompt"]))
    if isinstance(chosen, list):
        return _preferred_turns(row, columns, prompt)
    if prompt is None:
        raise BadData(
            f"{row.where}: column {columns['prompt']!r} is missing: text in {columns['chosen']!r} and "
            f"{columns['rejected']!r} needs the prompt that it answers"
        )
    answers = [read_text(row, columns[name]) for name in ("chosen", "rejected")]
    if isinstance(prompt, list):
        before = read_turns(row, columns["prompt"], prompt)
        return Preference(
            *(_answered(before, ({"role": "assistant", "content": text},), row) for text in answers)
        )
    text = read_text(row, columns["prompt"])
    return Preference(*(Pair(text, answer, chat_prompt=text, where=row.where) for answer in answers))


def _preferred_turns(row: Row, columns: dict[str, str], prompt: Any) -> Preference:
    """Lists of messages: answers to the prompt, or two whole conversations whose shared beginning is the prompt."""
    better, worse = (
        read_turns(row, columns[name], row.values[columns[name]]) for name in ("chosen", "rejected")
    )
    for name, turns in (("chosen", better), ("rejected", worse)):
        if turns[-1]["role"] != "assistant":
            raise BadData(
                f"{row.where}: {columns[name]!r} ends with a turn of {turns[-1]['role']}; "
                "an answer ends with the assistant's"
            )
    if better[0]["role"] == "assistant":
        if prompt is None:
            raise BadData(
                f"{row.where}: {columns['chosen']!r} begins with the assistant's turn, and there is no column "
                f"{columns['prompt']!r}; add it, or let both begin with the prompt's messages"
            )
        before = (
            read_turns(row, columns["prompt"], prompt)
            if isinstance(prompt, list)
            else ({"role": "user", "content": read_text(row, columns["prompt"])},)
        )
        return Preference(_answered(before, better, row), _answered(before, worse, row))
    shared = _count_shared(better, worse)
    if shared == 0:
        raise BadData(
            f"{row.where}: the conversations in {columns['chosen']!r} and {columns['rejected']!r} begin differently; "
            "both must begin with the same prompt"
        )
    return Preference(*(_answered(turns[:shared], turns[shared:], row) for turns in (better, worse)))


def _count_shared(better: tuple[Turn, ...], worse: tuple[Turn, ...]) -> int:
    """Number of leading turns that are the same; the answers that differ begin with an assistant's turn."""
    count = 0
    for one, other in zip(better[:-1], worse[:-1], strict=False):
        if one != other:
            break
        count += 1
    return count


def _answered(before: tuple[Turn, ...], answer: tuple[Turn, ...], row: Row) -> Chat:
    return Chat(turns=(*before, *answer), context=len(before), where=row.where)


def parse_prompt(row: Row, column: str) -> Prompt:
    value = maybe_messages(row.values[column])
    others = {name: cell for name, cell in row.values.items() if name != column}
    if not isinstance(value, list):
        return Prompt(read_text(row, column), row.where, others)
    turns = read_turns(row, column, value)
    if turns[-1]["role"] == "assistant":
        raise BadData(
            f"{row.where}: column {column!r} ends with the assistant's turn, which the model is to write; "
            "remove that turn, or keep it in a column of its own"
        )
    return Prompt(turns, row.where, others)

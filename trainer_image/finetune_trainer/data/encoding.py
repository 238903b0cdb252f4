"""Preferences and prompts to tokens: the same text, template and end marks as for demonstrations (`data.tokens`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune_trainer.data import tokens
from finetune_trainer.data.cells import Turn
from finetune_trainer.data.shapes import Chat, Example, Pair, Preference, Prompt, as_turns
from finetune_trainer.data.tokens import IGNORED, TokenRow
from finetune_trainer.failures import BadData
from finetune_trainer.runfile import ApplyChatTemplate


@dataclass(frozen=True)
class PreferenceRow:
    chosen: TokenRow
    rejected: TokenRow


@dataclass(frozen=True)
class PromptRow:
    input_ids: list[int]
    prompt: Prompt


def encode_preferences(
    preferences: Sequence[Preference], tokenizer: Any, *, max_length: int, choice: ApplyChatTemplate
) -> list[PreferenceRow]:
    """Returns both answers of each row, each of at most `max_length` tokens.

    Raises BadData when the cut leaves an answer without a token, or leaves both answers the same.
    """
    sides = [
        [
            _end_with_answer(row)
            for row in tokens.encode_examples(examples, tokenizer, max_length=max_length, choice=choice)
        ]
        for examples in ([one.chosen for one in preferences], [one.rejected for one in preferences])
    ]
    rows = [PreferenceRow(*both) for both in zip(*sides, strict=True)]
    same = [row for row in rows if row.chosen.input_ids == row.rejected.input_ids]
    if same:
        raise BadData(
            f"{len(same)} of {len(rows)} rows have the same tokens in chosen and rejected within "
            f"hyperparameters.maxLength {max_length}: {_few([row.chosen.where for row in same])}; "
            "raise maxLength, or remove these rows"
        )
    return rows


def _end_with_answer(row: TokenRow) -> TokenRow:
    """Cuts what the template writes behind the last answer: nothing there is learnt; rewards are read at the end."""
    learnt = [index for index, label in enumerate(row.labels) if label != IGNORED]
    end = learnt[-1] + 1 if learnt else len(row.labels)
    return TokenRow(row.input_ids[:end], row.labels[:end], row.where)


def encode_prompts(
    prompts: Sequence[Prompt], tokenizer: Any, *, longest: int, choice: ApplyChatTemplate
) -> list[PromptRow]:
    """Returns the tokens up to where the answer begins. Raises BadData for prompts of more than `longest` tokens."""
    rows = [PromptRow(_encode_prompt(prompt, tokenizer, choice=choice), prompt) for prompt in prompts]
    long = [row for row in rows if len(row.input_ids) > longest]
    if long:
        most = max(len(row.input_ids) for row in long)
        raise BadData(
            f"{len(long)} of {len(rows)} prompts have more than {longest} tokens (up to {most}), which is what "
            "hyperparameters.maxLength leaves beside generation.maxCompletionLength: "
            f"{_few([row.prompt.where for row in long])}; raise maxLength, or shorten or remove these rows"
        )
    return rows


def _encode_prompt(prompt: Prompt, tokenizer: Any, *, choice: ApplyChatTemplate) -> list[int]:
    turns = as_turns(prompt, has_template=tokenizer.chat_template is not None, choice=choice)
    if turns is not None:
        text = tokens.render(turns, tokenizer, prompt=True, where=prompt.where)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = list(tokenizer(prompt.given)["input_ids"])
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def answer(prompt: Prompt, completion: str, *, turns: tuple[Turn, ...] | None) -> Example:
    """Returns prompt and completion as a demonstration: what a reward model reads. `turns` as from `as_turns`."""
    if turns is None:
        return Pair(str(prompt.given), completion, chat_prompt=None, where=prompt.where)
    assistant = {"role": "assistant", "content": completion}
    return Chat(turns=(*turns, assistant), context=len(turns), where=prompt.where)


def encode_scored(
    example: Example, tokenizer: Any, *, max_length: int, choice: ApplyChatTemplate
) -> list[int]:
    """Returns the tokens that a reward model scores, as it saw them in its own training."""
    row = tokens.encode_example(example, tokenizer, choice=choice)
    return _end_with_answer(row).input_ids[:max_length]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")

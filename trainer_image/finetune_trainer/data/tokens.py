"""Examples to token rows: input_ids, and labels that are -100 wherever nothing is learnt.

Learnt are the completion of a pair and the assistant's turns of a chat, each with the token that ends it: a model that
never sees its end token in the labels never learns to stop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from finetune_trainer.data.cells import Turn
from finetune_trainer.data.shapes import NO_TEMPLATE, Chat, Example, Pair, as_chat
from finetune_trainer.failures import BadConfig, BadData
from finetune_trainer.runfile import ApplyChatTemplate

IGNORED = -100

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}{{ END }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class TokenRow:
    input_ids: list[int]
    labels: list[int]  # the same length; IGNORED or the token
    where: str


def set_chat_template(tokenizer: Any, template: str | None) -> None:
    """Gives the tokenizer the template of model.chatTemplate; ChatML uses the end token that the vocabulary has."""
    if template == "ChatML":
        if "<|im_end|>" in tokenizer.get_vocab():
            tokenizer.eos_token = "<|im_end|>"  # noqa: S105  generation stops here, and the artifact says so
        template = CHATML.replace("END", "eos_token")
    if template is not None:
        tokenizer.chat_template = template


def pair_turns(pair: Pair) -> Chat:
    turns = ({"role": "user", "content": pair.chat_prompt}, {"role": "assistant", "content": pair.completion})
    return Chat(turns=turns, context=1, where=pair.where)


def encode_examples(
    examples: Sequence[Example], tokenizer: Any, *, max_length: int, choice: ApplyChatTemplate
) -> list[TokenRow]:
    """Returns one row of at most `max_length` tokens for each example.

    Raises BadData when rows have nothing left to learn after the cut: dropping them silently would train on other data
    than the user gave. Raises BadConfig when the chat template does not say which tokens are the assistant's.
    """
    rows = [encode_example(example, tokenizer, choice=choice) for example in examples]
    cut = [TokenRow(row.input_ids[:max_length], row.labels[:max_length], row.where) for row in rows]
    empty = [row for row in cut if _teaches_nothing(row)]
    if empty:
        mute = [row for row in rows if _teaches_nothing(row)]
        if mute:
            raise BadData(
                f"{len(mute)} of {len(rows)} rows have no token to learn, however long a row may be: {_few(mute)}. "
                "The model's chat template writes nothing of the assistant's messages there; correct "
                "model.chatTemplate or the messages"
            )
        lost = {row.where for row in empty}
        longest = max(_first_learnt(row) for row in rows if row.where in lost)
        raise BadData(
            f"{len(empty)} of {len(rows)} rows have no learnt token within hyperparameters.maxLength {max_length}: "
            f"{_few(empty)}. "
            f"Their prompts have up to {longest} tokens; raise maxLength above that, or shorten or remove these rows"
        )
    return cut


def _teaches_nothing(row: TokenRow) -> bool:
    # The first token is never predicted, so a label there teaches nothing.
    return all(label == IGNORED for label in row.labels[1:])


def _few(rows: Sequence[TokenRow]) -> str:
    return ", ".join(row.where for row in rows[:3]) + (", ..." if len(rows) > 3 else "")


def _first_learnt(row: TokenRow) -> int:
    return next((index for index, label in enumerate(row.labels) if label != IGNORED), len(row.labels))


def encode_example(example: Example, tokenizer: Any, *, choice: ApplyChatTemplate) -> TokenRow:
    """Returns the whole row, not cut."""
    if isinstance(example, Pair):
        if not as_chat(example, choice=choice, has_template=tokenizer.chat_template is not None):
            return _encode_pair(example, tokenizer)
        example = pair_turns(example)
    if tokenizer.chat_template is None:
        raise BadConfig(NO_TEMPLATE.format(cause=f"{example.where} holds messages"))
    return _encode_chat(example, tokenizer)


def _encode_pair(pair: Pair, tokenizer: Any) -> TokenRow:
    # Two calls, as at inference, where the prompt is tokenized without knowledge of what follows.
    completion = tokenizer(pair.completion, add_special_tokens=not pair.prompt)["input_ids"]
    prompt = tokenizer(pair.prompt)["input_ids"] if pair.prompt else []
    if prompt and prompt[-1] == tokenizer.eos_token_id:
        prompt = prompt[:-1]  # some tokenizers end every text with EOS; the prompt is not the end
    if not completion or completion[-1] != tokenizer.eos_token_id:
        completion = [*completion, tokenizer.eos_token_id]
    return TokenRow([*prompt, *completion], [IGNORED] * len(prompt) + completion, pair.where)


def render(turns: Sequence[Turn], tokenizer: Any, *, prompt: bool = False, where: str) -> str:
    """Returns the text of turns; with `prompt`, up to where the assistant begins to write.

    Raises BadConfig for a template that does not compile, BadData when the template refuses these turns.
    """
    try:
        return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=prompt))
    except jinja2.TemplateSyntaxError as error:
        raise BadConfig(
            f"model.chatTemplate: not a valid Jinja template, line {error.lineno}: {error.message}"
        ) from error
    except jinja2.TemplateError as error:
        raise BadData(f"{where}: the model's chat template refuses these messages: {error}") from error
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:  # as its expressions raise them
        raise BadData(
            f"{where}: the model's chat template fails on these messages ({type(error).__name__}: {error}); "
            "correct model.chatTemplate or the messages"
        ) from error


def _encode_chat(chat: Chat, tokenizer: Any) -> TokenRow:
    text = render(chat.turns, tokenizer, where=chat.where)
    learnt = [
        index
        for index, turn in enumerate(chat.turns)
        if turn["role"] == "assistant" and index >= chat.context
    ]
    spans = _find_spans(chat, learnt, text, tokenizer)
    if spans is None:
        return _encode_by_marks(chat, tokenizer)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    labels = [
        token if any(start < span_end and end > span_start for span_start, span_end in spans) else IGNORED
        for token, (start, end) in zip(ids, offsets, strict=True)
    ]
    return _end_turn(
        TokenRow(ids, labels, chat.where),
        ends_with_answer=learnt[-1] == len(chat.turns) - 1,
        tokenizer=tokenizer,
    )


def _find_spans(chat: Chat, learnt: list[int], text: str, tokenizer: Any) -> list[tuple[int, int]] | None:
    """Returns the characters of each learnt turn, its end mark included.

    None when the template does not write a longer conversation as a continuation of a shorter one (some drop the
    reasoning of earlier turns), so that the places cannot be found by comparison.
    """
    spans = []
    for index in learnt:
        before = render(chat.turns[:index], tokenizer, prompt=True, where=chat.where)
        through = (
            text
            if index == len(chat.turns) - 1
            else render(chat.turns[: index + 1], tokenizer, where=chat.where)
        )
        if not (through.startswith(before) and text.startswith(through)):
            return None
        # The line break after the end mark belongs to the template; generation has stopped before it.
        spans.append((len(before), max(len(through.rstrip()), len(before))))
    return spans


def _encode_by_marks(chat: Chat, tokenizer: Any) -> TokenRow:
    """Uses the template's {% generation %} blocks, for templates that rewrite earlier turns."""
    template = tokenizer.get_chat_template()
    if "generation %}" not in template and "generation -%}" not in template:
        raise BadConfig(
            f"model.chatTemplate: this template writes earlier turns differently when turns follow "
            f"({chat.where}), so the assistant's tokens cannot be found; use a template with "
            "{% generation %} blocks around the assistant's text, "
            'for example "ChatML"'
        )
    encoded = tokenizer.apply_chat_template(
        list(chat.turns), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = list(encoded["input_ids"]), list(encoded["assistant_masks"])
    # A block that ends before the end mark leaves it out; the model has to learn it too.
    special = set(tokenizer.all_special_ids)
    for index in range(1, len(ids)):
        if mask[index - 1] and not mask[index] and ids[index] in special and ids[index - 1] not in special:
            mask[index] = 1
    skipped = sum(turn["role"] == "assistant" for turn in chat.turns[: chat.context])
    labels, block = [], 0
    for index, (token, marked) in enumerate(zip(ids, mask, strict=True)):
        block += bool(marked and (index == 0 or not mask[index - 1]))
        labels.append(token if marked and block > skipped else IGNORED)
    return _end_turn(
        TokenRow(ids, labels, chat.where),
        ends_with_answer=chat.turns[-1]["role"] == "assistant",
        tokenizer=tokenizer,
    )


def _end_turn(row: TokenRow, *, ends_with_answer: bool, tokenizer: Any) -> TokenRow:
    """Appends EOS where the template writes no end mark after the last answer."""
    last = max((index for index, label in enumerate(row.labels) if label != IGNORED), default=-1)
    if not ends_with_answer or last < 0 or row.input_ids[last] in set(tokenizer.all_special_ids):
        return row
    end = tokenizer.eos_token_id
    return TokenRow([*row.input_ids[: last + 1], end], [*row.labels[: last + 1], end], row.where)

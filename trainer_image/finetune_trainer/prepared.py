"""From checked rows to the data sets that a trainer reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import datasets
import trl

from finetune_trainer.data import encoding, tokens
from finetune_trainer.methods import choices, models, trainers
from finetune_trainer.preflight import Checked
from finetune_trainer.progress import say
from finetune_trainer.runfile import RunFile


@dataclass(frozen=True)
class Encoded:
    """The rows as tokens, cut to `max_length`, and the tokenizer that made them."""

    tokenizer: Any
    max_length: int
    train: trainers.Rows
    held_out: trainers.Rows


def encode(run: RunFile, checked: Checked) -> Encoded:
    tokenizer = models.load_tokenizer(checked.tokenizer, uri=run.model.uri)
    tokens.set_chat_template(tokenizer, run.model.chat_template)
    max_length = choices.choose_max_length(
        run.hyperparameters.max_length, model_limit=checked.config.get("max_position_embeddings")
    )
    choices.explain("maxLength", max_length)
    train_rows, held_out = (
        _encode_rows(run, examples, tokenizer, max_length.value)
        for examples in (checked.train, checked.held_out)
    )
    _describe_rows(answers(train_rows), max_length.value)
    return Encoded(tokenizer, max_length.value, train_rows, held_out)


def _encode_rows(run: RunFile, examples: Any, tokenizer: Any, max_length: int) -> trainers.Rows:
    choice = run.dataset.apply_chat_template
    if run.objective.samples:
        longest = max_length - run.sampling.max_completion_length
        return encoding.encode_prompts(examples, tokenizer, longest=longest, choice=choice)
    encode = encoding.encode_preferences if run.objective.prefers else tokens.encode_examples
    return encode(examples, tokenizer, max_length=max_length, choice=choice)


def answers(rows: trainers.Rows) -> list[tokens.TokenRow]:
    """The rows as what is read: both answers of a preference, and prompts, of which nothing is learnt."""
    found: list[tokens.TokenRow] = []
    for row in rows:
        match row:
            case encoding.PreferenceRow():
                found += [row.chosen, row.rejected]
            case encoding.PromptRow():
                found.append(
                    tokens.TokenRow(row.input_ids, [tokens.IGNORED] * len(row.input_ids), row.prompt.where)
                )
            case _:
                found.append(row)
    return found


def _describe_rows(rows: list[tokens.TokenRow], max_length: int) -> None:
    longest = max(len(row.input_ids) for row in rows)
    full = sum(len(row.input_ids) == max_length for row in rows)
    learnt = sum(label != tokens.IGNORED for row in rows for label in row.labels)
    total = sum(len(row.input_ids) for row in rows)
    cut = f"; {full} rows reach maxLength and may be cut" if full else ""
    say(f"tokens: {total} in {len(rows)} rows, {learnt} of them learnt; longest row {longest}{cut}")


def build_train_set(run: RunFile, encoded: Encoded) -> datasets.Dataset:
    train_set = trainers.to_dataset(encoded.train)
    if run.hyperparameters.packing:
        train_set = trl.pack_dataset(train_set, encoded.max_length, "bfd")
        say(f"packing: {len(encoded.train)} rows in {len(train_set)} sequences")
    return train_set


def build_eval_set(encoded: Encoded) -> datasets.Dataset | None:
    return trainers.to_dataset(encoded.held_out, first=len(encoded.train)) if encoded.held_out else None

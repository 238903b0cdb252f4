"""Greedy answers and the loss of expected answers, in batches; the same code for base and tuned model."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finetune_trainer.data import tokens


@dataclass(frozen=True)
class Answers:
    texts: list[str]
    tokens_per_second: float  # generated tokens


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    on_answers: Callable[[int], None] = lambda count: None,
) -> Answers:
    """Answers every prompt greedily. Prompts of similar length go together, so that little is padded.

    `on_answers` is called after each batch with the number of its answers.
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    texts = [""] * len(prompts)
    ends = end_tokens(model, tokenizer)
    started, produced = time.monotonic(), 0
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = max(len(prompts[index]) for index in batch)
        ids = torch.full((len(batch), width), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(batch):  # on the left, so that every answer begins in the same column
            ids[row, width - len(prompts[index]) :] = torch.tensor(prompts[index])
            mask[row, width - len(prompts[index]) :] = 1
        with torch.inference_mode():
            output = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=_greedy(tokenizer, ends, max_new_tokens),
            )
        for row, index in enumerate(batch):
            answer = _until_end(output[row, width:].tolist(), ends)
            produced += len(answer) + 1
            texts[index] = tokenizer.decode(answer, skip_special_tokens=True)
        on_answers(len(batch))
    return Answers(texts, produced / max(time.monotonic() - started, 1e-9))


def _greedy(tokenizer: Any, ends: list[int], max_new_tokens: int) -> Any:
    from transformers import GenerationConfig

    # A fresh configuration: the model's own may sample or punish repetition.
    return GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Returns every token that ends an answer: the tokenizer's and those of the model's generation settings."""
    known = getattr(model.generation_config, "eos_token_id", None)
    known = known if isinstance(known, list) else [] if known is None else [known]
    return sorted({tokenizer.eos_token_id, *known})


def _until_end(ids: list[int], ends: list[int]) -> list[int]:
    return next((ids[:index] for index, token in enumerate(ids) if token in ends), ids)


def measure_loss(model: Any, rows: Sequence[tokens.TokenRow], *, pad: int, batch_size: int) -> float:
    """Returns the mean negative log-likelihood per learnt token over all rows, in nats."""
    total, count = 0.0, 0
    order = sorted(rows, key=lambda row: len(row.input_ids))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = max(len(row.input_ids) for row in batch)
        ids = torch.tensor([row.input_ids + [pad] * (width - len(row.input_ids)) for row in batch]).to(
            model.device
        )
        labels = torch.tensor(
            [row.labels + [tokens.IGNORED] * (width - len(row.labels)) for row in batch]
        ).to(model.device)
        mask = torch.tensor([[1] * len(row.input_ids) + [0] * (width - len(row.input_ids)) for row in batch])
        with torch.inference_mode():
            logits = model(input_ids=ids, attention_mask=mask.to(model.device), use_cache=False).logits
            learnt = labels[:, 1:] != tokens.IGNORED
            losses = torch.nn.functional.cross_entropy(
                logits[:, :-1][learnt].float(), labels[:, 1:][learnt], reduction="sum"
            )
        total += float(losses)
        count += int(learnt.sum())
    return total / max(count, 1)

"""TRL's trainer for each objective, on rows that are tokens already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
import transformers
import trl

from finetune_trainer.data.encoding import PreferenceRow, PromptRow
from finetune_trainer.data.tokens import IGNORED, TokenRow
from finetune_trainer.methods import sampling
from finetune_trainer.rewards import functions
from finetune_trainer.rewards.models import Scorer
from finetune_trainer.runfile import Objective

Row = TokenRow | PreferenceRow | PromptRow
Rows = Sequence[Row]


@dataclass(frozen=True)
class Plan:
    """Everything that a trainer is made of."""

    objective: Objective
    model: Any  # with `peft_config` None: as it is trained
    peft_config: Any | None
    arguments: Any
    tokenizer: Any
    train_set: datasets.Dataset
    eval_set: datasets.Dataset | None
    callbacks: list[transformers.TrainerCallback]


@dataclass(frozen=True)
class Judges:
    """What RLOO and GRPO ask what an answer is worth: the reward model first, then the functions."""

    model: Scorer | None
    functions: Sequence[functions.Function]
    book: sampling.Book

    def rewards(self) -> list[Any]:
        """As TRL calls them, each under a name of its own, because metrics are told apart by it."""
        found: list[Any] = []
        names: set[str] = set()
        if self.model is not None:
            names.add(self.model.name)
            found.append(sampling.reward_of_model(self.model, self.book, name=self.model.name))
        for number, function in enumerate(self.functions):
            name = function.name if function.name not in names else f"{function.name}-{number}"
            names.add(name)
            found.append(sampling.reward_of_function(function, self.book, name=name))
        return found


def build(plan: Plan, judges: Judges | None) -> Any:
    """Returns the trainer; RLOO and GRPO need judges."""
    exact = _trained_weights(plan.model) if plan.peft_config is None else {}
    common: dict[str, Any] = {
        "model": plan.model,
        "args": plan.arguments,
        "train_dataset": plan.train_set,
        "eval_dataset": plan.eval_set,
        "processing_class": plan.tokenizer,
        "peft_config": plan.peft_config,
        "callbacks": plan.callbacks,
    }
    match plan.objective:
        case Objective.SFT:
            trainer = trl.SFTTrainer(**common)
        case Objective.DPO:
            collator = sampling.PreferenceCollator(plan.tokenizer.pad_token_id)
            trainer = sampling.DPOTrainer(**common, data_collator=collator)
        case Objective.REWARD_MODEL:
            trainer = trl.RewardTrainer(**common)
        case _:
            if judges is None:
                raise ValueError(f"{plan.objective} needs judges")
            kind = sampling.RLOOTrainer if plan.objective is Objective.RLOO else sampling.GRPOTrainer
            trainer = kind(**common, reward_funcs=judges.rewards())
            trainer.book = judges.book
    trainer.remove_callback(transformers.PrinterCallback)
    _use_float32_adapter(trainer.model, exact)
    return trainer


def _trained_weights(model: Any) -> dict[str, torch.Tensor]:
    """An adapter over a quantized base, before TRL casts it."""
    if not getattr(model, "is_loaded_in_4bit", False):
        return {}
    return {name: one.detach().clone() for name, one in model.named_parameters() if one.requires_grad}


def _use_float32_adapter(model: Any, exact: dict[str, torch.Tensor]) -> None:
    """Undoes TRL's cast of a quantized base's adapter to bfloat16, in which small updates vanish."""
    if getattr(model, "is_loaded_in_4bit", False):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.data = exact[name] if name in exact else parameter.data.float()


def to_dataset(rows: Rows, *, first: int = 0) -> datasets.Dataset:
    """The rows as the objective's trainer reads them; prompts are numbers, `first` is that of the first one."""
    columns: dict[str, list[Any]] = {}
    for number, row in enumerate(rows, start=first):
        for name, value in _cells(row, number).items():
            columns.setdefault(name, []).append(value)
    return datasets.Dataset.from_dict(columns)


def _cells(row: Row, number: int) -> dict[str, Any]:
    match row:
        case TokenRow():
            return {"input_ids": row.input_ids, "labels": row.labels}
        case PreferenceRow():
            return {
                "chosen_ids": row.chosen.input_ids,
                "rejected_ids": row.rejected.input_ids,
                "chosen_mask": [int(label != IGNORED) for label in row.chosen.labels],
                "rejected_mask": [int(label != IGNORED) for label in row.rejected.labels],
            }
        case PromptRow():
            return {"prompt": str(number)}

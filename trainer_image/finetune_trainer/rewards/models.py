"""Reward models that are loaded: answers in, scores out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import peft
import torch

from finetune_trainer.data import encoding
from finetune_trainer.data.shapes import Example
from finetune_trainer.failures import BadConfig
from finetune_trainer.methods import models
from finetune_trainer.rewards.sources import RewardModel
from finetune_trainer.runfile import ApplyChatTemplate, Precision


@dataclass(frozen=True)
class Scorer:
    """Scores answers as they were scored while the reward model was trained: same template, same end, no dropout."""

    name: str
    model: Any
    tokenizer: Any
    max_length: int
    batch_size: int

    def __call__(self, examples: list[Example], *, choice: ApplyChatTemplate) -> list[float]:
        rows = [
            encoding.encode_scored(example, self.tokenizer, max_length=self.max_length, choice=choice)
            for example in examples
        ]
        scores: list[float] = []
        for start in range(0, len(rows), self.batch_size):
            scores += self._score(rows[start : start + self.batch_size])
        return scores

    def _score(self, rows: list[list[int]]) -> list[float]:
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            ids[index, : len(row)] = torch.tensor(row)
            mask[index, : len(row)] = 1
        device = self.model.device
        with torch.no_grad():
            logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        return [float(score) for score in logits[:, 0].float()]


def load(
    source: RewardModel, *, device: models.Device, precision: Precision, max_length: int, batch_size: int
) -> Scorer:
    """Loads the reward model for scoring. Raises BadConfig or ModelNotFound."""
    uri = source.artifact.uri
    path = source.base or source.artifact.path
    model = models.load_classifier(
        path, uri=uri, device=device, precision=precision, quantization=source.quantization
    )
    if source.base is not None:
        try:
            model = peft.PeftModel.from_pretrained(model, str(source.artifact.path))
        except (RuntimeError, ValueError) as error:  # torch reports shapes that do not fit as RuntimeError
            raise BadConfig(
                f"reward: the adapter in {uri} does not fit its base model: {str(error).splitlines()[0]}"
            ) from error
    tokenizer = models.load_tokenizer(
        source.artifact.path if source.artifact.has_tokenizer else path, uri=uri
    )
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    limit = getattr(model.config, "max_position_embeddings", None) or max_length
    return Scorer(source.name, model.eval(), tokenizer, min(max_length, limit), batch_size)

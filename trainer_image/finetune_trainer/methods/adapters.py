"""LoRA's configuration, checked against the modules that the model really has."""

from __future__ import annotations

from typing import Any

import peft
import torch

from finetune_trainer.methods import targets
from finetune_trainer.runfile import Lora


def build_lora(spec: Lora, model: Any) -> peft.LoraConfig:
    """Returns PEFT's configuration. Raises BadConfig, which lists the model's modules, for a name that matches none."""
    if spec.target_modules == [targets.ALL_LINEAR]:
        target: str | list[str] = targets.ALL_LINEAR
    else:
        targets.check(spec.target_modules, list_targets(model))
        target = list(spec.target_modules)
    return peft.LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=target,
        task_type="CAUSAL_LM",
    )


def list_targets(model: Any) -> list[str]:
    """Returns the names of the linear layers that can get an adapter; quantized ones are linear layers too."""
    head = model.get_output_embeddings()
    linear = (torch.nn.Linear, *_convolution_types())
    return [
        name for name, module in model.named_modules() if isinstance(module, linear) and module is not head
    ]


def _convolution_types() -> tuple[type, ...]:
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

    return (Conv1D,)

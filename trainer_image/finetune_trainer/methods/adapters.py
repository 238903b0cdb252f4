"""LoRA's configuration, checked against the modules that the model really has."""

from __future__ import annotations

from typing import Any

import peft
import torch

from finetune_trainer.failures import BadConfig
from finetune_trainer.runfile import Lora

HEAD = "lm_head"


def build_lora(spec: Lora, model: Any) -> peft.LoraConfig:
    """Returns PEFT's configuration. Raises BadConfig, which lists the model's modules, for a name that matches none."""
    available = list_targets(model)
    if spec.target_modules == ["all-linear"]:
        target: str | list[str] = "all-linear"
    else:
        for name in spec.target_modules:
            _check_target(name, available)
        target = list(spec.target_modules)
    return peft.LoraConfig(
        r=spec.r,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=target,
        task_type="CAUSAL_LM",
    )


def _check_target(name: str, available: list[str]) -> None:
    choices = ", ".join(sorted({module.rsplit(".", 1)[-1] for module in available}))
    if name.rsplit(".", 1)[-1] == HEAD:
        raise BadConfig(
            f"method.lora.targetModules: {HEAD} cannot get an adapter; choose from {choices}, or all-linear"
        )
    if not any(module == name or module.endswith(f".{name}") for module in available):
        raise BadConfig(
            f"method.lora.targetModules: the model has no module {name!r}; choose from {choices}, or all-linear"
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

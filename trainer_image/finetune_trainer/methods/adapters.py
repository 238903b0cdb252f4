"""LoRA adapters: a new one, checked against the modules that the model really has, or one that an earlier job made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file

from finetune_trainer import upstreams
from finetune_trainer.failures import BadConfig
from finetune_trainer.methods import targets
from finetune_trainer.methods.models import CLASSIFIER_HEADS, Head
from finetune_trainer.runfile import Lora

TASKS = {
    Head.LANGUAGE: "CAUSAL_LM",
    Head.REWARD: "SEQ_CLS",
}  # with SEQ_CLS the head is trained and saved as a whole
NAME = "default"


def build_lora(spec: Lora, model: Any, *, head: Head = Head.LANGUAGE) -> peft.LoraConfig:
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
        task_type=TASKS[head],
    )


def continue_adapter(model: Any, artifact: upstreams.Artifact, spec: Lora, *, head: Head) -> Any:
    """Puts an earlier job's adapter on the model, to be trained further. Raises BadConfig when it does not fit.

    A reward model begins with the layers of an adapter that was trained for language, and with a new head.
    """
    config = peft.PeftConfig.from_pretrained(str(artifact.path))
    config.lora_dropout = spec.dropout
    config.task_type = TASKS[head]
    config.inference_mode = False
    config.modules_to_save = None  # those of TASKS are added by PEFT
    adapted = peft.get_peft_model(model, config, adapter_name=NAME)
    _load_weights(adapted, artifact.path / upstreams.ADAPTER_WEIGHTS, uri=artifact.uri)
    return adapted


def _load_weights(adapted: Any, file: Path, *, uri: str) -> None:
    expected = peft.get_peft_model_state_dict(adapted, adapter_name=NAME, save_embedding_layers=False)
    found = load_file(file)
    unknown = sorted(set(found) - set(expected))
    missing = sorted(name for name in set(expected) - set(found) if not _is_of_head(name))
    shapes = sorted(name for name in found if name in expected and found[name].shape != expected[name].shape)
    for names, what in (
        (unknown, "that the base model has no place for"),
        (missing, "missing"),
        (shapes, "of another shape"),
    ):
        if names:
            raise BadConfig(
                f"model.adapter: the adapter in {uri} does not fit its base model: weights {what}, such as {names[0]}"
            )
    peft.set_peft_model_state_dict(adapted, {**expected, **found}, adapter_name=NAME)


def _is_of_head(name: str) -> bool:
    return any(part in CLASSIFIER_HEADS for part in name.split("."))


def list_targets(model: Any) -> list[str]:
    """Returns the names of the linear layers that can get an adapter; quantized ones are linear layers too."""
    head = model.get_output_embeddings()
    linear = (torch.nn.Linear, *_convolution_types())
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, linear) and module is not head and name not in CLASSIFIER_HEADS
    ]


def _convolution_types() -> tuple[type, ...]:
    from transformers.pytorch_utils import Conv1D  # GPT-2's linear layer

    return (Conv1D,)

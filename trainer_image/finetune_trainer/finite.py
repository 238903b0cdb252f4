"""Nothing that is not finite is exported or saved: an update that broke the weights is in no logged loss yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors
import torch

from finetune_trainer import pulse
from finetune_trainer.failures import ModelNotFound, NotFinite
from finetune_trainer.model_files import COPY_AGAIN

ADVICE = "halve hyperparameters.learningRate. Nothing was exported"


def check_weights(model: Any, *, step: int) -> None:
    """Raises NotFinite, which names the first trained weight that is NaN or infinite."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(torch.isfinite(parameter).all()):
            raise NotFinite(f"weight {name} is not finite after step {step}; {ADVICE}")


def check_optimizer(optimizer: Any, *, step: int) -> None:
    """Raises NotFinite when a running average of gradients overflowed: the weights would follow or freeze."""
    for state in optimizer.state.values():
        for name, value in state.items():
            if torch.is_tensor(value) and value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise NotFinite(f"the optimizer's {name} is not finite after step {step}; {ADVICE}")


def check_base(folder: Path, *, uri: str) -> None:
    """Raises ModelNotFound when the base model's files hold what is not finite: no learning rate helps there.

    Reads every weight, so it is only asked why training broke.
    """
    for file in sorted(folder.glob("*.safetensors")):
        with safetensors.safe_open(file, framework="pt") as weights:
            for name in pulse.each(weights.keys()):
                values = weights.get_tensor(name)
                if values.is_floating_point() and not bool(torch.isfinite(values.float()).all()):
                    raise ModelNotFound(
                        f"model.uri: weight {name} of {uri} is NaN or infinite in {file.name}, so nothing that is "
                        f"trained on it is finite; {COPY_AGAIN}"
                    )

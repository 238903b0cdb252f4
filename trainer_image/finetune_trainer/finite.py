"""Nothing that is not finite is exported or saved: an update that broke the weights is in no logged loss yet."""

from __future__ import annotations

from typing import Any

import torch

from finetune_trainer.failures import NotFinite

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

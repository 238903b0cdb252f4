"""The state of all random numbers that training draws: Python's, NumPy's, PyTorch's, and those of each GPU."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Randomness:
    python: Any
    numpy: Any
    torch: torch.Tensor
    gpus: list[torch.Tensor]


def capture() -> Randomness:
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return Randomness(random.getstate(), np.random.get_state(), torch.get_rng_state(), gpus)


def restore(state: Randomness) -> None:
    random.setstate(state.python)
    np.random.set_state(state.numpy)
    torch.set_rng_state(state.torch)
    if state.gpus:
        torch.cuda.set_rng_state_all(state.gpus)

"""How long a fine-tuning takes and what it leaves on disk, roughly."""

from __future__ import annotations

import math
from dataclasses import dataclass

from finetune_fit.accelerators import Accelerator
from finetune_fit.architectures import Architecture
from finetune_fit.memory import Method, Workload, trained_parameters

UTILIZATION = 0.35  # share of the peak that training with transformers reaches on one GPU, by experience
MOST_AUTOMATIC_ROWS = 8  # rows; a safe start for a small GPU, and more gains nothing on a CPU
FEW = 2**20  # files beside the weights: tokenizer, manifest, model card


@dataclass(frozen=True)
class Disk:
    """Bytes."""

    artifact: int
    checkpoint: int
    """One checkpoint: trained weights, optimizer and the random states."""
    checkpoints: int
    """All that are kept, and one that is being written."""
    model: int
    """Base model, as it is downloaded."""


def disk(model: Architecture, work: Workload, *, keep: int) -> Disk:
    """What training writes, and the base model's files, which have two bytes per parameter."""
    trained = trained_parameters(model, work)
    # The trainer saves float32 adapters, and Full weights in the type that they are trained in.
    weights = 4 * trained
    state = {"AdamW": 8, "AdamW8bit": 2, "SGD": 0}.get(work.optimizer, 8) * trained
    checkpoint = weights + state + FEW
    return Disk(
        artifact=weights + FEW,
        checkpoint=checkpoint,
        checkpoints=(keep + 1) * checkpoint,
        model=2 * model.parameters + FEW,
    )


def micro_batch_size(global_batch: int, *, most: int = MOST_AUTOMATIC_ROWS) -> int:
    """Rows per forward pass where the spec names none: the largest divisor of the global batch up to `most`."""
    return next(rows for rows in range(min(global_batch, most), 0, -1) if global_batch % rows == 0)


def steps(*, rows: int, global_batch: int, epochs: float) -> int:
    """Optimizer steps of `rows` rows."""
    return max(1, math.ceil(epochs * math.ceil(rows / global_batch)))


def seconds(
    model: Architecture, work: Workload, accelerator: Accelerator, *, steps: int, global_batch: int
) -> float:
    """Seconds of training if every row is full, by the operations that it takes: 2 per parameter and token forward, 2
    to pass gradients back, 2 more where the weights have gradients themselves (Kaplan et al., arXiv 2001.08361, 2.1).
    """
    per_token = (6 if work.method is Method.FULL else 4) * model.parameters
    if work.checkpointing:
        per_token += 2 * model.parameters
    tokens = steps * global_batch * work.length * work.asks.sequences
    speed = accelerator.tflops * 1e12 * UTILIZATION
    if not work.bfloat16:
        speed /= 8  # float32 without tensor cores
    return tokens * per_token / speed

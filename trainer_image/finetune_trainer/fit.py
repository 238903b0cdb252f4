"""Whether training fits into the GPU, before any weight is loaded.

A refusal costs a second; a GPU that runs out of memory, minutes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from finetune_fit import architectures, memory, runs, verdicts
from finetune_fit.architectures import Architecture
from finetune_fit.memory import Method, Workload
from finetune_trainer import model_files
from finetune_trainer.failures import BadConfig
from finetune_trainer.methods import choices
from finetune_trainer.preflight import Checked
from finetune_trainer.progress import say
from finetune_trainer.runfile import Lora, Precision, RunFile

if TYPE_CHECKING:
    from finetune_trainer.methods.models import Device  # seconds of imports


def check(
    run: RunFile, checked: Checked, device: Device, *, precision: Precision, length: int
) -> runs.Disk | None:
    """Prints what training needs. `length`: tokens of the longest row. Returns what it will write, if that is known.

    Raises BadConfig where what is counted (weights, gradients, optimizer states) is more than the GPU has free. What is
    only estimated is a warning: the batch can still be made smaller when the memory runs out.
    """
    model = read(checked.model, uri=run.model.uri)
    if model is None:
        return None
    on_gpu = device.memory_bytes is not None
    work = describe(run, checked.lora or run.lora, precision=precision, length=length, on_gpu=on_gpu)
    keep = 0 if run.checkpoint is None else run.checkpoint.keep
    disk = runs.disk(model, work, keep=keep)
    if not on_gpu:
        needed = memory.estimate(model, work)
        say(f"memory: needs about {verdicts.gib(needed.total)} on the CPU")
        return disk
    verdict = verdicts.judge(model, work, capacity=device.memory_bytes, device=device.description)
    if verdict.fit is verdicts.Fit.TOO_LARGE:
        raise BadConfig(f"method.type: {run.method.type} of this model does not fit: {verdict.message}")
    title = "warning: memory" if verdict.fit is verdicts.Fit.TIGHT else "memory"
    say(f"{title}: {verdict.message}")
    return disk


def read(folder: Path, *, uri: str) -> Architecture | None:
    """What the model in a checked folder is made of; None for a family that cannot be counted."""
    config, tensors = model_files.read_config(folder, uri=uri), model_files.read_tensors(folder, uri=uri)
    try:
        return architectures.read(config, tensors)
    except architectures.UnknownArchitectureError as error:
        say(f"memory: not estimated ({error})")
        return None


def describe(run: RunFile, lora: Lora, *, precision: Precision, length: int, on_gpu: bool) -> Workload:
    """The run file in the terms of the estimate."""
    hyper, quantization = run.hyperparameters, run.method.quantization
    limit = hyper.max_length if hyper.packing else min(hyper.max_length, length)
    return Workload(
        method=Method(str(run.method.type)),
        rows=choices.choose_micro_batch(hyper, override=run.overrides.micro_batch_size).value,
        length=limit,
        bfloat16=precision is Precision.BFLOAT16,
        checkpointing=hyper.gradient_checkpointing,
        optimizer=str(hyper.optimizer),
        rank=lora.r,
        targets=tuple(lora.target_modules),
        dropout=lora.dropout > 0,
        double_quantization=quantization is None or quantization.double_quant,
        objective=str(run.objective),
        on_gpu=on_gpu,
    )

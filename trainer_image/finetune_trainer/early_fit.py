"""What can be known of a run before it has its GPU: configuration, model and data, and whether the memory suffices."""

from __future__ import annotations

from pathlib import Path

from finetune_fit import accelerators, architectures, memory, verdicts
from finetune_fit.accelerators import Accelerator
from finetune_fit.architectures import Architecture
from finetune_trainer import fit, folders, model_files, preflight, storage
from finetune_trainer.failures import BadConfig
from finetune_trainer.methods import choices
from finetune_trainer.progress import say
from finetune_trainer.runfile import RunFile


def check(run: RunFile, work: Path) -> str:
    """What was found, for people. A model that is not on a disk here is known by its config.json only: its weights and
    the data are checked when training begins.

    Raises BadConfig where what is counted (weights, gradients, optimizer states) is more than the GPU has; BadData and
    ModelNotFound as preflight does.
    """
    model = _read_model(run, work)
    if model is None:
        return "the memory was not estimated, as the family of the model is not known"
    accelerator = accelerators.find(run.accelerator)
    if accelerator is None:
        needed = memory.estimate(model, _describe(run, None))
        unknown = (
            f"the memory of GPU {run.accelerator} is not known here" if run.accelerator else "no GPU is named"
        )
        return (
            f"training needs about {verdicts.gib(needed.total)}; {unknown}, so that was compared with nothing"
        )
    verdict = verdicts.judge(
        model,
        _describe(run, accelerator),
        capacity=accelerator.memory_bytes,
        device=accelerator.name,
    )
    if verdict.fit is verdicts.Fit.TOO_LARGE:
        raise BadConfig(
            f"method.type: {run.method.type} of this model does not fit: {verdict.message}. No GPU was asked for; "
            "resources.fitCheck: Skip would ask all the same"
        )
    if verdict.fit is verdicts.Fit.TIGHT:
        return f"{verdicts.MAY_RUN_OUT}: {verdict.message}"
    return verdict.message


def _read_model(run: RunFile, work: Path) -> Architecture | None:
    if storage.local_path(run.model.uri) is not None:
        checked = preflight.check(run, work)
        return fit.read(checked.model, uri=run.model.uri)
    folder = folders.fetch_config(run.model.uri, work / "model", revision=run.model.revision)
    try:
        return architectures.read(model_files.read_config(folder, uri=run.model.uri), None)
    except architectures.UnknownArchitectureError as error:
        say(f"memory: not estimated ({error})")
        return None


def _describe(run: RunFile, accelerator: Accelerator | None) -> memory.Workload:
    precision = choices.choose_precision(
        run.hyperparameters.precision,
        device="cuda",
        gpu_has_bfloat16=accelerator.bfloat16 if accelerator else True,
    )
    return fit.describe(
        run, run.lora, precision=precision.value, length=run.hyperparameters.max_length, on_gpu=True
    )

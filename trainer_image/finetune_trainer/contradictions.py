"""What cannot hold together in a run file although every field alone is right: field, value and remedy of each."""

from __future__ import annotations

import posixpath
from typing import TYPE_CHECKING

from finetune_trainer.runparts import FORMATS_OF, DataFormat, MethodType, Objective

if TYPE_CHECKING:
    from finetune_trainer.runfile import Method, RunFile


def find_contradictions(run: RunFile) -> list[str]:
    """Returns what cannot hold together although every field alone is right: field, value and remedy of each."""
    problems = [*_check_method(run.method), *_check_objective(run), *_check_formats(run)]
    if run.objective.samples:
        problems += _check_sampling(run)
    hyper = run.hyperparameters
    if hyper.micro_batch_size is not None and hyper.global_batch_size % hyper.micro_batch_size:
        problems.append(
            f"hyperparameters.microBatchSize: {hyper.micro_batch_size} does not divide globalBatchSize "
            f"{hyper.global_batch_size}; use a divisor of it, or leave microBatchSize out"
        )
    if run.early_stopping is not None and run.dataset.split.eval == 0:
        problems.append("earlyStopping needs held-out rows: set dataset.split.eval above 0 (it is 0)")
    if run.model.revision is not None and not run.model.uri.startswith("hf://"):
        problems.append(
            f"model.revision: {run.model.revision!r} has a meaning only for hf:// (model.uri is {run.model.uri})"
        )
    if run.checkpoint is not None and _overlap(run.checkpoint.uri, run.output.uri):
        problems.append(
            f"checkpoint.uri: {run.checkpoint.uri} and output.uri {run.output.uri} lie in one another; "
            "choose folders that are apart, such as output.uri with -checkpoints at its end"
        )
    return problems


def _overlap(one: str, other: str) -> bool:
    first, second = (_plain(uri).rstrip("/") + "/" for uri in (one, other))
    return first.startswith(second) or second.startswith(first)


def _plain(uri: str) -> str:
    """One way to write each folder of a disk; an object store takes //, . and .. for names."""
    scheme, _, path = uri.partition("://")
    # Three slashes: normpath takes two at the beginning for a name of their own.
    return f"{scheme}:{posixpath.normpath('///' + path)}" if scheme in ("file", "pvc") else uri


def _check_method(method: Method) -> list[str]:
    problems = []
    if method.type is MethodType.QLORA and method.quantization is None:
        problems.append(
            "method.quantization is required for QLoRA; set it to {} for nf4 with double quantization"
        )
    if method.type is not MethodType.QLORA and method.quantization is not None:
        problems.append(
            f"method.quantization is only for QLoRA (method.type is {method.type}); use QLoRA or remove it"
        )
    if method.type is MethodType.FULL and method.lora is not None:
        problems.append("method.lora is only for LoRA and QLoRA (method.type is Full); remove it")
    if (
        method.lora is not None
        and "all-linear" in method.lora.target_modules
        and len(method.lora.target_modules) > 1
    ):
        problems.append(
            "method.lora.targetModules: all-linear stands alone; remove the other names or all-linear"
        )
    return problems


def _check_objective(run: RunFile) -> list[str]:
    """Parts that belong to other objectives, and those that are missing."""
    name, hyper, problems = run.objective, run.hyperparameters, []
    if name.samples and (run.reward is None or run.reward.count == 0):
        problems.append(
            f"reward is required for {name}: name a reward model (uri) or at least one of reward.functions"
        )
    for field, present, wanted in (
        ("reward", run.reward, name.samples),
        ("generation", run.generation, name.samples),
        ("preference", run.preference, name is Objective.DPO),
        ("hyperparameters.packing", hyper.packing or None, name is Objective.SFT),
        ("hyperparameters.neftuneAlpha", hyper.neftune_alpha, name is Objective.SFT),
    ):
        if present is not None and not wanted:
            problems.append(f"{field} has no meaning for objective {name}; remove it")
    if run.model.adapter is not None and run.method.type is MethodType.FULL:
        problems.append(
            "method.type: Full trains all weights and cannot go on with model.adapter; use LoRA or QLoRA"
        )
    return problems


def _check_formats(run: RunFile) -> list[str]:
    allowed = FORMATS_OF[run.objective]
    return [
        f"dataset.sources[{number}].format: {source.format} is not for objective {run.objective}; "
        f"use {' or '.join(allowed)}, or Auto"
        for number, source in enumerate(run.dataset.sources)
        if source.format not in (*allowed, DataFormat.AUTO)
    ]


def _check_sampling(run: RunFile) -> list[str]:
    hyper, sampling, reward, problems = run.hyperparameters, run.sampling, run.reward, []
    if hyper.global_batch_size % sampling.num_generations:
        problems.append(
            f"hyperparameters.globalBatchSize: {hyper.global_batch_size} completions cannot be shared out in groups of "
            f"generation.numGenerations {sampling.num_generations}; use a multiple of it"
        )
    if sampling.max_completion_length >= hyper.max_length:
        problems.append(
            f"generation.maxCompletionLength: {sampling.max_completion_length} leaves no room for the prompt within "
            f"hyperparameters.maxLength {hyper.max_length}; lower it or raise maxLength"
        )
    if reward is not None and reward.weights is not None and len(reward.weights) != reward.count:
        problems.append(
            f"reward.weights: {len(reward.weights)} weights for {reward.count} rewards; give one for each: "
            "the reward model first, then the functions in their order"
        )
    return problems

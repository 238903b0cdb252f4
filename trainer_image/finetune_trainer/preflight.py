"""The checks that cost no model: everything that can be known from files and text, before anything slow is imported.

A wrong run file, model folder or data row ends here, in a fraction of a second for local files.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune_trainer import artifacts, folders, model_files, storage, upstreams
from finetune_trainer.data import files, formats, shapes, splits
from finetune_trainer.failures import (
    BadConfig,
    BadData,
)
from finetune_trainer.methods import targets
from finetune_trainer.rewards import functions, sources
from finetune_trainer.runfile import Lora, MethodType, Objective, RunFile, Source


@dataclass(frozen=True)
class Checked:
    """Facts that training may rely on."""

    model: Path  # config.json, tokenizer and safetensors are there
    revision: str | None  # commit of a hub model
    config: dict[str, Any]  # the model's config.json
    train: Sequence[shapes.AnyExample]
    held_out: Sequence[shapes.AnyExample]
    dataset_digest: str
    lora: Lora | None = None  # of the adapter that is trained; None for Full
    adapter: upstreams.Artifact | None = None  # that training goes on with
    reward_model: sources.RewardModel | None = None
    reward_functions: tuple[functions.Source, ...] = ()

    @property
    def tokenizer(self) -> Path:
        """Where the tokenizer is: an adapter brings the one, and the chat template, that it was trained with."""
        return self.adapter.path if self.adapter is not None and self.adapter.has_tokenizer else self.model


def check(run: RunFile, work: Path) -> Checked:
    """Checks model, data and rewards; remote files are brought into `work`.

    Raises BadConfig, BadData or ModelNotFound.
    """
    _check_suffixes(run.dataset.sources)
    scripts = functions.find(run)
    adapter, lora = _check_adapter(run, work)
    revision = run.model.revision or (adapter.base()[1] if adapter is not None else None)
    model, commit = find_model(run.model.uri, revision, work)
    config = _check_model(run, model, lora, continued=adapter is not None)
    paths = [
        find_source(source, work / "data" / str(number)) for number, source in enumerate(run.dataset.sources)
    ]
    examples = [
        example
        for path, source in zip(paths, run.dataset.sources, strict=True)
        for example in formats.parse_for(run.objective, files.read_rows(path, uri=source.uri), source)
    ]
    functions.check_columns(examples, scripts)
    checked = Checked(
        model=model,
        revision=commit,
        config=config,
        train=examples,
        held_out=[],
        dataset_digest=artifacts.hash_dataset(paths),
        lora=lora,
        adapter=adapter,
        reward_functions=scripts,
    )
    own_template = model_files.has_chat_template(checked.tokenizer, uri=run.model.uri)
    check_template(run, examples, has_template=run.model.chat_template is not None or own_template)
    model_files.check_tokenizer(checked.tokenizer, uri=run.model.uri)
    train, held_out = splits.split_rows(
        [_content_of(example) for example in examples],
        fraction=run.dataset.split.eval,
        seed=run.dataset.split.seed,
    )
    _check_prompts(run, [_content_of(examples[index]) for index in train])
    return replace(
        checked,
        train=[examples[index] for index in train],
        held_out=[examples[index] for index in held_out],
        reward_model=sources.find(
            run, work, find_base=lambda uri, at, folder: _find_reward_base(run, checked, uri, at, folder)
        ),
    )


def _check_adapter(run: RunFile, work: Path) -> tuple[upstreams.Artifact | None, Lora | None]:
    """The adapter that training goes on with, if any, and the settings of the one that is trained."""
    found = upstreams.find_adapter(run, work)
    if found is None:
        return None, None if run.method.type is MethodType.FULL else run.lora
    artifact, lora = found
    if artifact.objective == Objective.REWARD_MODEL and run.objective is not Objective.REWARD_MODEL:
        raise BadConfig(
            f"model.adapter: {artifact.uri} is the adapter of a reward model, which scores text and writes none; "
            f"objective {run.objective} needs one that was trained with SFT, DPO, RLOO or GRPO"
        )
    return artifact, lora


def _check_model(run: RunFile, model: Path, lora: Lora | None, *, continued: bool) -> dict[str, Any]:
    config = model_files.read_config(model, uri=run.model.uri)
    model_files.check_quantization(config, run.method.type, uri=run.model.uri)
    tensors = model_files.read_tensors(model, uri=run.model.uri)
    if lora is not None and not continued:
        targets.check_early(lora.target_modules, config, tensors)
    return config


def _find_reward_base(run: RunFile, checked: Checked, uri: str, revision: str | None, folder: Path) -> Path:
    """The model that a reward model's adapter fits; mostly the one that is trained, which is here already."""
    if uri == run.model.uri and revision in (None, checked.revision):
        return checked.model
    if storage.is_hub(uri) and not any(storage.is_hub(one) for one in run.uris()):
        os.environ.pop("HF_HUB_OFFLINE", None)  # set because no URI of the run file names the hub
    return find_model(uri, revision, folder, field="reward: base model")[0]


def _check_prompts(run: RunFile, contents: Sequence[str]) -> None:
    """Raises BadData when there are fewer prompts to train on than one optimizer step answers."""
    if not run.objective.samples:
        return
    wanted = run.hyperparameters.global_batch_size // run.sampling.num_generations
    if len(contents) < wanted:
        raise BadData(
            f"hyperparameters.globalBatchSize {run.hyperparameters.global_batch_size} with "
            f"generation.numGenerations {run.sampling.num_generations} answers {wanted} prompts in each step, and "
            f"there are {len(contents)} to train on; add rows or lower globalBatchSize"
        )


def _check_suffixes(sources: list[Source]) -> None:
    for number, source in enumerate(sources):
        if files.kind_of(source.uri) is None:
            raise BadConfig(
                f"dataset.sources[{number}].uri: {source.uri} has no ending that says what it is; "
                f"use {', '.join(files.SUFFIXES)}, or one of them with .gz"
            )


def _content_of(example: shapes.AnyExample) -> str:
    """What makes two rows the same; of preferences and prompts the prompt alone, so that no held-out one was seen."""
    match example:
        case shapes.Chat():
            return json.dumps(example.turns, sort_keys=True, default=str)
        case shapes.Preference():
            chosen = example.chosen
            if isinstance(chosen, shapes.Pair):
                return chosen.prompt
            return json.dumps(chosen.turns[: chosen.context], sort_keys=True, default=str)
        case shapes.Prompt():
            return json.dumps(example.given, sort_keys=True, default=str)
        case shapes.Pair():
            return f"{example.prompt}\0{example.completion}"


def find_source(source: Source, folder: Path) -> Path:
    """Returns the local path of a data file. Raises BadData when it is not there or holds nothing."""
    path = storage.local_path(source.uri)
    try:
        if path is None:
            path = storage.fetch_file(source.uri, folder)
        elif path.is_dir():
            raise BadData(f"dataset.sources: {source.uri} is a folder; name the file in it")
        with path.open("rb") as file:
            empty = not file.read(1)
    except FileNotFoundError as error:
        raise BadData(
            f"dataset.sources: {source.uri} does not exist{_shown(path)}; check the path"
        ) from error
    except PermissionError as error:
        raise BadData(
            f"dataset.sources: {source.uri} may not be read ({storage.describe_error(error)}); "
            "check the file's permissions or the credentials in dataset.secretRef"
        ) from error
    except Exception as error:
        if not (storage.is_failure(error) or isinstance(error, ValueError)):
            raise
        raise folders.unreadable(f"dataset.sources: {source.uri}", error) from error
    if empty:
        raise BadData(f"dataset.sources: {source.uri} is empty; it needs at least one row")
    return path


def _shown(path: Path | None) -> str:
    return "" if path is None else f" (looked at {path})"


def find_model(
    uri: str, revision: str | None, work: Path, *, field: str = "model.uri"
) -> tuple[Path, str | None]:
    """Returns the folder of the base model and, for a hub model, its commit. Raises ModelNotFound."""
    path, commit = folders.fetch(
        uri, work / "model", field=field, credentials="in model.secretRef", revision=revision
    )
    return (path if commit else model_files.check_model_files(path, uri=uri)), commit


def check_template(run: RunFile, examples: Sequence[shapes.AnyExample], *, has_template: bool) -> None:
    """Raises BadConfig when data or dataset.applyChatTemplate need a template that neither model nor run file has."""
    choice = run.dataset.apply_chat_template
    for example in examples:
        match example:
            case shapes.Chat() | shapes.Preference(chosen=shapes.Chat()):
                if not has_template:
                    raise BadConfig(shapes.NO_TEMPLATE.format(cause=f"{example.where} holds messages"))
            case shapes.Preference(chosen=shapes.Pair() as pair):
                shapes.as_chat(pair, choice=choice, has_template=has_template)
            case shapes.Prompt():
                shapes.as_turns(example, has_template=has_template, choice=choice)
            case shapes.Pair():
                shapes.as_chat(example, choice=choice, has_template=has_template)

"""The checks that cost no model: everything that can be known from files and text, before anything slow is imported.

A wrong run file, model folder or data row ends here, in a fraction of a second for local files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_fit import architectures
from finetune_trainer import artifacts, model_files, storage
from finetune_trainer.data import files, formats, splits
from finetune_trainer.failures import (
    BadConfig,
    BadData,
    ModelNotFound,
    StorageFailed,
    TrainerError,
    is_storage_trouble,
)
from finetune_trainer.methods import targets
from finetune_trainer.runfile import MethodType, RunFile, Source


@dataclass(frozen=True)
class Checked:
    """Facts that training may rely on."""

    model: Path  # config.json, tokenizer and safetensors are there
    revision: str | None  # commit of a hub model
    config: dict[str, Any]  # the model's config.json
    train: list[formats.Example]
    held_out: list[formats.Example]
    dataset_digest: str
    architecture: architectures.Architecture | None = None  # None: of a family that cannot be counted


def check(run: RunFile, work: Path) -> Checked:
    """Checks model and data; remote files are brought into `work`. Raises BadConfig, BadData or ModelNotFound."""
    _check_suffixes(run.dataset.sources)
    model, revision = find_model(run.model.uri, run.model.revision, work)
    config = model_files.read_config(model, uri=run.model.uri)
    tensors = model_files.read_tensors(model, uri=run.model.uri)
    if run.method.type is not MethodType.FULL:
        targets.check_early(run.lora.target_modules, config, tensors)
    paths = [
        find_source(source, work / "data" / str(number)) for number, source in enumerate(run.dataset.sources)
    ]
    examples = [
        example
        for path, source in zip(paths, run.dataset.sources, strict=True)
        for example in formats.parse_rows(files.read_rows(path, uri=source.uri), source)
    ]
    own_template = model_files.has_chat_template(model, uri=run.model.uri)
    check_template(run, examples, has_template=run.model.chat_template is not None or own_template)
    model_files.check_tokenizer(model, uri=run.model.uri)
    train, held_out = splits.split_rows(
        [_content_of(example) for example in examples],
        fraction=run.dataset.split.eval,
        seed=run.dataset.split.seed,
    )
    return Checked(
        model=model,
        revision=revision,
        config=config,
        train=[examples[index] for index in train],
        held_out=[examples[index] for index in held_out],
        dataset_digest=artifacts.hash_dataset(paths),
        architecture=_read_architecture(config, tensors),
    )


def _read_architecture(
    config: dict[str, Any], tensors: model_files.Tensors
) -> architectures.Architecture | None:
    try:
        return architectures.read(config, tensors)
    except architectures.UnknownArchitectureError as error:
        print(f"memory: not estimated ({error})", flush=True)
        return None


def _check_suffixes(sources: list[Source]) -> None:
    for number, source in enumerate(sources):
        if files.kind_of(source.uri) is None:
            raise BadConfig(
                f"dataset.sources[{number}].uri: {source.uri} has no ending that says what it is; "
                f"use {', '.join(files.SUFFIXES)}, or one of them with .gz"
            )


def _content_of(example: formats.Example) -> str:
    if isinstance(example, formats.Chat):
        return json.dumps(example.turns, sort_keys=True, default=str)
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
    except (OSError, ValueError) as error:
        raise _unreadable(f"dataset.sources: {source.uri}", error) from error
    if empty:
        raise BadData(f"dataset.sources: {source.uri} is empty; it needs at least one row")
    return path


def _shown(path: Path | None) -> str:
    return "" if path is None else f" (looked at {path})"


def find_model(uri: str, revision: str | None, work: Path) -> tuple[Path, str | None]:
    """Returns the folder of the base model and, for a hub model, its commit. Raises ModelNotFound."""
    if storage.is_hub(uri):
        from finetune_trainer.methods import hub  # imports huggingface_hub

        return hub.fetch_model(uri, revision)
    path = storage.local_path(uri)
    if path is None:
        path = _fetch_model(uri, work / "model")
    elif not path.is_dir():
        raise ModelNotFound(f"model.uri: {uri} is not a folder (looked at {path}); check the path")
    return model_files.check_model_files(path, uri=uri), None


def _fetch_model(uri: str, folder: Path) -> Path:
    try:
        return storage.fetch_folder(uri, folder)
    except FileNotFoundError as error:
        raise ModelNotFound(f"model.uri: there is nothing at {uri}; check bucket and path") from error
    except PermissionError as error:
        raise ModelNotFound(
            f"model.uri: {uri} may not be read; check the credentials in model.secretRef"
        ) from error
    except (OSError, ValueError) as error:
        raise _unreadable(f"model.uri: {uri}", error) from error


def _unreadable(what: str, error: Exception) -> TrainerError:
    kind = StorageFailed if is_storage_trouble(error) else TrainerError
    return kind(f"{what} cannot be read ({storage.describe_error(error)})")


def check_template(run: RunFile, examples: list[formats.Example], *, has_template: bool) -> None:
    """Raises BadConfig when data or dataset.applyChatTemplate need a template that neither model nor run file has."""
    for example in examples:
        if isinstance(example, formats.Chat):
            if not has_template:
                raise BadConfig(formats.NO_TEMPLATE.format(cause=f"{example.where} holds messages"))
        else:
            formats.as_chat(example, choice=run.dataset.apply_chat_template, has_template=has_template)

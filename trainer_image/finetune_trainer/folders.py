"""Folders that a URI names, brought here: models, and artifacts of earlier jobs."""

from __future__ import annotations

import contextlib
import errno
import tempfile
from collections.abc import Iterator
from pathlib import Path

from finetune_trainer import storage
from finetune_trainer.failures import (
    ModelNotFound,
    StorageFailed,
    TrainerError,
    is_full,
    is_storage_trouble,
)


def fetch(
    uri: str, folder: Path, *, field: str, credentials: str, revision: str | None = None
) -> tuple[Path, str | None]:
    """Returns where the folder is, which is `folder` only where it had to be copied, and the commit of a hub model.

    `field` and `credentials` say in errors what of the run file is meant and where its credentials are.
    Raises ModelNotFound and StorageFailed.
    """
    if storage.is_hub(uri):
        from finetune_trainer.methods import hub  # imports huggingface_hub

        return hub.fetch_model(uri, revision)
    path = storage.local_path(uri)
    if path is not None:
        if not path.is_dir():
            raise ModelNotFound(f"{field}: {uri} is not a folder (looked at {path}); check the path")
        return path, None
    with _explained(uri, field=field, credentials=credentials):
        return storage.fetch_folder(uri, folder), None


def fetch_config(uri: str, folder: Path, *, revision: str | None) -> Path:
    """The folder of a model that is not on a disk here, or `folder` with its config.json and nothing else. Raises
    ModelNotFound and StorageFailed."""
    if storage.is_hub(uri):
        from finetune_trainer.methods import hub  # imports huggingface_hub

        return hub.fetch_config(uri, revision)
    with _explained(uri, field="model.uri", credentials="in model.secretRef"):
        text = storage.open_folder(uri).read("config.json")
    if text is None:
        raise ModelNotFound(f"model.uri: {uri} has no config.json; name the folder of a transformers model")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_bytes(text)
    return folder


@contextlib.contextmanager
def _explained(uri: str, *, field: str, credentials: str) -> Iterator[None]:
    """Turns what an object store answers into the trainer's own failures."""
    try:
        yield
    except FileNotFoundError as error:
        cause = error.__cause__  # so fsspec tells of a host that is away
        if isinstance(cause, OSError) and is_storage_trouble(cause):
            raise unreadable(f"{field}: {uri}", cause) from error
        raise ModelNotFound(f"{field}: there is nothing at {uri}; check bucket and path") from error
    except PermissionError as error:
        raise ModelNotFound(
            f"{field}: {uri} may not be read ({storage.describe_error(error)}); check the credentials {credentials}"
        ) from error
    except Exception as error:
        if not (storage.is_failure(error) or isinstance(error, ValueError)):
            raise
        raise unreadable(f"{field}: {uri}", error) from error


def unreadable(what: str, error: Exception) -> TrainerError:
    """The failure for something that is there and cannot be read; one of the storage is tried again."""
    if is_full(error):
        room = f"{tempfile.gettempdir()} ({storage.describe_error(error)}); {storage.MORE_ROOM}"
        return StorageFailed(f"{what} does not fit into {room}")
    kind = StorageFailed if is_storage_trouble(error) else TrainerError
    return kind(f"{what} cannot be read ({storage.describe_error(error)})")


def is_unwritable(error: Exception) -> bool:
    """Whether a download from the hub failed because its cache, a local folder, does not take it."""
    return is_full(error) or (isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS))


def unwritten(error: Exception) -> str:
    from huggingface_hub import constants  # a slow import

    return (
        f"cannot be written into the hub's cache {constants.HF_HUB_CACHE} "
        f"({storage.describe_error(error)}); set HF_HOME to a folder that can be written and has room"
    )

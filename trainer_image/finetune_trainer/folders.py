"""Folders that a URI names, brought here: models, and artifacts of earlier jobs."""

from __future__ import annotations

from pathlib import Path

from finetune_trainer import storage
from finetune_trainer.failures import ModelNotFound, StorageFailed, TrainerError, is_storage_trouble


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
    try:
        return storage.fetch_folder(uri, folder), None
    except FileNotFoundError as error:
        raise ModelNotFound(f"{field}: there is nothing at {uri}; check bucket and path") from error
    except PermissionError as error:
        raise ModelNotFound(f"{field}: {uri} may not be read; check the credentials {credentials}") from error
    except (OSError, ValueError) as error:
        raise unreadable(f"{field}: {uri}", error) from error


def unreadable(what: str, error: Exception) -> TrainerError:
    """The failure for something that is there and cannot be read; one of the storage is tried again."""
    kind = StorageFailed if is_storage_trouble(error) else TrainerError
    return kind(f"{what} cannot be read ({storage.describe_error(error)})")

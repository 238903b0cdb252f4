"""Base models from the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import errors
from huggingface_hub.utils.tqdm import tqdm

from finetune_trainer import folders, pulse
from finetune_trainer.failures import BadConfig, ModelNotFound, StorageFailed, is_full
from finetune_trainer.model_files import check_model_files
from finetune_trainer.storage import MODEL_FILES


class _Bar(tqdm):
    """The hub's progress bar, which knows of every piece that has come, shown or not."""

    def update(self, n: Any = 1) -> Any:
        if n:  # not of a timer that found nothing new
            pulse.beat()
        return super().update(n)


def fetch_model(uri: str, revision: str | None) -> tuple[Path, str]:
    """Downloads a model into the hub's cache; returns its folder and the commit. Raises ModelNotFound or BadConfig."""
    path = _download(uri, revision, MODEL_FILES)
    return check_model_files(path, uri=uri), path.name


def fetch_config(uri: str, revision: str | None) -> Path:
    """The same with its config.json only."""
    return _download(uri, revision, ["config.json"])


def _download(uri: str, revision: str | None, patterns: Iterable[str]) -> Path:
    name = uri.removeprefix("hf://").strip("/")
    if name.count("/") != 1 or "@" in name:
        raise BadConfig(
            f"model.uri: {uri} must be hf://organization/model; a branch or commit goes into model.revision"
        )
    try:
        path = huggingface_hub.snapshot_download(
            name, revision=revision, allow_patterns=list(patterns), tqdm_class=_Bar
        )
    except errors.GatedRepoError as error:
        raise ModelNotFound(
            f"model.uri: {uri} asks for a licence; accept it on the hub and put HF_TOKEN into model.secretRef"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFound(f"model.revision: {revision!r} does not exist in {uri}") from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFound(
            f"model.uri: {uri} does not exist, or is private and needs HF_TOKEN in model.secretRef"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise StorageFailed(
            f"model.uri: the hub cannot be reached for {uri}, and it is not in the cache; "
            "check the network, or copy the model to a volume and use pvc:// or file://"
        ) from error
    except Exception as error:
        if not folders.is_unwritable(error):
            raise
        kind = StorageFailed if is_full(error) else BadConfig
        raise kind(f"model.uri: {uri} {folders.unwritten(error)}") from error
    return Path(path)

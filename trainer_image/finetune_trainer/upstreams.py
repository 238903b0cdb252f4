"""Artifacts of earlier jobs that a run builds on: found, brought here, and compared with their manifests."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_trainer import artifacts, folders
from finetune_trainer.failures import BadConfig, ModelNotFound
from finetune_trainer.runfile import Lora, RunFile

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
NEEDED = (".json", ".safetensors", ".jinja")  # of the files that a manifest lists


@dataclass(frozen=True)
class Artifact:
    uri: str
    path: Path
    digest: str | None  # None: a folder without manifest, made by something else
    manifest: dict[str, Any]

    @property
    def is_adapter(self) -> bool:
        return (self.path / ADAPTER_CONFIG).is_file()

    @property
    def objective(self) -> str | None:
        value = self.manifest.get("objective")
        return None if value is None else str(value)

    @property
    def has_tokenizer(self) -> bool:
        return (self.path / "tokenizer.json").is_file()

    def base(self) -> tuple[str, str | None]:
        """URI and revision of the model that the adapter fits."""
        base = self.manifest["baseModel"]
        return str(base["uri"]), base.get("revision")


def find(uri: str, folder: Path, *, field: str, digest: str | None = None) -> Artifact:
    """Brings an artifact here and verifies it; `digest` is the one of its manifest that the job was begun with.

    Raises ModelNotFound, which names the field, and StorageFailed.
    """
    path, _ = folders.fetch(uri, folder, field=field, credentials="of the job's Secrets")
    file = path / artifacts.MANIFEST
    if not file.is_file():
        if digest is not None:
            raise ModelNotFound(
                f"{field}: {uri} holds no {artifacts.MANIFEST}; the artifact was removed, train it again"
            )
        return Artifact(uri, path, None, {})
    content = file.read_bytes()
    found = f"sha256:{hashlib.sha256(content).hexdigest()}"
    if digest is not None and digest != found:
        raise ModelNotFound(
            f"{field}: the artifact in {uri} is another one ({found}) than this job was begun with ({digest}); "
            "train the earlier job again, then create this one again"
        )
    try:
        manifest = json.loads(content)
        files = {str(one["path"]): str(one["sha256"]) for one in manifest["files"]}
        manifest["baseModel"]["uri"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelNotFound(
            f"{field}: {artifacts.MANIFEST} in {uri} is not one of ours; name an artifact's folder"
        ) from error
    _verify(path, files, uri=uri, field=field)
    return Artifact(uri, path, found, manifest)


def _verify(path: Path, files: dict[str, str], *, uri: str, field: str) -> None:
    for name, expected in files.items():
        if not name.endswith(NEEDED):
            continue  # the card and the history are not read here, and not brought from remote folders
        if not (path / name).is_file():
            raise ModelNotFound(f"{field}: {name} is missing in {uri}; train that artifact again")
        if artifacts.hash_file(path / name) != expected:
            raise ModelNotFound(
                f"{field}: {name} in {uri} differs from its manifest (SHA-256); train that artifact again"
            )


def find_adapter(run: RunFile, work: Path) -> tuple[Artifact, Lora] | None:
    """Returns the adapter that training goes on with and its settings; None for a run that makes a new one.

    Raises BadConfig when it does not fit what the run file says, ModelNotFound when it is not whole.
    """
    if run.model.adapter is None:
        return None
    field = "model.adapter"
    found = find(run.model.adapter.uri, work / "adapter", field=field, digest=run.model.adapter.digest)
    if not found.is_adapter or not (found.path / ADAPTER_WEIGHTS).is_file() or not found.manifest:
        raise ModelNotFound(
            f"{field}: {found.uri} holds no adapter of ours; name the folder of a LoRA artifact"
        )
    if found.base()[0] != run.model.uri:
        raise BadConfig(
            f"{field}: the adapter in {found.uri} fits {found.base()[0]}, and model.uri is {run.model.uri}; "
            "use the base model that it was trained on"
        )
    return found, _continued(run, found)


def _continued(run: RunFile, found: Artifact) -> Lora:
    try:
        trained = Lora.model_validate(found.manifest["lora"])
    except (KeyError, ValueError) as error:
        raise ModelNotFound(
            f"model.adapter: the manifest in {found.uri} names no LoRA settings; train it again"
        ) from error
    asked = run.method.lora
    if asked is None:
        return trained
    same = (asked.r, asked.alpha, sorted(asked.target_modules)) == (
        trained.r,
        trained.alpha,
        sorted(trained.target_modules),
    )
    if not same:
        raise BadConfig(
            f"method.lora: training goes on with the adapter in {found.uri}, which has r {trained.r}, "
            f"alpha {trained.alpha} and targetModules {trained.target_modules}; leave method.lora out, or give the same"
        )
    return trained.model_copy(update={"dropout": asked.dropout})

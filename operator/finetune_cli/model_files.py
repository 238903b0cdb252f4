"""Where a base model's config.json is, seen from the machine of the user: a folder, the hub's cache, or the hub.

The weights are never read, only the headers of their files where those are there.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HUB = "https://huggingface.co"
HUB_SECONDS = 5
LARGEST_CONFIG = 4_000_000  # bytes
LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors format

Tensors = dict[str, list[int]]


class ModelNotReachableError(Exception):
    """The model's config.json cannot be read from here; the message says what was tried and what to do."""


@dataclass(frozen=True)
class Model:
    """What is known of a model without its weights."""

    config: dict[str, Any]
    tensors: Tensors | None
    """Name and shape of each weight; None where only config.json is there."""
    origin: str
    """Where it was read, for people."""


def find(uri: str | None, revision: str | None, *, folder: Path | None, environ: Mapping[str, str]) -> Model:
    """The model of a spec, or the one in `folder` (or in a file config.json) in its place. Raises
    ModelNotReachableError."""
    if folder is not None:
        return _read(folder)
    if uri is None:
        raise ModelNotReachableError(
            "the base model is another job's artifact, which is not there yet; name a folder of a model of the same "
            "shape with --model"
        )
    if uri.startswith("file://"):
        return _read(Path(uri.removeprefix("file://")))
    if uri.startswith("hf://"):
        return _find_on_hub(uri.removeprefix("hf://").strip("/"), revision, environ)
    scheme = uri.partition("://")[0]
    raise ModelNotReachableError(
        f"{uri} cannot be read from here ({scheme}:// is read in the cluster only); copy its config.json and name the "
        "folder with --model"
    )


def _read(path: Path) -> Model:
    file = path if path.is_file() else path / "config.json"
    try:
        config = _parse(file.read_bytes()[:LARGEST_CONFIG], str(file))
    except OSError as error:
        raise ModelNotReachableError(
            f"{file} cannot be read ({error.strerror}); name the folder of a transformers model with --model"
        ) from error
    weights = sorted(file.parent.glob("*.safetensors"))
    return Model(config, _read_headers(weights) if weights else None, str(file.parent))


def _parse(text: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ModelNotReachableError(f"{where} is no JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelNotReachableError(f"{where} is not a JSON object")
    return value


def _read_headers(files: list[Path]) -> Tensors | None:
    """A safetensors file begins with the length of its header (8 bytes), then the header, which is JSON."""
    tensors: Tensors = {}
    try:
        for file in files:
            with file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(min(length, LARGEST_HEADER)))
            header.pop("__metadata__", None)
            tensors |= {name: [int(size) for size in tensor["shape"]] for name, tensor in header.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return None  # config.json alone says enough for most models; the trainer refuses broken files
    return tensors


# ---------------------------------------------------------------- the Hugging Face Hub


def _find_on_hub(name: str, revision: str | None, environ: Mapping[str, str]) -> Model:
    cached = _find_cached(name, revision, _cache_folder(environ))
    if cached is not None:
        return _read(cached)
    hint = "copy its config.json and name the folder with --model, or download the model once"
    if environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise ModelNotReachableError(f"hf://{name} is not in the cache and HF_HUB_OFFLINE is set; {hint}")
    endpoint = environ.get("HF_ENDPOINT", HUB).rstrip("/")
    address = f"{endpoint}/{name}/resolve/{revision or 'main'}/config.json"
    try:
        return Model(_parse(_download(address, environ.get("HF_TOKEN")), address), None, address)
    except urllib.error.HTTPError as error:
        why = (
            "asks for HF_TOKEN"
            if error.code in (401, 403)
            else "is not there"
            if error.code == 404
            else str(error)
        )
        raise ModelNotReachableError(f"hf://{name} {why} ({address}); {hint}") from error
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise ModelNotReachableError(
            f"hf://{name} is not in the cache and the hub does not answer ({reason}); {hint}"
        ) from error


def _download(address: str, token: str | None) -> bytes:
    if not address.startswith(("https://", "http://")):
        raise ModelNotReachableError(f"HF_ENDPOINT: {address} is no http address")
    request = urllib.request.Request(address, headers={"Authorization": f"Bearer {token}"} if token else {})  # noqa: S310
    with urllib.request.urlopen(request, timeout=HUB_SECONDS) as answer:  # noqa: S310
        content: bytes = answer.read(LARGEST_CONFIG)
    return content


def _cache_folder(environ: Mapping[str, str]) -> Path:
    """Where huggingface_hub keeps what it has downloaded."""
    if "HF_HUB_CACHE" in environ:
        return Path(environ["HF_HUB_CACHE"]).expanduser()
    home = environ.get("HF_HOME") or str(Path(environ.get("XDG_CACHE_HOME", "~/.cache")) / "huggingface")
    return Path(home).expanduser() / "hub"


def _find_cached(name: str, revision: str | None, cache: Path) -> Path | None:
    """The snapshot of a model in the hub's cache: models--<organization>--<name>/snapshots/<commit>."""
    folder = cache / f"models--{name.replace('/', '--')}"
    reference = folder / "refs" / (revision or "main")
    commit = revision or ""
    if reference.is_file():
        commit = reference.read_text(encoding="utf-8").strip()
    snapshot = folder / "snapshots" / commit
    return snapshot if commit and (snapshot / "config.json").is_file() else None

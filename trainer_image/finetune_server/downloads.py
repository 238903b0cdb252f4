"""Adapters into the cache folder: only what the manifest lists, and only when it is what the manifest says."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from finetune_trainer import storage
from finetune_trainer.artifacts import MANIFEST
from finetune_trainer.failures import TrainerError, is_full

SAFE_SUFFIXES = (".safetensors", ".json", ".jsonl", ".jinja", ".md", ".txt", ".model", ".tiktoken")
MAX_BYTES = 16 << 30  # of one adapter; a wrong URI must not fill the disk
_COPY = re.compile(r"[0-9a-f]{64}")  # names of our copies; the cache folder may hold other people's things
_PART = ".part-"
KEPT = 8  # folders of adapters that nobody wants any more: a rollback finds them here


class DownloadFailed(Exception):  # noqa: N818  as the status names it
    """The artifact could not be read."""


class DigestMismatch(Exception):  # noqa: N818  as the status names it
    """The artifact is not the one that was asked for, or a file is not what the manifest says."""


class NotServable(Exception):  # noqa: N818  as the status names it
    """The artifact is whole, but no adapter of safetensors."""


@dataclass(frozen=True)
class Artifact:
    """A verified copy of an artifact."""

    folder: Path
    manifest: dict[str, Any]


def fetch(uri: str, digest: str, cache: Path) -> Artifact:
    """Returns a verified local copy of the artifact with this digest; an old copy is verified again.

    Raises DownloadFailed, DigestMismatch or NotServable.
    """
    try:
        return _fetch(uri, digest, cache)
    except OSError as error:
        remedy = "make room there, or give another --cache-dir"
        reason = storage.describe_error(error)
        raise DownloadFailed(f"the cache folder {cache} cannot be used: {reason}; {remedy}") from error


def _fetch(uri: str, digest: str, cache: Path) -> Artifact:
    target = cache / digest.removeprefix("sha256:")
    if target.is_dir():
        try:
            manifest = _check_copy(target, digest)
        except (DigestMismatch, OSError):
            shutil.rmtree(target)  # damaged: take it anew
        else:
            with contextlib.suppress(OSError):  # a copy that cannot be touched can still be read
                target.touch()
            return Artifact(target, manifest)
    elif target.is_symlink() or target.exists():
        target.unlink()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=_PART) as name:
        part = Path(name) / "artifact"
        part.mkdir()
        try:
            manifest = _download(storage.open_folder(uri), digest, part)
        except DigestMismatch as error:
            raise DigestMismatch(f"{uri}: {error}") from None
        except FileNotFoundError as error:
            raise DownloadFailed(f"{uri}: {error.filename or error} does not exist") from error
        except Exception as error:
            if is_full(error):  # our side: nobody should look for the fault in the store
                raise
            if not (storage.is_failure(error) or isinstance(error, TrainerError | ValueError)):
                raise
            raise DownloadFailed(f"{uri} cannot be read: {storage.describe_error(error)}") from error
        try:
            part.replace(target)
        except OSError:
            if not target.is_dir():  # else: somebody else has just brought the same files
                raise
    return Artifact(target, manifest)


def _download(folder: storage.Folder, digest: str, part: Path) -> dict[str, Any]:
    content = folder.read(MANIFEST)
    if content is None:
        raise DownloadFailed(f"{folder.uri} holds no {MANIFEST}: nothing was committed there")
    files, manifest = _read_manifest(content, digest)
    left = sum(int(file["size"]) for file in manifest["files"])
    for name, sha256 in files.items():
        target = part / name
        target.parent.mkdir(parents=True, exist_ok=True)
        found = hashlib.sha256()
        with target.open("wb") as writer:
            for chunk in folder.chunks(name):
                left -= len(chunk)
                if left < 0:  # before it is written: a file without end must not fill the disk
                    raise DigestMismatch(
                        f"{name} differs from {MANIFEST} (it is longer); publish the artifact again"
                    )
                found.update(chunk)
                writer.write(chunk)
        if found.hexdigest() != sha256:
            raise DigestMismatch(f"{name} differs from {MANIFEST} (SHA-256); publish the artifact again")
    (part / MANIFEST).write_bytes(content)
    return manifest


def _check_copy(folder: Path, digest: str) -> dict[str, Any]:
    files, manifest = _read_manifest((folder / MANIFEST).read_bytes(), digest)
    for name, sha256 in files.items():
        with (folder / name).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise DigestMismatch(f"{name} differs from {MANIFEST}")
    return manifest


def _read_manifest(content: bytes, digest: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Returns the files (name -> SHA-256) and the manifest. Raises DigestMismatch or NotServable."""
    found = f"sha256:{hashlib.sha256(content).hexdigest()}"
    if found != digest:
        raise DigestMismatch(f"{MANIFEST} has digest {found}, but {digest} was asked for")
    try:
        manifest = json.loads(content)
        files = {str(file["path"]): str(file["sha256"]) for file in manifest["files"]}
        size = sum(int(file["size"]) for file in manifest["files"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise NotServable(f"{MANIFEST} is not one of ours ({type(error).__name__})") from error
    if size > MAX_BYTES:
        raise NotServable(f"the artifact has {size} bytes; adapters may have {MAX_BYTES}")
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise NotServable(f"{MANIFEST} lists {name!r}, which is outside the artifact")
        if not name.isprintable():  # no file system takes NUL or half a surrogate pair
            raise NotServable(f"{MANIFEST} lists {name!r}, which is no file's name")
        if path.suffix not in SAFE_SUFFIXES:
            raise NotServable(f"{name} may carry code; adapters are safetensors and plain text")
    if "adapter_config.json" not in files:
        raise NotServable(
            f"the artifact (method {manifest.get('method')}) is no adapter: it has no adapter_config.json"
        )
    return files, manifest


def clean(cache: Path, *, wanted: Callable[[], set[str]]) -> None:
    """Removes copies that nobody wants, but the last few. `wanted` gives digests, which may change meanwhile."""
    spare = [path for path in _copies(cache) if f"sha256:{path.name}" not in wanted()]
    for path in spare[KEPT:]:
        if f"sha256:{path.name}" not in wanted():
            shutil.rmtree(path, ignore_errors=True)


def clean_parts(cache: Path, *, seconds: float) -> None:
    """Removes what downloads left that were killed: parts that began longer ago than a download may take."""
    for path in cache.glob(f"{_PART}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > seconds:
                shutil.rmtree(path)


def _copies(cache: Path) -> list[Path]:
    """Our copies in the cache, newest first; another agent may remove some while we look."""
    dated = []
    with contextlib.suppress(FileNotFoundError):
        for path in cache.iterdir():
            if _COPY.fullmatch(path.name):
                with contextlib.suppress(OSError):
                    dated.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(dated, reverse=True)]

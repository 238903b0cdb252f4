"""URIs to files: local paths for file:// and pvc://, fsspec for object stores, the hub's cache for hf:// models."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from finetune_trainer import pulse, signals
from finetune_trainer.failures import BadConfig, StorageFailed, TrainerError, is_storage_trouble
from finetune_trainer.progress import say

REMOTE_SCHEMES = ("s3", "gs", "http", "https", "hf")
PAUSES = (1.0, 4.0, 15.0, 30.0, 60.0)  # seconds before a failed transfer is tried again
MORE_ROOM = "give the pod more ephemeral storage, or set TMPDIR to a larger volume"
NO_WORK_FOLDER = (
    "no folder for temporary files can be written ({}); set TMPDIR to a volume that can be written"
)
MODEL_FILES = ("*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "*.tiktoken")
T = TypeVar("T")


def local_path(uri: str) -> Path | None:
    """Returns the path of a file:// or pvc:// URI, None for a remote one. Raises BadConfig for anything else."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        raise BadConfig(
            f"{uri!r} is not a URI; write file:///absolute/path, pvc://claim/path, s3://bucket/path, ..."
        )
    if scheme == "file":
        if not rest.startswith("/"):
            raise BadConfig(f"{uri!r}: file:// needs an absolute path, three slashes: file:///{rest}")
        return Path(rest)
    if scheme == "pvc":
        return _volume_path(uri, rest)
    if scheme in REMOTE_SCHEMES:
        if "::" in rest:  # fsspec chains file systems with it
            raise BadConfig(f"{uri!r}: '::' cannot be part of a path; rename it")
        return None
    raise BadConfig(f"{uri!r}: scheme {scheme} is not known; use file, pvc, {', '.join(REMOTE_SCHEMES)}")


def _volume_path(uri: str, rest: str) -> Path:
    volumes = os.environ.get("FINETUNE_VOLUMES")
    if not volumes:
        raise BadConfig(f"{uri!r}: no volumes are mounted here (FINETUNE_VOLUMES is not set)")
    claim = Path(volumes) / rest.partition("/")[0]
    if not claim.is_dir():
        raise BadConfig(f"{uri!r}: claim {claim.name!r} is not mounted under {volumes}")
    path = Path(volumes) / rest
    if ".." in path.parts:
        raise BadConfig(f"{uri!r}: '..' would leave the volume; write the path without it")
    return path


def is_hub(uri: str) -> bool:
    return uri.startswith("hf://")


def open_filesystem(uri: str) -> tuple[Any, str]:
    """Returns the file system and the path in it; credentials and AWS_ENDPOINT_URL come from the environment.

    Nothing that it has listed is remembered: another attempt may have written or removed it since.
    """
    import fsspec  # a slow import, and local runs need none of it

    try:
        filesystem, path = fsspec.core.url_to_fs(uri, use_listings_cache=False)
    except ImportError as error:
        raise BadConfig(f"{uri}: this image cannot read it ({error})") from error
    return filesystem, str(path)


def _signs() -> Any:
    """What fsspec calls with every piece that it has moved."""
    from fsspec.callbacks import Callback

    class Signs(Callback):  # type: ignore[misc]
        def call(self, *_: Any, **__: Any) -> None:
            pulse.beat()

    return Signs()


def fetch_file(uri: str, folder: Path) -> Path:
    """Downloads a remote file into `folder`, keeping its name (the suffix says what is in it).

    Raises FileNotFoundError; PermissionError and other OSErrors of the store pass through.
    """
    filesystem, path = open_filesystem(uri)
    target = folder / path.rsplit("/", 1)[-1]
    folder.mkdir(parents=True, exist_ok=True)
    filesystem.get_file(path, str(target), callback=_signs())
    return target


def fetch_folder(uri: str, folder: Path) -> Path:
    """Downloads the model files of a remote folder. Raises FileNotFoundError when the folder holds nothing."""
    filesystem, path = open_filesystem(uri)
    names = [
        name for name in filesystem.find(path) if any(Path(name).match(pattern) for pattern in MODEL_FILES)
    ]
    if not names:
        filesystem.info(path)  # a host that nobody can reach has no names either; the error tells
        raise FileNotFoundError(uri)
    for name in names:
        target = folder / os.path.relpath(name, path)
        target.parent.mkdir(parents=True, exist_ok=True)
        filesystem.get_file(name, str(target), callback=_signs())
    return folder


class Folder(Protocol):
    """An output folder, wherever it is. Names are relative, with forward slashes."""

    uri: str

    def names(self) -> list[str]:
        """Every file below the folder; empty when there is none."""
        ...

    def read(self, name: str) -> bytes | None:
        """The file's content, None when it does not exist."""
        ...

    def chunks(self, name: str) -> Iterator[bytes]:
        """The file's content in pieces. Raises FileNotFoundError."""
        ...

    def put(self, source: Path, name: str) -> None:
        """Copies a local file into the folder."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file so that a reader sees all of it or nothing."""
        ...

    def remove(self, name: str) -> None:
        """Removes a file, and the folder in this one in which it was the last one."""
        ...

    def remove_if_empty(self) -> None:
        """Removes this folder where nothing is left in it."""
        ...


def open_folder(uri: str) -> Folder:
    """Returns the folder of an output URI; nothing is created yet."""
    path = local_path(uri)
    return RemoteFolder(uri) if path is None else LocalFolder(uri, path)


class LocalFolder:
    def __init__(self, uri: str, path: Path) -> None:
        self.uri = uri
        self.path = path

    def names(self) -> list[str]:
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(str(self.path))
        return sorted(str(file.relative_to(self.path)) for file in self.path.rglob("*") if not file.is_dir())

    def read(self, name: str) -> bytes | None:
        try:
            return (self.path / name).read_bytes()
        except FileNotFoundError:
            return None

    def chunks(self, name: str) -> Iterator[bytes]:
        with (self.path / name).open("rb") as file:
            while chunk := file.read(1 << 20):
                yield chunk
                pulse.beat()

    def put(self, source: Path, name: str) -> None:
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with source.open("rb") as reader, target.open("wb") as writer:
            while chunk := reader.read(1 << 20):
                writer.write(chunk)
                pulse.beat()
            _sync(writer)

    def write(self, name: str, content: bytes) -> None:
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(part_of(target.name))
        with part.open("wb") as writer:
            writer.write(content)
            _sync(writer)
        part.replace(target)

    def remove(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)
        top = self.path / Path(name).parts[0]
        left = sorted(top.rglob("*"), reverse=True)  # deepest first
        if all(item.is_dir() for item in left):
            for folder in (*left, top):
                _remove_folder_if_empty(folder)

    def remove_if_empty(self) -> None:
        _remove_folder_if_empty(self.path)


def part_of(name: str) -> str:
    """What a small file is called while it is written to a disk; a kill in that moment leaves it."""
    return f".{name}.part"


def _sync(writer: Any) -> None:
    writer.flush()
    os.fsync(writer.fileno())


def _remove_folder_if_empty(path: Path) -> None:
    with contextlib.suppress(OSError):  # not empty, gone already, or not ours: a volume, a link
        path.rmdir()


class RemoteFolder:
    """A prefix of an object store. A put object is visible as a whole or not at all, so `write` needs no rename."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.filesystem, self.path = open_filesystem(uri)

    def names(self) -> list[str]:
        # An object with a slash at its end holds nothing: so consoles make folders.
        names = [name for name in self.filesystem.find(self.path) if not name.endswith("/")]
        return sorted(os.path.relpath(name, self.path) for name in names)

    def read(self, name: str) -> bytes | None:
        try:
            return bytes(self.filesystem.cat_file(f"{self.path}/{name}"))
        except FileNotFoundError:
            return None
        except OSError as error:
            if not is_storage_trouble(error):
                self.filesystem.find(self.path)  # what is refused says why: the answer to a HEAD has no words
            raise

    def chunks(self, name: str) -> Iterator[bytes]:
        with self.filesystem.open(f"{self.path}/{name}", "rb") as file:
            while chunk := file.read(1 << 20):
                yield chunk
                pulse.beat()

    def put(self, source: Path, name: str) -> None:
        self.filesystem.put_file(str(source), f"{self.path}/{name}", callback=_signs())

    def write(self, name: str, content: bytes) -> None:
        self.filesystem.pipe_file(f"{self.path}/{name}", content)

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.filesystem.rm_file(f"{self.path}/{name}")

    def remove_if_empty(self) -> None:
        """Prefixes are not things; there is nothing to remove."""


def describe_error(error: BaseException) -> str:
    """Returns what an I/O error says, without our own words around it."""
    if isinstance(error, TrainerError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def is_failure(error: Exception) -> bool:
    """Whether it is storage that failed: beside OSError, stores raise their client's own types."""
    return isinstance(error, OSError) or is_storage_trouble(error)


def persist(action: Callable[[], T], *, what: str) -> T:
    """Does a transfer, again after each pause while storage fails. Raises StorageFailed, which begins with `what`."""
    waits = list(PAUSES)
    while True:
        try:
            return action()
        except Exception as error:
            if not is_failure(error):
                raise
            if not waits:
                raise StorageFailed(f"{what} ({describe_error(error)})") from error
            pause = waits.pop(0)
            say(f"{what} ({describe_error(error)}); trying again in {pause:g}s")
            signals.pause(pause)

"""Files in the state folder."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import uuid
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from finetune_operator.api.routes import Snapshot

logger = logging.getLogger(__name__)

_INSTANCE = "instance"
_MIRROR = "routes.json"


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file: whoever reads sees the old content or the new, also after a crash of the machine. Only the
    router's own user may read it. Raises OSError that names the file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:  # a disk that is full: half a file must not take what is left of it
        temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold the folder, also one on a disk that has become read-only. Raises ValueError where another router has it:
    both would have one identity, and the operator would take the counts of one for all of them."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(
            f"--state-dir: {folder} belongs to another router that runs: give each its own"
        ) from None
    except OSError as error:  # some network file systems have no locks
        logger.warning("%s cannot be locked, so no other router may have it as well: %s", folder, error)
    try:
        yield
    finally:
        os.close(descriptor)


def read_instance(folder: Path) -> str:
    """Identity of this replica, made at its first start."""
    file = folder / _INSTANCE
    if not file.exists():
        write_atomically(file, uuid.uuid4().hex.encode())
    return file.read_text(encoding="ascii").strip()


def write_mirror(folder: Path, snapshot: Snapshot) -> None:
    """Keep the snapshot for the next start."""
    write_atomically(folder / _MIRROR, snapshot.model_dump_json(by_alias=True).encode())


def read_mirror(folder: Path) -> Snapshot | None:
    return read_snapshot(folder / _MIRROR)


def identity(file: Path) -> tuple[int, int, int] | None:
    """Which file it is, in which state; None where there is none. The same one again has the same content."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def read_snapshot(file: Path) -> Snapshot | None:
    """None when there is no file, or none that can be read; then the log says why."""
    try:
        return Snapshot.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        logger.error("%s is passed over: %s", file, error)
        return None

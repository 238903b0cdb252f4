"""Checkpoints in checkpoint.uri: `checkpoint-<step>/` with the trainer's files, manifest.json, and `complete` last.

A folder without `complete` is half a write and never read. `complete` holds the SHA-256 of manifest.json, which holds
those of all files: what is loaded is, byte for byte, what was saved. Removal begins with `complete`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from finetune_trainer import artifacts, owners, storage
from finetune_trainer.failures import BadConfig
from finetune_trainer.owners import Owner
from finetune_trainer.progress import say
from finetune_trainer.runfile import Job

MANIFEST = "manifest.json"
COMPLETE = "complete"
CORRUPT = "corrupt"  # beside a manifest whose files do not fit it: why, and kept from being read again
FIELD = "checkpoint.uri"
T = TypeVar("T")
_ENTRY = re.compile(r"checkpoint-(\d{1,12})/(.+)", re.DOTALL)


class Corrupt(Exception):  # noqa: N818  a finding, which leads to the checkpoint before
    """A checkpoint is not what was saved. The message says where."""


@dataclass(frozen=True)
class Checkpoint:
    step: int
    uri: str
    manifest: dict[str, Any]

    def to_report(self) -> dict[str, Any]:
        return {"step": self.step, "uri": self.uri}


class Store:
    """The checkpoints of one job. Only one attempt writes at a time; one that another succeeded finds out and ends."""

    def __init__(self, folder: storage.Folder, job: Job) -> None:
        self.folder = folder
        self.job = job

    # ------------------------------------------------------------ owning

    def claim(self) -> None:
        """Makes the folder ours and removes what an earlier attempt left half written.

        A job that was deleted and created again under its name takes over what its predecessor left. Raises BadConfig,
        which names checkpoint.uri, for a folder that is another job's or cannot be written, StorageFailed where that
        may pass, and Preempted where a later attempt has begun.
        """
        try:
            if owners.find(self.folder, self.job, field=FIELD) is Owner.NOBODY and self._entries():
                raise BadConfig(
                    f"{FIELD} {self.folder.uri} holds checkpoints that no job made; choose another"
                )
            owners.write(self.folder, self.job)
            for files in self._entries().values():
                if COMPLETE not in files and CORRUPT not in files:
                    self._remove(files)
        except Exception as error:
            if not storage.is_failure(error):
                raise
            raise owners.refused(self.folder, self.job, error, field=FIELD) from error

    def _hold(self) -> None:
        if not owners.hold(self.folder, self.job, field=FIELD):
            self.claim()  # the folder was removed; what is saved from here on is ours

    # ------------------------------------------------------------ saving

    def save(
        self,
        files: dict[str, Path],
        *,
        step: int,
        config_digest: str,
        facts: dict[str, Any],
    ) -> Checkpoint:
        """Copies local files (by their names in the checkpoint) and completes the checkpoint.

        Raises StorageFailed, and Preempted when a later attempt, or this job created again, owns the folder.
        """
        uri = self._uri(step)
        retry = partial(storage.persist, what=f"{uri} could not be saved")
        retry(self._hold)
        retry(lambda: self._remove(self._entries().get(step, {})))
        listed = []
        for name, path in sorted(files.items()):
            retry(partial(self.folder.put, path, f"checkpoint-{step}/{name}"))
            listed.append({"path": name, "sha256": artifacts.hash_file(path), "size": path.stat().st_size})
        manifest = {
            "apiVersion": "checkpoint/v1",
            "job": self.job.model_dump(),
            "step": step,
            "configDigest": config_digest,
            **facts,
            "createdAt": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "files": listed,
        }
        content = (json.dumps(manifest, indent=2, ensure_ascii=False) + "\n").encode()
        retry(
            self._hold
        )  # else a later attempt has removed some of these files: half a write that looks whole
        retry(partial(self.folder.write, f"checkpoint-{step}/{MANIFEST}", content))
        retry(partial(self.folder.write, f"checkpoint-{step}/{COMPLETE}", _digest(content).encode()))
        return Checkpoint(step, uri, manifest)

    def prune(self, step: int, *, keep: int) -> None:
        """Keeps the `keep` newest whole checkpoints up to `step`, which was just saved, and nothing else.

        Later steps are of a course that was given up: the attempt began before them.
        """
        self._hold()
        entries = self._entries()
        whole = sorted(number for number, files in entries.items() if COMPLETE in files and number <= step)
        for number in sorted(set(entries) - set(whole[-keep:])):
            self._remove(entries[number])

    def clear(self) -> None:
        """Removes all checkpoints and the mark: the artifact is committed. Nothing where they are not ours any more."""
        if owners.find(self.folder, self.job, field=FIELD) not in (Owner.OURS, Owner.EARLIER):
            return
        for files in self._entries().values():
            self._remove(files)
        self.folder.remove(owners.MARK)
        self.folder.remove_if_empty()

    # ------------------------------------------------------------ finding and loading

    def find(self, config_digest: str | None = None) -> Iterator[Checkpoint]:
        """Yields this job's whole checkpoints, newest first; a broken one is marked on the way.

        With a digest only those of that configuration: another one's optimizer or data position fits nothing.
        """
        entries = storage.persist(self._entries, what=f"{FIELD} {self.folder.uri} could not be read")
        for step in sorted((number for number, files in entries.items() if COMPLETE in files), reverse=True):
            try:
                checkpoint = self._describe(step)
            except Corrupt as finding:
                self.mark_corrupt(step, str(finding))
                continue
            if checkpoint.manifest["job"]["uid"] != self.job.uid:
                continue
            if config_digest is not None and checkpoint.manifest["configDigest"] != config_digest:
                say(f"{checkpoint.uri} was made with other settings or data: not used")
                continue
            yield checkpoint

    def fetch(self, checkpoint: Checkpoint, target: Path) -> None:
        """Copies a checkpoint's files to a local folder and compares them with the manifest.

        Raises Corrupt after two readings, and StorageFailed when storage does not answer.
        """
        for file in checkpoint.manifest["files"]:
            self._fetch_file(checkpoint, file, target)

    def verify(self, checkpoint: Checkpoint) -> None:
        """Reads every file of a checkpoint where it is. Raises Corrupt."""
        for file in checkpoint.manifest["files"]:
            self._fetch_file(checkpoint, file, None)

    def mark_corrupt(self, step: int, reason: str) -> None:
        """Keeps a checkpoint from being read again. Its files stay to be looked at until newer ones replace it."""
        say(f"{self._uri(step)} is corrupt ({reason}); the one before it is used")
        persist = partial(storage.persist, what=f"{self._uri(step)} could not be marked")
        persist(lambda: self.folder.write(f"checkpoint-{step}/{CORRUPT}", f"{reason}\n".encode()))
        persist(lambda: self.folder.remove(f"checkpoint-{step}/{COMPLETE}"))

    def _fetch_file(self, checkpoint: Checkpoint, file: dict[str, Any], target: Path | None) -> None:
        what = f"{checkpoint.uri}/{file['path']} could not be read"
        read = partial(self._read_file, checkpoint, file["path"], target)
        if not _twice(lambda: storage.persist(read, what=what) == file["sha256"]):
            raise Corrupt(f"{file['path']} differs from {MANIFEST} (SHA-256)")

    def _read_file(self, checkpoint: Checkpoint, name: str, target: Path | None) -> str:
        """Returns the SHA-256 of what was read."""
        digest = hashlib.sha256()
        try:
            chunks = self.folder.chunks(f"checkpoint-{checkpoint.step}/{name}")
            if target is None:
                for chunk in chunks:
                    digest.update(chunk)
                return digest.hexdigest()
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as file:
                for chunk in chunks:
                    digest.update(chunk)
                    file.write(chunk)
        except FileNotFoundError as error:
            raise Corrupt(f"{name} is missing") from error
        except OSError as error:
            if error.errno == errno.EIO and storage.local_path(self.folder.uri) is not None:
                raise Corrupt(f"{name} cannot be read (input/output error)") from error
            raise
        return digest.hexdigest()

    def _describe(self, step: int) -> Checkpoint:
        content = _twice(partial(self._read_manifest, step))
        if content is None:
            raise Corrupt(f"{MANIFEST} differs from {COMPLETE} (SHA-256)")
        manifest = _read_object(content)
        if manifest is None or not _is_manifest(manifest, step):
            raise Corrupt(f"{MANIFEST} is not a checkpoint's")
        return Checkpoint(step, self._uri(step), manifest)

    def _read_manifest(self, step: int) -> bytes | None:
        """None where `complete` does not vouch for it."""
        read = partial(storage.persist, what=f"{self._uri(step)} could not be read")
        content = read(lambda: self.folder.read(f"checkpoint-{step}/{MANIFEST}"))
        complete = read(lambda: self.folder.read(f"checkpoint-{step}/{COMPLETE}"))
        if content is None or complete is None or complete.strip() != _digest(content).encode():
            return None
        return content

    # ------------------------------------------------------------ files

    def _uri(self, step: int) -> str:
        return f"{self.folder.uri.rstrip('/')}/checkpoint-{step}"

    def _entries(self) -> dict[int, dict[str, str]]:
        """By step: the names in each checkpoint's folder, with the names as the store knows them."""
        entries: dict[int, dict[str, str]] = {}
        for name in self.folder.names():
            match = _ENTRY.fullmatch(name)
            if match:
                entries.setdefault(int(match.group(1)), {})[match.group(2)] = name
        return entries

    def _remove(self, files: dict[str, str]) -> None:
        for name in sorted(files, key=lambda name: (name != COMPLETE, name)):
            self.folder.remove(files[name])


def _twice(read: Callable[[], T]) -> T:
    """What is read; where that is nothing, what is read again: a transfer may have been cut short."""
    found = read()
    if not found:
        time.sleep(0.1)
        found = read()
    return found


def _is_manifest(manifest: dict[str, Any], step: int) -> bool:
    try:
        names = [PurePosixPath(file["path"]) for file in manifest["files"] if file["sha256"]]
        known = manifest["step"] == step and manifest["job"]["uid"] and manifest["configDigest"]
    except (KeyError, TypeError):
        return False
    return bool(known) and not any(name.is_absolute() or ".." in name.parts for name in names)


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _read_object(content: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(content)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None

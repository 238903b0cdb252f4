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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from finetune_trainer import artifacts, storage
from finetune_trainer.failures import BadConfig, Preempted, StorageFailed, is_storage_trouble
from finetune_trainer.runfile import Job

MANIFEST = "manifest.json"
COMPLETE = "complete"
CORRUPT = "corrupt"  # beside a manifest whose files do not fit it: why, and kept from being read again
OWNER_MARK = artifacts.OWNER_MARK
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

        Raises BadConfig, which names checkpoint.uri, for a folder that is another job's or cannot be written.
        """
        try:
            self._check_owner()
            self.folder.write(OWNER_MARK, (json.dumps(self.job.model_dump()) + "\n").encode())
            for files in self._entries().values():
                if COMPLETE not in files and CORRUPT not in files:
                    self._remove(files)
            self.folder.remove_if_empty()
        except OSError as error:
            text = f"checkpoint.uri {self.folder.uri} cannot be written ({storage.describe_error(error)})"
            if is_storage_trouble(error):
                raise StorageFailed(text) from error
            raise BadConfig(f"{text}; choose a folder that the training process may write to") from error

    def _check_owner(self) -> None:
        content = self.folder.read(OWNER_MARK)
        if content is None:
            if self._entries():
                raise BadConfig(
                    f"checkpoint.uri {self.folder.uri} holds checkpoints that no job made; choose another"
                )
            return
        owner = _read_object(content) or {}
        # A job that was deleted and created again under its name takes over what its predecessor left.
        if (owner.get("namespace"), owner.get("name")) != (self.job.namespace, self.job.name):
            raise BadConfig(
                f"checkpoint.uri {self.folder.uri} holds the checkpoints of job "
                f"{owner.get('namespace')}/{owner.get('name')}; choose another, or delete them if that job is gone"
            )
        if owner.get("uid") == self.job.uid and int(owner.get("attempt", 0)) > self.job.attempt:
            raise Preempted(
                f"attempt {owner['attempt']} has taken over {self.folder.uri}; attempt {self.job.attempt} ends"
            )

    # ------------------------------------------------------------ saving

    def save(
        self,
        files: dict[str, Path],
        *,
        step: int,
        config_digest: str,
        facts: dict[str, Any],
        pauses: Sequence[float] = storage.PAUSES,
    ) -> Checkpoint:
        """Copies local files (by their names in the checkpoint) and completes the checkpoint.

        Raises StorageFailed, and Preempted when a later attempt owns the folder.
        """
        uri = self._uri(step)
        retry = partial(storage.persist, what=f"{uri} could not be saved", pauses=pauses)
        retry(self._check_owner)
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
        retry(partial(self.folder.write, f"checkpoint-{step}/{MANIFEST}", content))
        retry(partial(self.folder.write, f"checkpoint-{step}/{COMPLETE}", _digest(content).encode()))
        return Checkpoint(step, uri, manifest)

    def prune(self, step: int, *, keep: int) -> None:
        """Keeps the `keep` newest whole checkpoints up to `step`, which was just saved, and nothing else.

        Later steps are of a course that was given up: the attempt began before them.
        """
        entries = self._entries()
        whole = sorted(number for number, files in entries.items() if COMPLETE in files and number <= step)
        for number in sorted(set(entries) - set(whole[-keep:])):
            self._remove(entries[number])
        self.folder.remove_if_empty()

    def clear(self) -> None:
        """Removes all checkpoints and the mark: the artifact is committed."""
        for files in self._entries().values():
            self._remove(files)
        self.folder.remove(OWNER_MARK)
        self.folder.remove_if_empty()

    # ------------------------------------------------------------ finding and loading

    def find(self, config_digest: str | None = None) -> Iterator[Checkpoint]:
        """Yields this job's whole checkpoints, newest first; a broken one is marked on the way.

        With a digest only those of that configuration: another one's optimizer or data position fits nothing.
        """
        entries = self._entries()
        for step in sorted((number for number, files in entries.items() if COMPLETE in files), reverse=True):
            try:
                checkpoint = self._describe(step)
            except Corrupt as finding:
                self.mark_corrupt(step, str(finding))
                continue
            if checkpoint.manifest["job"]["uid"] != self.job.uid:
                continue
            if config_digest is not None and checkpoint.manifest["configDigest"] != config_digest:
                print(f"{checkpoint.uri} was made with other settings or data: not used", flush=True)
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
        print(f"{self._uri(step)} is corrupt ({reason}); the one before it is used", flush=True)
        self.folder.write(f"checkpoint-{step}/{CORRUPT}", f"{reason}\n".encode())
        self.folder.remove(f"checkpoint-{step}/{COMPLETE}")

    def _fetch_file(self, checkpoint: Checkpoint, file: dict[str, Any], target: Path | None) -> None:
        what = f"{checkpoint.uri}/{file['path']} could not be read"
        for reading in (1, 2):
            found = storage.persist(partial(self._read_file, checkpoint, file["path"], target), what=what)
            if found == file["sha256"]:
                return
            if reading == 1:
                time.sleep(0.1)  # a transfer may have been cut short; a second reading tells
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
        read = partial(storage.persist, what=f"{self._uri(step)} could not be read")
        content = read(lambda: self.folder.read(f"checkpoint-{step}/{MANIFEST}"))
        complete = read(lambda: self.folder.read(f"checkpoint-{step}/{COMPLETE}"))
        if (
            content is None
            or complete is None
            or complete.decode(errors="replace").strip() != _digest(content)
        ):
            raise Corrupt(f"{MANIFEST} differs from {COMPLETE} (SHA-256)")
        manifest = _read_object(content)
        if manifest is None or not _is_manifest(manifest, step):
            raise Corrupt(f"{MANIFEST} is not a checkpoint's")
        return Checkpoint(step, self._uri(step), manifest)

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


def _is_manifest(manifest: dict[str, Any], step: int) -> bool:
    try:
        names = [PurePosixPath(file["path"]) for file in manifest["files"]]
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

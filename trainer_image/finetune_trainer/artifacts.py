"""The artifact's folder: who owns it, what it holds, and the manifest that makes it whole.

Order is the contract: the owner's mark first, then the files, and manifest.json last. A folder with a manifest is
committed; everything else is a piece of work that may be thrown away.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from finetune_trainer import storage
from finetune_trainer.failures import BadConfig, StorageFailed, TrainerError, is_storage_trouble
from finetune_trainer.runfile import Job

MANIFEST = "manifest.json"
OWNER_MARK = ".finetune-job.json"


@dataclass(frozen=True)
class Artifact:
    uri: str
    digest: str  # "sha256:" + SHA-256 of manifest.json
    size_bytes: int  # of all files, the manifest included
    base_model: str
    rank: int | None
    metrics: dict[str, Any]
    step: int
    effective: dict[str, Any]

    def to_report(self) -> dict[str, Any]:
        report = {
            "uri": self.uri,
            "digest": self.digest,
            "sizeBytes": self.size_bytes,
            "baseModel": self.base_model,
        }
        return report if self.rank is None else {**report, "rank": self.rank}


def hash_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def hash_dataset(paths: list[Path]) -> str:
    """Returns the digest of the data files' contents in their order; names and places do not count."""
    total = hashlib.sha256()
    for path in paths:
        total.update(bytes.fromhex(hash_file(path)))
    return f"sha256:{total.hexdigest()}"


def claim_folder(folder: storage.Folder, job: Job) -> Artifact | None:
    """Makes the folder ours, or returns the artifact that this job has already committed there.

    Leftovers of an earlier start of the same job are removed. Raises BadConfig, which names output.uri, for a folder
    that belongs to something else or cannot be written.
    """
    try:
        committed = folder.read(MANIFEST)
        if committed is not None:
            return _read_own(folder, committed, job)
        names = folder.names()
        mark = folder.read(OWNER_MARK)
        if mark is not None and _uid_of(mark) != job.uid:
            raise BadConfig(
                f"output.uri {folder.uri} is in use by job {_name_of(mark)}, which has not finished there; "
                "choose another output.uri, or delete the folder if that job is gone"
            )
        if names and mark is None:
            raise BadConfig(
                f"output.uri {folder.uri} is not empty ({_few(names)}) "
                "and was not made by this job; choose an empty or new folder"
            )
        folder.write(OWNER_MARK, _to_json(job.model_dump()))
        for name in names:
            if name != OWNER_MARK:
                folder.remove(name)
    except OSError as error:
        text = f"output.uri {folder.uri} cannot be written ({storage.describe_error(error)})"
        if is_storage_trouble(error):
            raise StorageFailed(text) from error
        raise BadConfig(f"{text}; choose a folder that the training process may write to") from error
    return None


def release_folder(folder: storage.Folder, job: Job) -> None:
    """Takes back a claim after a failure, so that a corrected job can use the same output.uri.

    Never touches a committed folder.
    """
    mark = folder.read(OWNER_MARK)
    if mark is None or _uid_of(mark) != job.uid or folder.read(MANIFEST) is not None:
        return
    for name in folder.names():
        if name != OWNER_MARK:
            folder.remove(name)
    folder.remove(OWNER_MARK)  # last: until then the folder is visibly ours
    folder.remove_if_empty()


def commit(folder: storage.Folder, work: Path, manifest: dict[str, Any], job: Job) -> Artifact:
    """Copies the files of `work` into the folder and writes the manifest last.

    Raises BadConfig if another job took the folder meanwhile, StorageFailed after a few tries.
    """
    persist = partial(storage.persist, what=f"output.uri {folder.uri} could not be written")
    files = sorted(path for path in work.rglob("*") if path.is_file())
    listed = []
    for path in files:
        name = path.relative_to(work).as_posix()
        persist(partial(folder.put, path, name))
        listed.append({"path": name, "sha256": hash_file(path), "size": path.stat().st_size})
    mark = persist(lambda: folder.read(OWNER_MARK))
    if mark is None or _uid_of(mark) != job.uid:
        raise BadConfig(
            f"output.uri {folder.uri} was taken over by another job while this one was training; choose another"
        )
    content = _to_json({**manifest, "files": listed})
    persist(lambda: folder.write(MANIFEST, content))
    persist(lambda: folder.remove(OWNER_MARK))
    return describe(folder.uri, content)


def describe(uri: str, content: bytes) -> Artifact:
    """Returns the summary of a committed manifest."""
    manifest = json.loads(content)
    return Artifact(
        uri=uri,
        digest=f"sha256:{hashlib.sha256(content).hexdigest()}",
        size_bytes=sum(file["size"] for file in manifest["files"]) + len(content),
        base_model=manifest["baseModel"]["uri"],
        rank=manifest.get("rank"),
        metrics=manifest["metrics"],
        step=manifest["metrics"]["step"],
        effective=manifest["hyperparameters"],
    )


def inspect(folder: storage.Folder, job: Job) -> Artifact:
    """Verifies every file of a committed folder against its manifest. Raises TrainerError when one differs."""
    content = folder.read(MANIFEST)
    if content is None:
        raise TrainerError(
            f"output.uri {folder.uri} holds no {MANIFEST}: nothing was committed there; run the job again"
        )
    artifact = _read_own(folder, content, job)
    verify(folder, content)
    return artifact


def verify(folder: storage.Folder, content: bytes) -> None:
    """Compares every file with its size and SHA-256. Raises TrainerError, which names the first file that differs."""
    for file in json.loads(content)["files"]:
        digest = hashlib.sha256()
        try:
            for chunk in folder.chunks(file["path"]):
                digest.update(chunk)
        except FileNotFoundError:
            raise TrainerError(
                f"{folder.uri}/{file['path']} is missing, but {MANIFEST} lists it; train again"
            ) from None
        if digest.hexdigest() != file["sha256"]:
            raise TrainerError(f"{folder.uri}/{file['path']} differs from {MANIFEST} (SHA-256); train again")


def _read_own(folder: storage.Folder, content: bytes, job: Job) -> Artifact:
    try:
        artifact, owner = describe(folder.uri, content), json.loads(content)["job"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadConfig(
            f"output.uri {folder.uri} holds a {MANIFEST} that is not ours; choose another output.uri"
        ) from error
    if owner["uid"] != job.uid:
        raise BadConfig(
            f"output.uri {folder.uri} already holds the artifact of job {owner['namespace']}/{owner['name']}; "
            "artifacts are never overwritten: choose another output.uri"
        )
    return artifact


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _uid_of(mark: bytes) -> str:
    return str(_read_mark(mark).get("uid"))


def _name_of(mark: bytes) -> str:
    owner = _read_mark(mark)
    return f"{owner.get('namespace')}/{owner.get('name')}"


def _read_mark(mark: bytes) -> dict[str, Any]:
    try:
        value = json.loads(mark)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()

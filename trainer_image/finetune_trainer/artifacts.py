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

from finetune_trainer import owners, pulse, storage
from finetune_trainer.failures import BadConfig, TrainerError
from finetune_trainer.owners import Owner
from finetune_trainer.progress import say
from finetune_trainer.runfile import Job

MANIFEST = "manifest.json"
FIELD = "output.uri"


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
            pulse.beat()
    return digest.hexdigest()


def hash_dataset(paths: list[Path]) -> str:
    """Returns the digest of the data files' contents in their order; names and places do not count."""
    total = hashlib.sha256()
    for path in paths:
        total.update(bytes.fromhex(hash_file(path)))
    return f"sha256:{total.hexdigest()}"


def claim_folder(folder: storage.Folder, job: Job) -> Artifact | None:
    """Makes the folder ours, or returns the artifact that this job has already committed there.

    Leftovers of an earlier start of the same job, or of one that was deleted and created again, are removed.
    Raises BadConfig, which names output.uri, for a folder that belongs to something else or cannot be written,
    StorageFailed where that may pass, and Preempted where a later attempt has begun.
    """
    try:
        return _find_committed(folder, job) or _take(folder, job)
    except Exception as error:
        if not storage.is_failure(error):
            raise
        raise owners.refused(folder, job, error, field=FIELD) from error


def _take(folder: storage.Folder, job: Job) -> Artifact | None:
    if owners.find(folder, job, field=FIELD) is Owner.NOBODY:
        # A claim that was killed in its first moment is nobody's work.
        names = [name for name in folder.names() if name != storage.part_of(owners.MARK)]
        if names:
            raise BadConfig(
                f"{FIELD} {folder.uri} is not empty ({_few(names)}) "
                "and was not made by this job; choose an empty or new folder"
            )
    owners.write(folder, job)
    names = folder.names()
    if MANIFEST in names:  # an earlier attempt, which may still run, has just committed
        _unmark(folder, job)
        return _find_committed(folder, job)
    for name in names:
        if name != owners.MARK:
            folder.remove(name)
    return None


def release_folder(folder: storage.Folder, job: Job) -> None:
    """Takes back a claim after a failure, so that a corrected job can use the same output.uri.

    Never touches a committed folder, nor one that another attempt or job has taken over.
    """
    if not owners.is_ours(folder, job) or folder.read(MANIFEST) is not None:
        return
    for name in folder.names():
        if name != owners.MARK:
            folder.remove(name)
    folder.remove(owners.MARK)  # last: until then the folder is visibly ours
    folder.remove_if_empty()


def commit(folder: storage.Folder, work: Path, manifest: dict[str, Any], job: Job) -> Artifact:
    """Copies the files of `work` into the folder and writes the manifest last.

    Where another attempt of this job was quicker, its artifact is the result. Raises Preempted or BadConfig if a later
    attempt or another job took the folder meanwhile, StorageFailed after a few tries.
    """
    persist = partial(storage.persist, what=f"{FIELD} {folder.uri} could not be written")
    adopted = persist(lambda: _adopt(folder, job))
    if adopted is not None:
        return adopted
    files = sorted(path for path in work.rglob("*") if path.is_file())
    listed = []
    for path in files:
        name = path.relative_to(work).as_posix()
        persist(partial(_hold, folder, job))
        persist(partial(folder.put, path, name))
        listed.append({"path": name, "sha256": hash_file(path), "size": path.stat().st_size})
    content = _to_json({**manifest, "files": listed})
    persist(partial(_hold, folder, job))
    persist(lambda: folder.write(MANIFEST, content))
    _unmark(folder, job)
    return describe(folder.uri, content)


def _adopt(folder: storage.Folder, job: Job) -> Artifact | None:
    """The whole artifact that another attempt of this job has committed, if any."""
    content = folder.read(MANIFEST)
    if content is None:
        return None
    artifact = _read_own(folder, content, job)
    try:
        verify(folder, content)
    except TrainerError:
        if not owners.is_ours(folder, job):
            raise
        folder.remove(MANIFEST)  # it was written in the moment in which we removed the files that it lists
        return None
    _unmark(folder, job)
    say(f"{folder.uri} holds the artifact of another attempt of this job: it is the result")
    return artifact


def _hold(folder: storage.Folder, job: Job) -> None:
    if not owners.hold(folder, job, field=FIELD):
        _take(folder, job)  # an earlier attempt took back its claim in the moment in which we made ours


def _unmark(folder: storage.Folder, job: Job) -> None:
    """Removes the mark of a committed folder, whose manifest names the job as well: it may also stay."""
    try:
        if owners.is_ours(folder, job):
            folder.remove(owners.MARK)
    except Exception as error:  # any store's own types; nothing after the commit may fail the job
        say(f"{folder.uri}/{owners.MARK} could not be removed: {storage.describe_error(error)}")


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


def _find_committed(folder: storage.Folder, job: Job) -> Artifact | None:
    content = folder.read(MANIFEST)
    return None if content is None else _read_own(folder, content, job)


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


def _to_json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()

"""Whose folder it is: the mark that every attempt leaves in the folders that it writes to.

An attempt that nobody could reach (a lost node, a pod deleted by force) may go on beside the one that follows it. The
later one's mark is how it finds out: a mark is read again before anything is written, and removed by its owner alone.
"""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Any

from finetune_trainer.failures import BadConfig, Preempted, StorageFailed, TrainerError, is_storage_trouble
from finetune_trainer.runfile import Job
from finetune_trainer.storage import Folder, describe_error, local_path

MARK = ".finetune-job.json"


class Owner(StrEnum):
    """Who a mark names, as the job that reads it sees it."""

    NOBODY = "Nobody"
    OURS = "Ours"
    EARLIER = "Earlier"  # an attempt of this job before this one
    LATER = "Later"
    NAMESAKE = "Namesake"  # a job of the same name that is not this one: one of the two was deleted
    STRANGER = "Stranger"


def write(folder: Folder, job: Job) -> None:
    folder.write(MARK, (json.dumps(job.model_dump(), indent=2, ensure_ascii=False) + "\n").encode())


def find(folder: Folder, job: Job, *, field: str) -> Owner:
    """Says who owns a folder that this attempt wants to make its own.

    Raises Preempted where a later attempt does, BadConfig, which names the field, where another job does.
    """
    mark = _read(folder)
    owner = _compare(mark, job)
    if mark is not None and owner is Owner.LATER:
        raise Preempted(
            f"{field}: attempt {mark['attempt']} has taken over {folder.uri}; attempt {job.attempt} ends"
        )
    if mark is not None and owner is Owner.STRANGER:
        raise BadConfig(
            f"{field} {folder.uri} belongs to job {mark.get('namespace')}/{mark.get('name')}; "
            "choose another, or delete the folder if that job is gone"
        )
    return owner


def hold(folder: Folder, job: Job, *, field: str) -> bool:
    """Makes sure that a folder is still ours, before each write; False where its mark is gone.

    Raises what `find` does, and Preempted where this job was deleted and created again and the new one has begun.
    """
    owner = find(folder, job, field=field)
    if owner is Owner.NAMESAKE:
        raise Preempted(
            f"{field}: job {job.namespace}/{job.name} was created again and has taken over {folder.uri}; this one ends"
        )
    if owner is Owner.EARLIER:
        write(folder, job)  # both began at once, and the earlier attempt's mark came last: now it finds ours
    return owner is not Owner.NOBODY


def refused(folder: Folder, job: Job, error: Exception, *, field: str) -> TrainerError:
    """The failure of an attempt whose folder storage does not let it have.

    At first that is the user's to correct. Where an earlier attempt was let in, it may pass: a token has expired and is
    renewed, a node's clock is wrong.
    """
    remedy = "choose a folder that the training process may write to"
    if local_path(folder.uri) is None:
        remedy = (
            "check bucket and region, and that the credentials in output.secretRef are valid and may list, read, "
            "write and delete there"
        )
    text = f"{field} {folder.uri} cannot be written ({describe_error(error)})"
    if is_storage_trouble(error):
        return StorageFailed(text)
    return (StorageFailed if job.attempt > 1 else BadConfig)(f"{text}; {remedy}")


def is_ours(folder: Folder, job: Job) -> bool:
    """Whether the folder is marked as this very attempt's."""
    return _compare(_read(folder), job) is Owner.OURS


def _read(folder: Folder) -> dict[str, Any] | None:
    content = folder.read(MARK)
    if content is None:
        return None
    try:
        value = json.loads(content)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _compare(mark: dict[str, Any] | None, job: Job) -> Owner:
    if mark is None:
        return Owner.NOBODY
    if mark.get("uid") == job.uid:
        attempt = mark.get("attempt")
        if not isinstance(attempt, int) or attempt < job.attempt:
            return Owner.EARLIER
        return Owner.OURS if attempt == job.attempt else Owner.LATER
    same_name = (mark.get("namespace"), mark.get("name")) == (job.namespace, job.name)
    return Owner.NAMESAKE if same_name else Owner.STRANGER

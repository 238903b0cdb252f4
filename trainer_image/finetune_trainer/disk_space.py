"""Whether what training leaves finds room on the disks, before any weight is loaded.

A disk that fills up at the third checkpoint costs the hours before it, and again at each retry.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from finetune_fit import runs, verdicts
from finetune_trainer import storage
from finetune_trainer.failures import BadConfig, StorageFailed
from finetune_trainer.progress import say
from finetune_trainer.runfile import RunFile

OUTPUT, CHECKPOINTS, WORK = "output.uri", "checkpoint.uri", "the work folder (TMPDIR)"
MARGIN = 0.9  # of what is free: more than that is tight, because others write too


@dataclass
class Disk:
    """One file system, and what lies there at most."""

    where: Path
    total: int
    free: int  # with what this job's earlier attempts left, which is replaced
    training: int = 0  # bytes, after the last checkpoint but before the oldest is removed
    ending: int = 0  # bytes, when the artifact is copied and checkpoints are not yet removed
    fields: list[str] = field(default_factory=list)

    @property
    def needed(self) -> int:
        return max(self.training, self.ending)


def check(run: RunFile, needs: runs.Disk, *, rows: int, work: Path) -> None:
    """Prints a warning where it will be tight. `rows`: those that are trained on.

    Raises BadConfig, with the numbers and a way out, where a local disk has too little room; StorageFailed where an
    earlier attempt began and the disk is large enough: what has filled it since may go away.
    """
    written = count_checkpoints(run, rows=rows)
    for disk in find_disks(run, needs, written=written, work=work):
        if disk.needed > disk.free:
            text = f"{describe(disk, needs, written)}; {way_out(run, disk)}"
            if run.job.attempt > 1 and disk.needed <= disk.total:
                raise StorageFailed(text)
            raise BadConfig(text)
        if disk.needed > MARGIN * disk.free:
            say(f"warning: disk: {describe(disk, needs, written)}")


def count_checkpoints(run: RunFile, *, rows: int) -> int:
    """Checkpoints that certainly lie there at once: those that are kept and one that is being written, unless the run
    is too short for so many; one where only the clock or a stop makes them."""
    schedule, hyper = run.checkpoint, run.hyperparameters
    if schedule is None:
        return 0
    if schedule.every_steps is None or hyper.packing:  # packing: the number of steps is not known here
        return 1
    steps = hyper.max_steps
    if steps is None:
        generations = run.sampling.num_generations if run.objective.samples else 1
        steps = runs.steps(rows=rows * generations, global_batch=hyper.global_batch_size, epochs=hyper.epochs)
    return max(1, min(schedule.keep + 1, steps // schedule.every_steps))


def find_disks(run: RunFile, needs: runs.Disk, *, written: int, work: Path) -> list[Disk]:
    """The local file systems that are written to; object stores, and those that do not tell their size, have room."""
    disks: dict[int, Disk] = {}
    disk = _disk_of(disks, storage.local_path(run.output.uri), OUTPUT)
    if disk is not None:
        disk.ending += needs.artifact
    if run.checkpoint is not None:
        folder = storage.local_path(run.checkpoint.uri)
        disk = _disk_of(disks, folder, CHECKPOINTS)
        if disk is not None and folder is not None:
            disk.training += written * needs.checkpoint
            disk.ending += min(run.checkpoint.keep, written) * needs.checkpoint
            disk.free += _size(folder)
    disk = _disk_of(disks, work, WORK)
    if disk is not None:
        disk.training += needs.checkpoint if written else 0
        disk.ending += needs.artifact
    return list(disks.values())


def describe(disk: Disk, needs: runs.Disk, written: int) -> str:
    parts = []
    if CHECKPOINTS in disk.fields:
        parts.append(f"{written} checkpoints of {verdicts.gib(needs.checkpoint)}")
    if OUTPUT in disk.fields:
        parts.append(f"an artifact of {verdicts.gib(needs.artifact)}")
    if WORK in disk.fields:
        parts.append("what is written before it is copied")
    return (
        f"{', '.join(disk.fields)}: {', '.join(parts)} need {verdicts.gib(disk.needed)} at once, "
        f"and the disk of {disk.where} has {verdicts.gib(disk.free)} free of {verdicts.gib(disk.total)}"
    )


def way_out(run: RunFile, disk: Disk) -> str:
    ways = []
    if CHECKPOINTS in disk.fields and run.checkpoint is not None and run.checkpoint.keep > 1:
        ways.append(f"lower checkpoint.keep (now {run.checkpoint.keep})")
    if OUTPUT in disk.fields or CHECKPOINTS in disk.fields:
        ways.append("make room, or name a larger volume or an object store (s3://, gs://)")
    if WORK in disk.fields:
        ways.append(storage.MORE_ROOM)
    return "; ".join(ways)


def _disk_of(disks: dict[int, Disk], path: Path | None, field: str) -> Disk | None:
    """The file system of a folder that may not exist yet, which `field` names."""
    if path is None:
        return None
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        device, usage = path.stat().st_dev, shutil.disk_usage(path)
    except OSError:
        return None  # whether it can be written is said elsewhere
    if usage.total == 0:
        return None
    disk = disks.setdefault(device, Disk(path, usage.total, usage.free))
    disk.fields.append(field)
    return disk


def _size(folder: Path) -> int:
    return sum((Path(place) / name).lstat().st_size for place, _, names in os.walk(folder) for name in names)

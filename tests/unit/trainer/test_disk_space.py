"""Whether checkpoints and artifact find room: what is counted, what is refused, and what is tried again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from finetune_fit.runs import Disk as Needs
from finetune_trainer import disk_space, runfile
from finetune_trainer.failures import BadConfig, StorageFailed
from tests import tiny

MIB = 2**20
NEEDS = Needs(artifact=100 * MIB, checkpoint=300 * MIB, checkpoints=900 * MIB, model=0)


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def make_run(tmp_path: Path, **parts: Any) -> runfile.RunFile:
    document = tiny.run_document(tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "out", **parts)
    return runfile.RunFile.model_validate(document)


def with_checkpoints(tmp_path: Path, *, uri: str | None = None, **parts: Any) -> runfile.RunFile:
    schedule = {"uri": uri or f"file://{tmp_path}/ck", "everySteps": 1, "keep": 2, **parts}
    return make_run(tmp_path, checkpoint=schedule)


def limit(monkeypatch: pytest.MonkeyPatch, free: int, *, total: int = 10_000 * MIB) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(total, total - free, free))


def check(run: runfile.RunFile, tmp_path: Path, *, rows: int = 40) -> None:
    disk_space.check(run, NEEDS, rows=rows, work=tmp_path)


# While training: three checkpoints, and the copy of one. At the end: two, and the artifact twice.
PEAK = 1200 * MIB


def test_too_little_room_is_refused_with_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, PEAK - 1)
    with pytest.raises(BadConfig) as caught:
        check(with_checkpoints(tmp_path), tmp_path)
    assert str(caught.value) == (
        "output.uri, checkpoint.uri, the work folder (TMPDIR): 3 checkpoints of 0.3 GiB, an artifact of 100 MiB, what "
        f"is written before it is copied need 1.2 GiB at once, and the disk of {tmp_path} has 1.2 GiB free of 9.8 GiB; "
        "lower checkpoint.keep (now 2); make room, or name a larger volume or an object store (s3://, gs://); "
        "give the pod more ephemeral storage, or set TMPDIR to a larger volume"
    )


@pytest.mark.parametrize(("free", "warned"), [(PEAK, True), (PEAK + PEAK // 8, False)])
def test_a_tight_disk_is_a_warning(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    free: int,
    warned: bool,
) -> None:
    limit(monkeypatch, free)
    check(with_checkpoints(tmp_path), tmp_path)
    assert ("warning: disk: output.uri, checkpoint.uri" in capsys.readouterr().out) == warned


def test_without_checkpoints_only_the_artifact_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, 200 * MIB)
    check(make_run(tmp_path), tmp_path)
    limit(monkeypatch, 200 * MIB - 1)
    with pytest.raises(BadConfig, match=r"^output.uri, the work folder \(TMPDIR\): an artifact of 100 MiB"):
        check(make_run(tmp_path), tmp_path)


def test_what_an_earlier_attempt_saved_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ck/checkpoint-1").mkdir(parents=True)
    with (tmp_path / "ck/checkpoint-1/optimizer.pt").open("wb") as file:
        file.truncate(300 * MIB)
    limit(monkeypatch, PEAK - 300 * MIB)
    check(with_checkpoints(tmp_path), tmp_path)
    limit(monkeypatch, PEAK - 300 * MIB - 1)
    with pytest.raises(BadConfig):
        check(with_checkpoints(tmp_path), tmp_path)


def test_a_disk_that_filled_up_since_the_job_began_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = with_checkpoints(tmp_path)
    later = run.model_copy(update={"job": run.job.model_copy(update={"attempt": 2})})
    limit(monkeypatch, PEAK - 1)
    with pytest.raises(StorageFailed, match=r"lower checkpoint.keep"):
        check(later, tmp_path)
    limit(monkeypatch, PEAK - 1, total=PEAK - 1)
    with pytest.raises(BadConfig):
        check(later, tmp_path)


def test_object_stores_have_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then only what is copied from the work folder lies on a disk."""
    run = with_checkpoints(tmp_path, uri="s3://bucket/ck")
    run = run.model_copy(update={"output": run.output.model_copy(update={"uri": "s3://bucket/out"})})
    limit(monkeypatch, 300 * MIB)
    check(run, tmp_path)
    limit(monkeypatch, 300 * MIB - 1)
    with pytest.raises(BadConfig, match=r"^the work folder \(TMPDIR\): .*; give the pod more ephemeral"):
        check(run, tmp_path)


def test_a_file_system_that_does_not_tell_its_size_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, 0, total=0)
    check(with_checkpoints(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("schedule", "hyper", "count"),
    [
        ({"everySteps": 1, "keep": 2}, {"maxSteps": 100}, 3),
        ({"everySteps": 50, "keep": 2}, {"maxSteps": 100}, 2),
        ({"everySteps": 500, "keep": 2}, {"maxSteps": 100}, 1),
        ({"everyMinutes": 5, "keep": 4}, {"maxSteps": 100}, 1),
        ({"everySteps": 5, "keep": 4}, {"epochs": 2}, 2),
        ({"everySteps": 1, "keep": 4}, {"epochs": 2, "packing": True}, 1),
    ],
)
def test_only_checkpoints_that_will_be_are_counted(
    tmp_path: Path, schedule: dict[str, Any], hyper: dict[str, Any], count: int
) -> None:
    run = make_run(
        tmp_path,
        checkpoint={"uri": f"file://{tmp_path}/ck", **schedule},
        hyperparameters={"globalBatchSize": 8, "maxLength": 64, **hyper},
    )
    assert disk_space.count_checkpoints(run, rows=40) == count

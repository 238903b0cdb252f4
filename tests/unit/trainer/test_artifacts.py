"""The artifact's folder: claimed, committed with the manifest last, verified, never taken from someone else."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from finetune_trainer import artifacts, owners, storage
from finetune_trainer.failures import BadConfig, TrainerError
from finetune_trainer.runfile import Job
from tests.buckets import open_bucket, serve_bucket

JOB = Job(namespace="team", name="tune", uid="uid-1", attempt=1)
OTHER = Job(namespace="team", name="other", uid="uid-2", attempt=1)
FACTS = {
    "job": JOB.model_dump(),
    "baseModel": {"uri": "file:///base"},
    "rank": 8,
    "metrics": {"step": 3, "loss": 1.5},
    "hyperparameters": {},
}


@pytest.fixture
def folder(tmp_path: Path) -> storage.Folder:
    return storage.open_folder(f"file://{tmp_path}/deep/out")


@pytest.fixture
def work(tmp_path: Path) -> Path:
    work = tmp_path / "work"
    (work / "sub").mkdir(parents=True)
    (work / "adapter_model.safetensors").write_bytes(b"weights")
    (work / "sub" / "notes.txt").write_text("notes")
    return work


def commit(folder: storage.Folder, work: Path) -> artifacts.Artifact:
    assert artifacts.claim_folder(folder, JOB) is None
    return artifacts.commit(folder, work, FACTS, JOB)


def test_commit_lists_every_file_with_its_hash_and_size(
    folder: storage.Folder, work: Path, tmp_path: Path
) -> None:
    artifact = commit(folder, work)
    content = (tmp_path / "deep/out/manifest.json").read_bytes()
    files = {file["path"]: file for file in json.loads(content)["files"]}
    assert files["adapter_model.safetensors"]["sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert files["sub/notes.txt"]["size"] == 5
    assert artifact.digest == f"sha256:{hashlib.sha256(content).hexdigest()}"
    assert artifact.size_bytes == 12 + len(content)
    assert folder.names() == ["adapter_model.safetensors", "manifest.json", "sub/notes.txt"]


def test_a_mark_that_cannot_be_removed_fails_nothing_that_is_committed(
    folder: storage.Folder, work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Keeping(storage.LocalFolder):
        """As a bucket whose credentials may write, and not delete."""

        def remove(self, name: str) -> None:
            raise PermissionError(name)

    keeping = Keeping(folder.uri, tmp_path / "deep/out")
    artifact = commit(keeping, work)
    assert owners.MARK in keeping.names()
    assert f"{owners.MARK} could not be removed" in capsys.readouterr().out
    assert artifacts.claim_folder(keeping, JOB.model_copy(update={"attempt": 2})) == artifact
    with pytest.raises(BadConfig, match="already holds the artifact of job team/tune"):
        artifacts.claim_folder(keeping, OTHER)


def test_the_same_job_finds_its_committed_artifact_again(folder: storage.Folder, work: Path) -> None:
    artifact = commit(folder, work)
    assert artifacts.claim_folder(folder, JOB) == artifact
    assert artifacts.inspect(folder, JOB) == artifact


def test_another_jobs_artifact_is_never_overwritten(folder: storage.Folder, work: Path) -> None:
    commit(folder, work)
    with pytest.raises(
        BadConfig, match=r"already holds the artifact of job team/tune; .* choose another output.uri"
    ):
        artifacts.claim_folder(folder, OTHER)


def test_a_folder_in_use_by_another_job_is_refused(folder: storage.Folder) -> None:
    artifacts.claim_folder(folder, JOB)
    with pytest.raises(BadConfig, match="belongs to job team/tune"):
        artifacts.claim_folder(folder, OTHER)


def test_foreign_files_are_refused_and_stay(tmp_path: Path, folder: storage.Folder) -> None:
    (tmp_path / "deep/out").mkdir(parents=True)
    (tmp_path / "deep/out/thesis.doc").write_text("ten years")
    with pytest.raises(BadConfig, match=r"is not empty \(thesis.doc\) and was not made by this job"):
        artifacts.claim_folder(folder, JOB)
    assert (tmp_path / "deep/out/thesis.doc").read_text() == "ten years"


def test_a_folder_that_was_made_in_a_buckets_console_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    with serve_bucket("data") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        for name in ("out/", "out/deep/"):
            open_bucket(environment).call_s3("put_object", Bucket="data", Key=name, Body=b"")
        folder = storage.open_folder("s3://data/out")
        assert artifacts.claim_folder(folder, JOB) is None
        assert folder.names() == [owners.MARK]


def test_a_claim_that_was_killed_while_it_was_written_holds_nobody_up(
    tmp_path: Path, folder: storage.Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", kill)
        with pytest.raises(Killed):
            artifacts.claim_folder(folder, JOB)
    assert folder.names() == ["..finetune-job.json.part"]
    artifacts.claim_folder(folder, JOB.model_copy(update={"attempt": 2}))
    assert folder.names() == [owners.MARK]


def test_a_manifest_that_is_not_ours_is_refused(tmp_path: Path, folder: storage.Folder) -> None:
    (tmp_path / "deep/out").mkdir(parents=True)
    (tmp_path / "deep/out/manifest.json").write_text('{"name": "a browser extension"}')
    with pytest.raises(BadConfig, match="is not ours"):
        artifacts.claim_folder(folder, JOB)


def test_leftovers_of_the_jobs_earlier_start_are_removed(folder: storage.Folder, work: Path) -> None:
    artifacts.claim_folder(folder, JOB)
    folder.put(work / "adapter_model.safetensors", "half.safetensors")
    assert artifacts.claim_folder(folder, JOB) is None
    assert folder.names() == [owners.MARK]


def test_a_failed_job_leaves_nothing_behind(tmp_path: Path, folder: storage.Folder, work: Path) -> None:
    artifacts.claim_folder(folder, JOB)
    folder.put(work / "sub/notes.txt", "sub/notes.txt")
    artifacts.release_folder(folder, JOB)
    assert not (tmp_path / "deep/out").exists()


def test_release_never_touches_a_committed_artifact(folder: storage.Folder, work: Path) -> None:
    commit(folder, work)
    artifacts.release_folder(folder, JOB)
    artifacts.inspect(folder, JOB)


def test_commit_notices_that_another_job_took_the_folder(folder: storage.Folder, work: Path) -> None:
    artifacts.claim_folder(folder, JOB)
    folder.write(owners.MARK, json.dumps(OTHER.model_dump()).encode())
    with pytest.raises(BadConfig, match="belongs to job team/other"):
        artifacts.commit(folder, work, FACTS, JOB)
    assert folder.read(artifacts.MANIFEST) is None


@pytest.mark.parametrize(
    ("change", "text"), [("edit", "differs from manifest.json"), ("delete", "is missing")]
)
def test_inspect_finds_damage(
    tmp_path: Path, folder: storage.Folder, work: Path, change: str, text: str
) -> None:
    commit(folder, work)
    victim = tmp_path / "deep/out/sub/notes.txt"
    victim.write_text("nOtes") if change == "edit" else victim.unlink()
    with pytest.raises(TrainerError, match=text):
        artifacts.inspect(folder, JOB)


def test_inspect_of_nothing_says_so(folder: storage.Folder) -> None:
    with pytest.raises(TrainerError, match=r"holds no manifest.json"):
        artifacts.inspect(folder, JOB)


def test_an_output_below_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for uri in (f"file://{tmp_path}/file", f"file://{tmp_path}/file/out", "file:///proc/finetune"):
        with pytest.raises(BadConfig, match=r"output.uri .* cannot be written \("):
            artifacts.claim_folder(storage.open_folder(uri), JOB)

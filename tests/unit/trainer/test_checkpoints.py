"""Checkpoints: whole or not at all, this job's or nobody's, the newest that can be trusted, and never too many."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_trainer import checkpoints, signals, storage
from finetune_trainer.checkpoints import COMPLETE, CORRUPT, MANIFEST, Corrupt, Store
from finetune_trainer.failures import BadConfig, Preempted, StorageFailed
from finetune_trainer.runfile import Job

JOB = Job(namespace="team", name="tune", uid="uid-1", attempt=1)
DIGEST = "sha256:settings"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "deep/out-checkpoints"


@pytest.fixture
def store(root: Path) -> Store:
    return make_store(root)


def make_store(root: Path, job: Job = JOB) -> Store:
    store = Store(storage.open_folder(f"file://{root}"), job)
    store.claim()
    return store


def save(store: Store, *steps: int, digest: str = DIGEST, keep: int | None = None) -> None:
    for step in steps:
        work = Path(store.folder.uri.removeprefix("file://")).parent / f"work-{step}"
        work.mkdir(exist_ok=True)
        (work / "optimizer.pt").write_bytes(f"moments of step {step}".encode())
        (work / "weights").write_bytes(f"weights of step {step}".encode() * 1000)
        files = {"optimizer.pt": work / "optimizer.pt", "best/weights": work / "weights"}
        saved = store.save(files, step=step, config_digest=digest, facts={"trainSeconds": 1.5})
        assert saved.to_report() == {"step": step, "uri": f"{store.folder.uri}/checkpoint-{step}"}
        if keep is not None:
            store.prune(step, keep=keep)


def found(store: Store, digest: str = DIGEST) -> list[int]:
    return [checkpoint.step for checkpoint in store.find(digest)]


def test_half_of_a_checkpoint_takes_no_whole_ones_place(store: Store, root: Path) -> None:
    save(store, 5, 10)
    for step in (7, 12):  # killed in mid save
        (root / f"checkpoint-{step}").mkdir()
        (root / f"checkpoint-{step}" / "optimizer.pt").write_bytes(b"half")
    store.prune(12, keep=2)
    assert found(store) == [10, 5]
    assert not (root / "checkpoint-12").exists()


def test_a_checkpoint_says_what_it_holds_and_complete_vouches_for_it(store: Store, root: Path) -> None:
    save(store, 7)
    folder = root / "checkpoint-7"
    content = (folder / MANIFEST).read_bytes()
    manifest = json.loads(content)
    assert manifest["step"] == 7
    assert manifest["job"]["uid"] == "uid-1"
    assert manifest["configDigest"] == DIGEST
    assert manifest["trainSeconds"] == 1.5
    files = {file["path"]: file for file in manifest["files"]}
    assert files["best/weights"]["sha256"] == hashlib.sha256(b"weights of step 7" * 1000).hexdigest()
    assert files["optimizer.pt"]["size"] == len(b"moments of step 7")
    assert (folder / COMPLETE).read_text() == f"sha256:{hashlib.sha256(content).hexdigest()}"
    [checkpoint] = store.find(DIGEST)
    assert checkpoint.to_report() == {"step": 7, "uri": f"file://{folder}"}


def test_what_was_saved_is_what_is_fetched(store: Store, tmp_path: Path) -> None:
    save(store, 7)
    [checkpoint] = store.find(DIGEST)
    store.fetch(checkpoint, tmp_path / "local")
    assert (tmp_path / "local/optimizer.pt").read_bytes() == b"moments of step 7"
    assert (tmp_path / "local/best/weights").read_bytes() == b"weights of step 7" * 1000
    store.verify(checkpoint)


def test_the_newest_comes_first_and_the_old_ones_go(store: Store, root: Path) -> None:
    save(store, 5, 10, 100, keep=2)
    assert found(store) == [100, 10]
    assert not (root / "checkpoint-5").exists()


def test_half_a_write_is_never_found_and_removed_by_the_next_attempt(store: Store, root: Path) -> None:
    save(store, 5, 10)
    (root / "checkpoint-10" / COMPLETE).unlink()
    assert found(store) == [5]
    later = make_store(root, JOB.model_copy(update={"attempt": 2}))
    assert not (root / "checkpoint-10").exists()
    assert found(later) == [5]


@pytest.mark.parametrize("victim", ["optimizer.pt", "best/weights"])
@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_damage_is_found_marked_and_not_read_again(
    store: Store, root: Path, tmp_path: Path, victim: str, damage: str
) -> None:
    save(store, 5, 10)
    path = root / "checkpoint-10" / victim
    content = path.read_bytes()
    if damage == "flip":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    newest = next(store.find(DIGEST))
    with pytest.raises(Corrupt, match="is missing" if damage == "delete" else "differs from manifest.json"):
        store.fetch(newest, tmp_path / "local")
    with pytest.raises(Corrupt):
        store.verify(newest)
    store.mark_corrupt(10, "for the test")
    assert found(store) == [5]
    assert (root / "checkpoint-10" / CORRUPT).read_text() == "for the test\n"
    # Kept to be looked at, also by the next attempt, until newer ones have replaced it.
    assert (root / "checkpoint-10/best").is_dir()
    later = make_store(root, JOB.model_copy(update={"attempt": 2}))
    assert (root / "checkpoint-10" / CORRUPT).exists()
    save(later, 6, keep=2)
    assert found(later) == [6, 5]
    assert not (root / "checkpoint-10").exists()


@pytest.mark.parametrize("name", [MANIFEST, COMPLETE, "optimizer.pt"])
def test_a_transfer_that_is_cut_short_once_costs_no_checkpoint(root: Path, tmp_path: Path, name: str) -> None:
    class Cutting(storage.LocalFolder):
        cuts = 0

        def read(self, asked: str) -> bytes | None:
            content = super().read(asked)
            return content[:10] if content and self._is_cut(asked) else content

        def chunks(self, asked: str) -> Iterator[bytes]:
            return iter([b"moments"]) if self._is_cut(asked) else super().chunks(asked)

        def _is_cut(self, asked: str) -> bool:
            self.cuts += asked == f"checkpoint-10/{name}"
            return asked == f"checkpoint-10/{name}" and self.cuts == 1

    save(make_store(root), 5, 10)
    store = Store(Cutting(f"file://{root}", root), JOB)
    newest = next(store.find(DIGEST))
    store.fetch(newest, tmp_path / "fetched")
    assert newest.step == 10
    assert not (root / "checkpoint-10" / CORRUPT).exists()


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"not json", b'{"step": 10, "job": {"uid": "uid-1"}, "configDigest": "x"}']
)
@pytest.mark.parametrize("vouched", [True, False])
def test_a_broken_manifest_is_marked_on_the_way(
    store: Store, root: Path, content: bytes, vouched: bool
) -> None:
    save(store, 5, 10)
    (root / "checkpoint-10" / MANIFEST).write_bytes(content)
    if vouched:
        (root / "checkpoint-10" / COMPLETE).write_text(f"sha256:{hashlib.sha256(content).hexdigest()}")
    assert found(store) == [5]
    assert (root / "checkpoint-10" / CORRUPT).exists()


def test_a_manifest_without_a_files_digest_is_marked(store: Store, root: Path) -> None:
    save(store, 5, 10)
    manifest = json.loads((root / "checkpoint-10" / MANIFEST).read_text())
    del manifest["files"][0]["sha256"]
    content = json.dumps(manifest).encode()
    (root / "checkpoint-10" / MANIFEST).write_bytes(content)
    (root / "checkpoint-10" / COMPLETE).write_text(f"sha256:{hashlib.sha256(content).hexdigest()}")
    assert found(store) == [5]


@pytest.mark.parametrize("name", ["../../stolen", "/tmp/stolen"])
def test_a_manifest_cannot_point_outside(store: Store, root: Path, name: str) -> None:
    save(store, 5)
    manifest = json.loads((root / "checkpoint-5" / MANIFEST).read_text())
    manifest["files"][0]["path"] = name
    content = json.dumps(manifest).encode()
    (root / "checkpoint-5" / MANIFEST).write_bytes(content)
    (root / "checkpoint-5" / COMPLETE).write_text(f"sha256:{hashlib.sha256(content).hexdigest()}")
    assert found(store) == []


def test_other_settings_or_data_begin_anew(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    save(store, 5)
    assert found(store, "sha256:other") == []
    assert "checkpoint-5 was made with other settings or data: not used" in capsys.readouterr().out


def test_a_job_made_again_under_its_name_takes_over_the_folder_but_nothing_in_it(
    store: Store, root: Path
) -> None:
    save(store, 5, 50)
    again = make_store(root, JOB.model_copy(update={"uid": "uid-2"}))
    assert found(again) == []
    assert (root / "checkpoint-50").exists()  # until there is something newer, the old job's work stays
    save(again, 5, keep=2)
    assert found(again) == [5]
    assert not (root / "checkpoint-50").exists()


def test_another_jobs_checkpoints_are_refused(store: Store, root: Path) -> None:
    save(store, 5)
    with pytest.raises(BadConfig, match=r"checkpoint.uri .* belongs to job team/tune; choose another"):
        make_store(root, Job(namespace="team", name="other", uid="uid-2", attempt=1))
    assert found(store) == [5]


def test_checkpoints_that_no_job_made_are_refused(root: Path) -> None:
    (root / "checkpoint-500").mkdir(parents=True)
    (root / "checkpoint-500/pytorch_model.bin").write_bytes(b"years of work")
    with pytest.raises(BadConfig, match="that no job made"):
        make_store(root)
    assert (root / "checkpoint-500/pytorch_model.bin").exists()


def test_an_attempt_that_was_succeeded_ends(store: Store, root: Path) -> None:
    later = make_store(root, JOB.model_copy(update={"attempt": 2}))
    with pytest.raises(Preempted, match="attempt 2 has taken over"):
        save(store, 5)
    with pytest.raises(Preempted, match="attempt 2 has taken over"):
        store.claim()
    save(later, 6)
    assert found(later) == [6]


def test_steps_of_a_course_that_was_given_up_go_with_the_next_save(store: Store) -> None:
    save(store, 50)  # say, with resume: Never, the next attempt began at 0
    save(store, 10, keep=2)
    assert found(store) == [10]


def test_an_attempt_may_begin_while_another_one_writes(
    store: Store, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The earlier one's file comes in the moment between the removal of another and that of its folder."""
    unlink = Path.unlink

    def write_behind(file: Path, **options: bool) -> None:
        unlink(file, **options)
        (file.parent / "optimizer.pt").write_bytes(b"of the earlier attempt")

    (root / "checkpoint-5").mkdir()
    (root / "checkpoint-5/adapter_model.safetensors").write_bytes(b"half")
    monkeypatch.setattr(Path, "unlink", write_behind)
    make_store(root, JOB.model_copy(update={"attempt": 2}))
    assert (root / "checkpoint-5/optimizer.pt").exists()


def test_the_same_step_may_be_saved_again(store: Store, root: Path) -> None:
    save(store, 5)
    (root / "checkpoint-5/old.bin").write_bytes(b"of the earlier write")
    save(store, 5)
    assert found(store) == [5]
    assert not (root / "checkpoint-5/old.bin").exists()


def test_clear_leaves_nothing_and_no_stranger_is_touched(store: Store, root: Path) -> None:
    save(store, 5, 10)
    (root / "notes.txt").write_text("mine")
    (root / "lost+found").mkdir()
    store.claim()
    store.clear()
    assert {path.name for path in root.iterdir()} == {"lost+found", "notes.txt"}
    (root / "lost+found").rmdir()
    (root / "notes.txt").unlink()
    store.claim()
    save(store, 5)
    store.clear()
    assert not root.exists()


def test_a_folder_that_cannot_be_written_is_the_users_to_change(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file/deep", Path("/proc/finetune")):
        with pytest.raises(BadConfig, match=r"checkpoint.uri .* cannot be written"):
            make_store(place)


def test_a_transfer_is_tried_again_and_then_is_storage_trouble(
    store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PAUSES", (0.01, 0.01))
    (tmp_path / "weights").write_bytes(b"x")
    # A folder stands where the file should be written: the same error at each try.
    (tmp_path / "deep/out-checkpoints/checkpoint-5/weights/in/the/way").mkdir(parents=True)
    with pytest.raises(StorageFailed, match=r"checkpoint-5 could not be saved \(Is a directory\)"):
        store.save({"weights": tmp_path / "weights"}, step=5, config_digest=DIGEST, facts={})
    assert capsys.readouterr().out.count("trying again in 0.01s") == 2
    assert found(store) == []


def test_an_outage_of_two_minutes_costs_no_attempt(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def pause(seconds: float) -> None:
        nonlocal now
        now += seconds

    def read() -> float:
        if now < 100:
            raise TimeoutError
        return now

    monkeypatch.setattr(signals, "pause", pause)
    assert storage.persist(read, what="it") <= 120


def test_what_is_not_storage_passes_through_at_once() -> None:
    calls = []

    def break_down() -> None:
        calls.append(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        storage.persist(break_down, what="it")
    assert len(calls) == 1


def test_the_order_of_a_save_and_of_a_removal(tmp_path: Path) -> None:
    """`complete` is written last and removed first: a process may die between any two of these."""
    order: list[str] = []

    class Watched(storage.LocalFolder):
        def put(self, source: Path, name: str) -> None:
            order.append(f"put {name}")
            super().put(source, name)

        def write(self, name: str, content: bytes) -> None:
            order.append(f"write {name}")
            super().write(name, content)

        def remove(self, name: str) -> None:
            order.append(f"remove {name}")
            super().remove(name)

    folder = Watched(f"file://{tmp_path}/ck", tmp_path / "ck")
    store = checkpoints.Store(folder, JOB)
    store.claim()
    order.clear()
    save(store, 5)
    assert order[-2:] == ["write checkpoint-5/manifest.json", "write checkpoint-5/complete"]
    order.clear()
    store.clear()
    assert order[0] == "remove checkpoint-5/complete"

"""One owner at a time: attempts that do not know of one another, and jobs that were deleted and created again."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer import artifacts, folders, owners, storage
from finetune_trainer.checkpoints import Store
from finetune_trainer.failures import BadConfig, ModelNotFound, Preempted, StorageFailed, TrainerError
from finetune_trainer.owners import Owner
from finetune_trainer.runfile import Job
from tests.buckets import open_bucket, serve_bucket

FIRST = Job(namespace="team", name="tune", uid="uid-1", attempt=1)
SECOND = FIRST.model_copy(update={"attempt": 2})
AGAIN = FIRST.model_copy(update={"uid": "uid-2"})
STRANGER = Job(namespace="team", name="other", uid="uid-3", attempt=1)


@pytest.fixture
def folder(tmp_path: Path) -> storage.Folder:
    return storage.open_folder(f"file://{tmp_path}/out")


def commit(folder: storage.Folder, job: Job, tmp_path: Path, *, weights: str = "") -> artifacts.Artifact:
    """Commits files that tell whose they are."""
    work = tmp_path / f"work-{job.uid}-{job.attempt}"
    work.mkdir(exist_ok=True)
    for name in ("adapter_model.safetensors", "tokenizer.json"):
        (work / name).write_text(f"{name} of {weights or job}")
    facts: dict[str, Any] = {
        "job": job.model_dump(),
        "baseModel": {"uri": "file:///base"},
        "metrics": {"step": 3, "loss": 1.5},
        "hyperparameters": {},
    }
    return artifacts.commit(folder, work, facts, job)


def save(store: Store, step: int, tmp_path: Path) -> None:
    file = tmp_path / "optimizer.pt"
    file.write_text(f"moments of step {step}")
    store.save({"optimizer.pt": file}, step=step, config_digest="d", facts={})


def found(store: Store) -> list[int]:
    return [checkpoint.step for checkpoint in store.find("d")]


def mark(folder: storage.Folder) -> Any:
    return json.loads(folder.read(owners.MARK) or b"null")


# ---------------------------------------------------------------- two attempts, one output.uri


def test_an_attempt_that_was_succeeded_leaves_the_later_ones_claim_and_files(
    folder: storage.Folder, tmp_path: Path
) -> None:
    artifacts.claim_folder(folder, FIRST)
    artifacts.claim_folder(folder, SECOND)
    folder.write("history.jsonl", b"of the second")
    with pytest.raises(Preempted, match="attempt 2 has taken over"):
        commit(folder, FIRST, tmp_path)
    artifacts.release_folder(folder, FIRST)
    assert mark(folder)["attempt"] == 2
    assert folder.names() == [owners.MARK, "history.jsonl"]
    artifact = commit(folder, SECOND, tmp_path)
    assert artifacts.inspect(folder, SECOND) == artifact
    assert owners.MARK not in folder.names()


def test_an_attempt_that_begins_late_does_not_take_over(folder: storage.Folder, tmp_path: Path) -> None:
    artifacts.claim_folder(folder, SECOND)
    folder.write("half", b"of the second")
    with pytest.raises(Preempted, match="attempt 2 has taken over"):
        artifacts.claim_folder(folder, FIRST)
    assert folder.names() == [owners.MARK, "half"]


@pytest.mark.parametrize(("quick", "slow"), [(FIRST, SECOND), (SECOND, FIRST)])
def test_the_attempt_that_commits_second_takes_the_artifact_of_the_first(
    folder: storage.Folder, tmp_path: Path, quick: Job, slow: Job
) -> None:
    artifacts.claim_folder(folder, quick)
    artifact = commit(folder, quick, tmp_path)
    assert artifacts.claim_folder(folder, slow) == artifact
    assert commit(folder, slow, tmp_path) == artifact
    artifacts.release_folder(folder, slow)
    assert artifacts.inspect(folder, slow) == artifact


class Racing(storage.LocalFolder):
    """Lets another attempt act right after a file was put or written."""

    after: Any = None

    def put(self, source: Path, name: str) -> None:
        super().put(source, name)
        self._act()

    def write(self, name: str, content: bytes) -> None:
        super().write(name, content)
        self._act()

    def _act(self) -> None:
        act, self.after = self.after, None
        if act is not None:
            act()


@pytest.fixture
def racing(tmp_path: Path) -> Racing:
    return Racing(f"file://{tmp_path}/out", tmp_path / "out")


def test_a_commit_stops_at_the_file_at_which_a_later_attempt_begins(racing: Racing, tmp_path: Path) -> None:
    artifacts.claim_folder(racing, FIRST)
    racing.after = lambda: artifacts.claim_folder(racing, SECOND)
    with pytest.raises(Preempted, match="attempt 2 has taken over"):
        commit(racing, FIRST, tmp_path)
    assert racing.names() == [owners.MARK]
    artifact = commit(racing, SECOND, tmp_path)
    assert artifacts.inspect(racing, SECOND) == artifact


def test_a_claim_finds_what_was_committed_while_it_was_made(racing: Racing, tmp_path: Path) -> None:
    artifacts.claim_folder(racing, FIRST)
    other = storage.open_folder(racing.uri)
    committed: list[artifacts.Artifact] = []

    def commit_meanwhile() -> None:
        owners.write(other, FIRST)  # its mark came last
        committed.append(commit(other, FIRST, tmp_path))

    racing.after = commit_meanwhile
    assert artifacts.claim_folder(racing, SECOND) == committed[0]
    assert artifacts.inspect(racing, SECOND) == committed[0]


def test_a_manifest_without_its_files_is_replaced_by_the_owner_alone(
    folder: storage.Folder, tmp_path: Path
) -> None:
    artifacts.claim_folder(folder, FIRST)
    commit(folder, FIRST, tmp_path)
    folder.remove("tokenizer.json")
    with pytest.raises(TrainerError, match=r"tokenizer.json is missing"):
        commit(folder, SECOND, tmp_path)
    owners.write(folder, SECOND)
    artifact = commit(folder, SECOND, tmp_path)
    assert artifacts.inspect(folder, SECOND) == artifact


def test_the_later_of_two_that_began_at_once_goes_on(folder: storage.Folder, tmp_path: Path) -> None:
    artifacts.claim_folder(folder, SECOND)
    owners.write(folder, FIRST)  # read before, written after the second's
    assert owners.hold(folder, SECOND, field="output.uri")
    with pytest.raises(Preempted, match="attempt 2 has taken over"):
        owners.hold(folder, FIRST, field="output.uri")
    commit(folder, SECOND, tmp_path)
    assert artifacts.inspect(folder, SECOND)


def test_a_claim_that_was_taken_back_by_a_stopped_attempt_is_made_again(
    folder: storage.Folder, tmp_path: Path
) -> None:
    artifacts.claim_folder(folder, SECOND)
    folder.remove(owners.MARK)
    artifact = commit(folder, SECOND, tmp_path)
    assert artifacts.inspect(folder, SECOND) == artifact


# ---------------------------------------------------------------- created again on an explicit output.uri


def test_what_another_process_wrote_into_a_bucket_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_bucket("training") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        lost, successor = storage.open_folder("s3://training/out"), storage.open_folder("s3://training/out")
        monkeypatch.setattr(successor, "filesystem", open_bucket(environment))  # as in another process
        artifacts.claim_folder(lost, FIRST)
        artifacts.claim_folder(successor, SECOND)
        artifact = commit(successor, SECOND, tmp_path)
        assert commit(lost, FIRST, tmp_path) == artifact
        assert lost.read(owners.MARK) is None
        owners.write(successor, SECOND)
        with pytest.raises(Preempted, match="attempt 2 has taken over"):
            owners.hold(lost, FIRST, field="output.uri")


def test_a_job_created_again_takes_its_predecessors_folder_and_keeps_it(
    folder: storage.Folder, tmp_path: Path
) -> None:
    artifacts.claim_folder(folder, FIRST)
    folder.write("half", b"of the first")
    assert artifacts.claim_folder(folder, AGAIN) is None
    assert folder.names() == [owners.MARK]
    with pytest.raises(Preempted, match="job team/tune was created again and has taken over"):
        commit(folder, FIRST, tmp_path)
    artifacts.release_folder(folder, FIRST)
    artifact = commit(folder, AGAIN, tmp_path)
    assert artifacts.inspect(folder, AGAIN) == artifact


def test_what_a_predecessor_has_committed_is_never_overwritten(
    folder: storage.Folder, tmp_path: Path
) -> None:
    artifacts.claim_folder(folder, FIRST)
    artifact = commit(folder, FIRST, tmp_path)
    with pytest.raises(BadConfig, match="already holds the artifact of job team/tune"):
        artifacts.claim_folder(folder, AGAIN)
    with pytest.raises(BadConfig, match="already holds the artifact of job team/tune"):
        commit(folder, AGAIN, tmp_path)
    assert artifacts.inspect(folder, FIRST) == artifact


# ---------------------------------------------------------------- checkpoint.uri


@pytest.mark.parametrize(
    ("later", "text"), [(SECOND, "attempt 2 has taken over"), (AGAIN, "was created again and has taken over")]
)
def test_whoever_was_followed_neither_saves_nor_removes_checkpoints(
    folder: storage.Folder, tmp_path: Path, later: Job, text: str
) -> None:
    old, new = Store(folder, FIRST), Store(folder, later)
    old.claim()
    save(old, 5, tmp_path)
    new.claim()
    save(new, 50, tmp_path)
    with pytest.raises(Preempted, match=text):
        save(old, 10, tmp_path)
    with pytest.raises(Preempted, match=text):
        old.prune(5, keep=1)
    if later is SECOND:
        with pytest.raises(Preempted, match=text):
            old.claim()
        with pytest.raises(Preempted, match=text):
            old.clear()
    else:
        old.clear()
    assert found(new)[0] == 50
    save(new, 60, tmp_path)
    new.prune(60, keep=1)
    assert found(new) == [60]


def test_a_checkpoint_is_not_completed_after_another_attempt_removed_its_files(
    racing: Racing, tmp_path: Path
) -> None:
    old, new = Store(racing, FIRST), Store(racing, SECOND)
    old.claim()
    racing.after = new.claim
    with pytest.raises(Preempted, match="attempt 2 has taken over"):
        save(old, 5, tmp_path)
    assert found(new) == []


def test_a_removed_folder_is_marked_again_by_the_next_save(folder: storage.Folder, tmp_path: Path) -> None:
    store = Store(folder, FIRST)
    store.claim()
    folder.remove(owners.MARK)
    save(store, 5, tmp_path)
    assert mark(folder)["uid"] == "uid-1"
    assert found(store) == [5]


# ---------------------------------------------------------------- marks


@pytest.mark.parametrize(
    ("content", "owner"),
    [
        (None, Owner.NOBODY),
        (FIRST.model_dump_json(), Owner.EARLIER),
        (SECOND.model_dump_json(), Owner.OURS),
        (AGAIN.model_dump_json(), Owner.NAMESAKE),
        ('{"uid": "uid-1"}', Owner.EARLIER),
        ('{"uid": "uid-1", "attempt": "9"}', Owner.EARLIER),
    ],
)
def test_a_mark_says_who_it_is(folder: storage.Folder, content: str | None, owner: Owner) -> None:
    if content is not None:
        folder.write(owners.MARK, content.encode())
    assert owners.find(folder, SECOND, field="output.uri") is owner


@pytest.mark.parametrize("content", ["not json", "[]", "{}", STRANGER.model_dump_json()])
def test_a_strangers_mark_is_refused(folder: storage.Folder, content: str) -> None:
    folder.write(owners.MARK, content.encode())
    with pytest.raises(BadConfig, match=r"output.uri file://.* belongs to job"):
        owners.find(folder, SECOND, field="output.uri")


def test_trouble_with_the_mark_is_tried_again(
    folder: storage.Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifacts.claim_folder(folder, FIRST)

    def fail(*_: Any) -> bytes:
        raise TimeoutError("the store is slow")

    monkeypatch.setattr(storage, "PAUSES", (0.0,))
    monkeypatch.setattr(folder, "read", fail)
    with pytest.raises(StorageFailed, match=r"output.uri .* could not be written"):
        commit(folder, FIRST, tmp_path)


class _Refusing(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response(403)
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(b"<Error><Code>ExpiredToken</Code><Message>The token has expired</Message></Error>")

    def log_message(self, *_: Any) -> None:
        """pytest's output is enough."""


@pytest.fixture
def refusing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A store that lets nobody in."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    with HTTPServer(("127.0.0.1", 0), _Refusing) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "expired")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "expired")
        yield
        server.shutdown()


def claim_both(place: str, job: Job) -> list[TrainerError]:
    """How claims of place as output and as folder of checkpoints fail."""
    folder = storage.open_folder(place)
    with pytest.raises(TrainerError) as output:
        artifacts.claim_folder(folder, job)
    with pytest.raises(TrainerError) as checkpoint:
        Store(folder, job).claim()
    return [output.value, checkpoint.value]


@pytest.mark.parametrize(("job", "kind"), [(FIRST, BadConfig), (SECOND, StorageFailed)])
def test_a_refusal_is_the_users_at_first_and_may_pass_where_an_earlier_attempt_was_let_in(
    refusing: None, job: Job, kind: type[TrainerError]
) -> None:
    for field, failure in zip(("output", "checkpoint"), claim_both("s3://training/out", job), strict=True):
        assert type(failure) is kind
        assert str(failure).startswith(f"{field}.uri s3://training/out cannot be written (")
        assert "(PermissionError: The token has expired)" in str(failure)
        assert "the credentials in output.secretRef are valid" in str(failure)


def test_a_model_that_may_not_be_read_is_told_with_the_stores_reason(refusing: None, tmp_path: Path) -> None:
    with pytest.raises(
        ModelNotFound, match=r"^model\.uri: s3://models/tiny may not be read .*The token has expired"
    ):
        folders.fetch("s3://models/tiny", tmp_path, field="model.uri", credentials="in model.secretRef")


def test_a_store_that_is_not_there_is_told_with_the_field(monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    for name, value in {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_MAX_ATTEMPTS": "1",
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
    }.items():
        monkeypatch.setenv(name, value)
    for field, failure in zip(("output", "checkpoint"), claim_both("s3://training/out", FIRST), strict=True):
        assert isinstance(failure, StorageFailed)
        assert str(failure).startswith(f"{field}.uri s3://training/out cannot be written (EndpointConnection")

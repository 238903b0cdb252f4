"""`finetune-trainer inspect`: patient with storage, and never taken for the word of a run."""

from __future__ import annotations

import errno
import io
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_operator.core.reports import Report
from finetune_trainer import __main__ as command
from finetune_trainer import artifacts, lifecycle, signals, storage
from finetune_trainer.failures import Stopped
from finetune_trainer.progress import Reporter, State
from finetune_trainer.runfile import Job
from tests import tiny
from tests.unit.trainer.test_progress import Operator, serve

JOB = Job(namespace="default", name="tiny", uid="uid-1", attempt=1)
Inspect = Callable[[], int]


@pytest.fixture
def operator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Operator]:
    with serve() as server:
        monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", server.url)
        monkeypatch.setattr(storage, "PAUSES", (0.0, 0.0))
        yield server


@pytest.fixture
def inspect(tmp_path: Path) -> Inspect:
    file = tmp_path / "run.json"
    document = tiny.run_document(
        tmp_path / "model",
        tmp_path / "rows.jsonl",
        tmp_path / "out",
        checkpoint={"uri": f"file://{tmp_path}/ck", "everySteps": 5},
    )
    file.write_text(json.dumps(document))
    return lambda: lifecycle.run_job(file, lifecycle.inspect)


@pytest.fixture
def committed(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work/adapter_model.safetensors").write_bytes(b"weights")
    facts = {
        "job": JOB.model_dump(),
        "baseModel": {"uri": "file:///base"},
        "metrics": {"step": 3, "loss": 1.5},
        "hyperparameters": {},
    }
    folder = storage.open_folder(f"file://{tmp_path}/out")
    artifacts.claim_folder(folder, JOB)
    artifacts.commit(folder, tmp_path / "work", facts, JOB)


class Flaky:
    """A method of folders that fails a few times before it works."""

    def __init__(self, method: Callable[..., Any], times: int) -> None:
        self.method, self.left = method, times

    def __get__(self, folder: Any, kind: Any) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            if self.left > 0:
                self.left -= 1
                raise TimeoutError("the store is slow")
            return self.method(folder, *arguments)

        return call


def last_report(operator: Operator) -> Report:
    assert all(body["finetune"]["inspection"] is True for body in operator.bodies), operator.bodies
    return Report.model_validate(operator.bodies[-1])


@pytest.mark.parametrize("method", ["read", "chunks"])
@pytest.mark.usefixtures("committed")
def test_a_store_that_fails_for_a_moment_is_asked_again(
    operator: Operator, inspect: Inspect, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(storage.LocalFolder, method, Flaky(getattr(storage.LocalFolder, method), 2))
    assert inspect() == 0
    report = last_report(operator)
    assert report.result is not None
    assert report.result.artifact is not None


@pytest.mark.parametrize("method", ["read", "chunks"])
@pytest.mark.usefixtures("committed")
def test_a_store_that_does_not_answer_says_nothing_of_the_artifact(
    operator: Operator, inspect: Inspect, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(storage.LocalFolder, method, Flaky(getattr(storage.LocalFolder, method), 99))
    assert inspect() == 74
    report = last_report(operator)
    assert report.result is not None
    assert (report.result.error_class, report.result.exit_code) == ("Storage", 74)
    assert "output.uri" in report.result.message
    assert "could not be read (TimeoutError: the store is slow)" in report.result.message


def test_checkpoints_that_cannot_be_listed_are_storage_trouble_too(
    operator: Operator, inspect: Inspect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.LocalFolder, "names", Flaky(storage.LocalFolder.names, 99))
    assert inspect() == 74
    report = last_report(operator)
    assert report.result is not None
    assert "checkpoint.uri" in report.result.message


def test_an_empty_folder_is_no_storage_trouble(operator: Operator, inspect: Inspect) -> None:
    assert inspect() == 1
    report = last_report(operator)
    assert report.result is not None
    assert "nothing was committed there" in report.result.message


def test_a_run_file_that_cannot_be_read_is_reported_by_an_inspection_as_such(
    operator: Operator, tmp_path: Path
) -> None:
    assert lifecycle.run_job(tmp_path / "none.json", lifecycle.inspect) == 64
    assert last_report(operator).result is not None


@pytest.mark.parametrize("code", [0, 1])
def test_a_log_on_a_full_disk_changes_neither_report_nor_exit_code(
    operator: Operator,
    inspect: Inspect,
    committed: None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    code: int,
) -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    if code:
        (tmp_path / "out/manifest.json").unlink()
    monkeypatch.setattr(sys, "stdout", Full())
    monkeypatch.setattr(sys, "stderr", Full())
    assert inspect() == code
    assert last_report(operator).result is not None


def test_the_log_is_utf8_whatever_the_locale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(signals, "install", lambda: None)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert command.main(["inspect", "--run-file", "größe….json"]) == 64
    line = written.getvalue().decode()
    assert (
        "run file größe….json cannot be read" in json.loads(line.removeprefix("TRAINER_RESULT "))["message"]
    )


def test_a_stop_while_the_result_is_reported_changes_nothing(
    inspect: Inspect, committed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The operator may be away for minutes, in which the pod is deleted."""

    def stop(*_: Any, **__: Any) -> bool:
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(Reporter, "finish", stop)
    assert inspect() == 0


def test_a_run_does_not_say_that_it_inspects() -> None:
    assert "inspection" not in State(step=3).to_body()["finetune"]

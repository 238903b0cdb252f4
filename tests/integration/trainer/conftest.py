"""Runs of the trainer in this process, because each process of its own costs seconds of imports."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer import lifecycle, signals
from tests import tiny
from tests.buckets import serve_bucket

OLD_RULE, NEW_RULE = 0, 2  # shifts of the rule in tiny.answer; the second contradicts the first in every row


@dataclass(frozen=True)
class Ended:
    code: int
    result: dict[str, Any]  # of the TRAINER_RESULT line
    output: Path
    log: str

    @property
    def manifest(self) -> dict[str, Any]:
        return dict(json.loads((self.output / "manifest.json").read_text()))


Run = Callable[..., Ended]


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A bucket of a real S3 server on this machine."""
    with serve_bucket("training") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield "s3://training"


@pytest.fixture
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a run file (tiny.run_document with changes) to its end."""

    def run(
        model: Path, data: Path, /, *, name: str = "out", only_inspect: bool = False, **parts: Any
    ) -> Ended:
        output = tmp_path / name
        file = tmp_path / "run.json"
        file.write_text(json.dumps(tiny.run_document(model, data, output, **parts)))
        capfd.readouterr()
        handler = signal.getsignal(signal.SIGTERM)
        code = lifecycle.run_job(file, lifecycle.inspect if only_inspect else None)
        signal.signal(signal.SIGTERM, handler)  # its process would be over now
        log = capfd.readouterr().out
        last = log.strip().splitlines()[-1]
        assert last.startswith("TRAINER_RESULT "), log
        return Ended(code, json.loads(last.removeprefix("TRAINER_RESULT ")), output, log)

    return run


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_jsonl(tmp_path_factory.mktemp("data") / "chat.jsonl", tiny.chat_rows())


@pytest.fixture(scope="session")
def references() -> dict[str, Ended]:
    """Runs that `alone` has made, by what was run."""
    return {}


@pytest.fixture
def alone(run: Run, references: dict[str, Ended]) -> Run:
    """Runs a run file that nobody interrupts, once for all tests that compare with it. Its output is only read."""

    def alone(model: Path, data: Path, /, **parts: Any) -> Ended:
        key = json.dumps([str(model), str(data), parts], sort_keys=True)
        if key not in references:
            references[key] = run(model, data, name="alone", **parts)
        return references[key]

    return alone


@pytest.fixture
def handlers() -> Iterator[None]:
    """The signal handlers of the command; pytest's own come back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signals.install()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run_stopped(run: Run, handlers: None, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ended]:
    """Runs a run file as `run` does, with a SIGTERM in the step that is named first."""
    from finetune_trainer import train

    own = train._early_stopping

    def run_stopped(stop: Any, model: Path, data: Path, **parts: Any) -> Ended:
        with monkeypatch.context() as patch:
            patch.setattr(train, "_early_stopping", lambda run: [*own(run), stop])
            return run(model, data, **parts)

    return run_stopped

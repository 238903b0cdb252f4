"""Runs of the trainer in this process, because each process of its own costs seconds of imports."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer import lifecycle
from tests import tiny

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
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a run file (tiny.run_document with changes) to its end."""

    def run(
        model: Path, data: Path, /, *, name: str = "out", only_inspect: bool = False, **parts: Any
    ) -> Ended:
        output = tmp_path / name
        file = tmp_path / "run.json"
        file.write_text(json.dumps(tiny.run_document(model, data, output, **parts)))
        capfd.readouterr()
        code = lifecycle.run_job(file, only_inspect=only_inspect)
        log = capfd.readouterr().out
        last = log.strip().splitlines()[-1]
        assert last.startswith("TRAINER_RESULT "), log
        return Ended(code, json.loads(last.removeprefix("TRAINER_RESULT ")), output, log)

    return run


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_jsonl(tmp_path_factory.mktemp("data") / "chat.jsonl", tiny.chat_rows())


@pytest.fixture(scope="session")
def taught(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that knows the old rule: the artifact of a Full run, 40 of 40 answers seen in training."""
    folder = tmp_path_factory.mktemp("taught")
    data = tiny.write_jsonl(folder / "old.jsonl", tiny.chat_rows(shift=OLD_RULE), times=4)
    document = tiny.run_document(
        tiny_model,
        data,
        folder / "out",
        method={"type": "Full"},
        dataset={"sources": [{"uri": f"file://{data}"}], "split": {"eval": 0, "seed": 1}},
        hyperparameters={
            "maxSteps": 300,
            "globalBatchSize": 16,
            "microBatchSize": 16,
            "maxLength": 64,
            "learningRate": 3e-3,
        },
    )
    (folder / "run.json").write_text(json.dumps(document))
    assert lifecycle.run_job(folder / "run.json") == 0
    return folder / "out"

"""Disk that training takes: estimated before it begins, and never more than what is then written."""

from __future__ import annotations

import errno
import io
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_fit import runs
from finetune_trainer import disk_space, lifecycle
from tests import tiny
from tests.integration.trainer.conftest import Ended, Run
from tests.integration.trainer.stopping import StopAt, schedule

pytestmark = pytest.mark.integration

HYPER = {"maxSteps": 4, "globalBatchSize": 8, "maxLength": 64}
LORA = {"type": "LoRA", "lora": {"r": 8, "alpha": 16, "dropout": 0.0, "targetModules": ["all-linear"]}}


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
@pytest.mark.parametrize("method", [LORA, {"type": "Full"}], ids=["lora", "full"])
def test_the_estimate_is_close_and_refuses_nothing_that_fits(
    tiny_model: Path,
    chat_file: Path,
    run_stopped: Callable[..., Ended],
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: dict[str, Any],
    optimizer: str,
) -> None:
    seen: list[runs.Disk] = []
    check = disk_space.check

    def watch(run: Any, needs: runs.Disk, **facts: Any) -> None:
        seen.append(needs)
        check(run, needs, **facts)

    monkeypatch.setattr(disk_space, "check", watch)
    parts = {
        "method": method,
        "hyperparameters": {**HYPER, "optimizer": optimizer},
        "checkpoint": schedule(tmp_path / "ck"),
    }
    assert run_stopped(StopAt(2), tiny_model, chat_file, **parts).code == 75
    saved = size(tmp_path / "ck/checkpoint-2")
    ended = run(tiny_model, chat_file, **parts)
    assert ended.code == 0, ended.log
    # The tiny model's other files, its tokenizer among them, are less than the MiB that is counted for them.
    assert seen[0].checkpoint - runs.FEW <= saved <= 1.05 * seen[0].checkpoint
    assert seen[0].artifact - runs.FEW <= size(ended.output) <= 1.05 * seen[0].artifact


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_disk_that_is_too_small_is_refused_before_the_model_is_loaded(
    tiny_model: Path, chat_file: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        total, used, free = 4_000_000, 0, 4_000_000

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage())
    parts = {"hyperparameters": HYPER, "checkpoint": schedule(tmp_path / "ck", everySteps=1)}
    ended = run(tiny_model, chat_file, method={"type": "Full"}, **parts)
    assert (ended.code, ended.result["class"]) == (64, "BadConfig")
    assert "lower checkpoint.keep (now 2)" in ended.result["message"]
    assert "trained to step" not in ended.log
    assert not ended.output.exists()


def test_a_log_on_a_full_disk_does_not_end_training(
    tiny_model: Path, chat_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = tiny.run_document(
        tiny_model,
        chat_file,
        tmp_path / "out",
        hyperparameters={**HYPER, "maxSteps": 2},
        checkpoint=schedule(tmp_path / "ck", everySteps=1),
    )
    (tmp_path / "run.json").write_text(json.dumps(document))

    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    assert lifecycle.run_job(tmp_path / "run.json") == 0
    assert (tmp_path / "out/manifest.json").exists()

"""Runs that are stopped in the middle, and what must be the same after they went on."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from typing import Any

import transformers

from tests.integration.trainer.conftest import Ended

MEASURED = (
    "loss",
    "grad_norm",
    "learning_rate",
    "eval_loss",
    "reward",
    "accuracy",
)  # of history.jsonl; the rest are times


def job(attempt: int) -> dict[str, Any]:
    return {"namespace": "default", "name": "tiny", "uid": "uid-1", "attempt": attempt}


class StopAt(transformers.TrainerCallback):  # type: ignore[misc]
    """Sends this process a SIGTERM during a step: a real signal, at a place that no load of the machine moves."""

    def __init__(self, step: int, *, during: str = "step_end") -> None:
        self.step = step
        self.during = during

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.during == "substep" and state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.during == "step_end" and state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.during == "evaluation" and state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def schedule(folder: Path | str, **parts: Any) -> dict[str, Any]:
    uri = folder if isinstance(folder, str) else f"file://{folder}"
    return {"uri": uri, "everySteps": 5, "keep": 2, **parts}


def history(ended: Ended) -> list[dict[str, Any]]:
    """The measured course: one entry per logged step and per evaluation."""
    lines = [json.loads(line) for line in (ended.output / "history.jsonl").read_text().splitlines()]
    return [
        {"step": line["step"], **{name: line[name] for name in MEASURED if name in line}}
        for line in lines
        if "loss" in line or "eval_loss" in line
    ]


def losses(ended: Ended) -> list[dict[str, Any]]:
    return [entry for entry in history(ended) if "loss" in entry]


def weights(ended: Ended) -> str:
    [file] = list(ended.output.glob("*.safetensors"))
    return hashlib.sha256(file.read_bytes()).hexdigest()


def whole(folder: Path) -> list[int]:
    return sorted(int(path.parent.name.removeprefix("checkpoint-")) for path in folder.glob("*/complete"))


def assert_same(resumed: Ended, alone: Ended) -> None:
    assert resumed.code == alone.code == 0, resumed.log
    assert losses(resumed) == losses(alone)
    evaluations = [entry for entry in history(alone) if "eval_loss" in entry]
    assert all(entry in evaluations for entry in history(resumed) if "eval_loss" in entry)
    assert weights(resumed) == weights(alone)

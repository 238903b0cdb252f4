"""What test_resume.py shows for SFT holds for the other objectives: a stopped run ends as one that was left alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer.methods import sampling
from finetune_trainer.rewards import functions
from tests.integration.trainer.conftest import Ended, Run
from tests.integration.trainer.objectives import FUNCTIONS, RED, dataset, write_preferences, write_prompts
from tests.integration.trainer.stopping import StopAt, assert_same, job, schedule

pytestmark = pytest.mark.integration

LORA = {"type": "LoRA", "lora": {"r": 4, "alpha": 8, "dropout": 0.1, "targetModules": ["all-linear"]}}
STEPS = 24
# 18 steps are an epoch of the 36 prompts: the stop lies in the second one, and an evaluation between stop and end.
HYPER = {
    "maxSteps": STEPS,
    "globalBatchSize": 8,
    "microBatchSize": 4,
    "maxLength": 64,
    "learningRate": 1e-3,
    "evalSteps": 7,
}
STOP = 20
SAMPLED: dict[str, Any] = {
    "reward": {**FUNCTIONS, "beta": 0.05},
    "generation": {"numGenerations": 4, "maxCompletionLength": 8},
}


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_preferences(tmp_path)
    write_prompts(tmp_path)
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "rewards.py").write_text(RED)
    monkeypatch.setenv(functions.FOLDER_VARIABLE, str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("objective", "file", "parts"),
    [
        ("DPO", "preferences.jsonl", {}),
        ("RewardModel", "preferences.jsonl", {}),
        ("RLOO", "prompts.jsonl", SAMPLED),
        ("GRPO", "prompts.jsonl", SAMPLED),
    ],
)
@pytest.mark.parametrize("kind", ["LoRA", "QLoRA"])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    taught: Path,
    rows: Path,
    run: Run,
    run_stopped: Callable[..., Ended],
    tmp_path: Path,
    objective: str,
    file: str,
    parts: dict[str, Any],
    kind: str,
) -> None:
    method = {**LORA, "type": kind, **({"quantization": {}} if kind == "QLoRA" else {})}
    parts = {
        "objective": objective,
        "method": method,
        "dataset": dataset(rows / file),
        "hyperparameters": HYPER,
        **parts,
    }
    alone = run(taught, rows, name="alone", **parts)
    checkpoints = schedule(tmp_path / "ck")
    stopped = run_stopped(StopAt(STOP), taught, rows, checkpoint=checkpoints, job=job(1), **parts)
    assert (stopped.code, stopped.result["step"]) == (75, STOP), stopped.log
    resumed = run(taught, rows, checkpoint=checkpoints, job=job(2), **parts)
    assert f"trained to step {STEPS} (from {STOP})" in resumed.log
    assert_same(resumed, alone)


def test_another_reward_function_begins_anew(
    taught: Path, rows: Path, run: Run, run_stopped: Callable[..., Ended], tmp_path: Path
) -> None:
    parts: dict[str, Any] = {
        "objective": "GRPO",
        "method": LORA,
        "dataset": dataset(rows / "prompts.jsonl"),
        "hyperparameters": {**HYPER, "maxSteps": 6, "evalSteps": 6},
        **SAMPLED,
    }
    checkpoints = schedule(tmp_path / "ck")
    stopped = run_stopped(StopAt(5), taught, rows, checkpoint=checkpoints, job=job(1), **parts)
    assert stopped.code == 75, stopped.log
    (rows / "0" / "rewards.py").write_text(RED.replace("red' in", "blue' in"))
    ended = run(taught, rows, checkpoint=checkpoints, job=job(2), **parts)
    assert ended.code == 0, ended.log
    assert "resuming" not in ended.log


@pytest.mark.parametrize("objective", ["RLOO", "GRPO"])
def test_a_stop_breaks_off_the_sampling_of_a_step_which_is_done_again(
    taught: Path,
    rows: Path,
    run: Run,
    handlers: None,
    tmp_path: Path,
    objective: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parts: dict[str, Any] = {
        "objective": objective,
        "method": LORA,
        "dataset": dataset(rows / "prompts.jsonl"),
        "hyperparameters": {**HYPER, "maxSteps": 8, "evalSteps": 8},
        **SAMPLED,
    }
    alone = run(taught, rows, name="alone", **parts)
    begun = 0
    look_up = sampling.Book.tokens

    def stop_at_the_sixth(book: sampling.Book, prompts: list[str]) -> list[list[int]]:
        nonlocal begun
        begun += 1
        if begun == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return look_up(book, prompts)

    checkpoints = schedule(tmp_path / "ck")
    with monkeypatch.context() as patch:
        patch.setattr(sampling.Book, "tokens", stop_at_the_sixth)
        stopped = run(taught, rows, checkpoint=checkpoints, job=job(1), **parts)
    assert (stopped.code, stopped.result["step"]) == (75, 5), stopped.log
    assert "step 6 is given up" in stopped.log
    resumed = run(taught, rows, checkpoint=checkpoints, job=job(2), **parts)
    assert "(from 5)" in resumed.log
    assert_same(resumed, alone)


@pytest.mark.parametrize("objective", ["RLOO", "GRPO"])
def test_a_stop_in_an_evaluation_leaves_trainings_random_numbers_alone(
    taught: Path, rows: Path, run: Run, run_stopped: Callable[..., Ended], tmp_path: Path, objective: str
) -> None:
    parts: dict[str, Any] = {
        "objective": objective,
        "method": LORA,
        "dataset": dataset(rows / "prompts.jsonl"),
        "hyperparameters": {**HYPER, "maxSteps": 8, "evalSteps": 4},
        **SAMPLED,
    }
    alone = run(taught, rows, name="alone", **parts)
    checkpoints = schedule(tmp_path / "ck")
    stop = StopAt(4, during="evaluation")
    stopped = run_stopped(stop, taught, rows, checkpoint=checkpoints, job=job(1), **parts)
    assert (stopped.code, stopped.result["step"]) == (75, 4), stopped.log
    assert_same(run(taught, rows, checkpoint=checkpoints, job=job(2), **parts), alone)


@pytest.mark.parametrize("objective", ["RLOO", "GRPO"])
def test_a_stop_breaks_off_a_reward_function_that_takes_long(
    taught: Path, rows: Path, run: Run, handlers: None, tmp_path: Path, objective: str
) -> None:
    """Such as one that asks a model elsewhere, or hangs: the grace time is shorter than that."""
    parts: dict[str, Any] = {
        "objective": objective,
        "method": LORA,
        "dataset": dataset(rows / "prompts.jsonl", held_out=0),
        "hyperparameters": {**HYPER, "maxSteps": 3},
        "checkpoint": schedule(tmp_path / "ck"),
        **SAMPLED,
    }
    hangs = (
        "import os, signal, time\n"
        "def red(prompts, completions, trainer_state):\n"
        "    if trainer_state.global_step == 1:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "        time.sleep(20)\n"
        "    return [float('red' in text) for text in completions]\n"
    )
    (rows / "0" / "rewards.py").write_text(hangs)
    stopped = run(taught, rows, **parts)
    assert (stopped.code, stopped.result["step"]) == (75, 1), stopped.log
    assert "step 2 is given up" in stopped.log
    assert "checkpoint-1 is complete" in stopped.result["message"]

"""Each objective learns what it is for: preferences are told apart, rewards rise; also over earlier adapters."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetune_trainer import lifecycle
from finetune_trainer.rewards import functions
from tests import tiny
from tests.integration.trainer.conftest import Ended, Run
from tests.integration.trainer.objectives import (
    FUNCTIONS,
    GENERATION,
    METHODS,
    PREFERRING,
    RED,
    SAMPLING,
    continued,
    course,
    dataset,
    mean,
    write_preferences,
    write_prompts,
)

pytestmark = pytest.mark.integration


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objectives")
    write_preferences(folder)
    write_prompts(folder)
    (folder / "0").mkdir()
    (folder / "0" / "rewards.py").write_text(RED)
    return folder


@pytest.fixture
def functions_mounted(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(functions.FOLDER_VARIABLE, str(data))


@pytest.fixture(scope="session")
def reward_model(taught: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained reward model: LoRA over the taught model, with a head of its own."""
    folder = tmp_path_factory.mktemp("reward-model")
    document = tiny.run_document(
        taught,
        data,
        folder / "out",
        objective="RewardModel",
        method=METHODS["LoRA"],
        dataset=dataset(data / "preferences.jsonl"),
        hyperparameters=PREFERRING,
    )
    (folder / "run.json").write_text(json.dumps(document))
    assert lifecycle.run_job(folder / "run.json") == 0
    return folder / "out"


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("objective", ["DPO", "RewardModel"])
def test_preferences_are_learnt(taught: Path, data: Path, run: Run, objective: str, kind: str) -> None:
    rate = 2e-3 if kind == "Full" else 5e-3
    ended = run(
        taught,
        data,
        objective=objective,
        method=METHODS[kind],
        dataset=dataset(data / "preferences.jsonl"),
        hyperparameters={**PREFERRING, "learningRate": rate},
    )
    assert ended.code == 0, ended.log
    metrics = ended.manifest["metrics"]
    names = {"DPO": "rewards/accuracies", "RewardModel": "accuracy"}
    assert course(ended, names[objective])[0] < 0.9 < metrics["evalAccuracy"]
    assert metrics["evalMargin"] > 0
    assert metrics["loss"] < 0.5 < course(ended, "loss")[0]
    assert ended.result["metrics"]["evalAccuracy"] == metrics["evalAccuracy"]
    assert ("rank" in ended.result["artifact"]) == (kind != "Full")
    assert (ended.manifest["objective"], ended.manifest["method"]) == (objective, kind)


@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("objective", ["RLOO", "GRPO"])
def test_a_reward_rises(
    taught: Path, data: Path, run: Run, functions_mounted: None, objective: str, kind: str
) -> None:
    rate = 2e-3 if kind == "Full" else 5e-3
    ended = run(
        taught,
        data,
        objective=objective,
        method=METHODS[kind],
        dataset=dataset(data / "prompts.jsonl"),
        hyperparameters={**SAMPLING, "learningRate": rate},
        generation=GENERATION,
        reward={**FUNCTIONS, "beta": 0.01},
    )
    assert ended.code == 0, ended.log
    rewards = course(ended, "reward")
    assert mean(rewards[:3]) < 0.45
    assert mean(rewards[-3:]) > mean(rewards[:3]) + 0.3
    metrics = ended.manifest["metrics"]
    assert metrics["evalReward"] > 0.5
    assert metrics["kl"] > 0
    assert 0 < metrics["completionLength"] <= 20
    assert "evalLoss" not in metrics
    assert ended.manifest["reward"]["functions"][0]["digest"].startswith("sha256:")
    assert "reward 0." in ended.log or "reward 1" in ended.log


@pytest.mark.parametrize(
    ("objective", "kind", "learnt"), [("RLOO", "LoRA", 0.3), ("RLOO", "QLoRA", 0.3), ("GRPO", "LoRA", 0.0)]
)
def test_a_trained_reward_model_teaches(
    taught: Path,
    data: Path,
    run: Run,
    reward_model: Path,
    functions_mounted: None,
    objective: str,
    kind: str,
    learnt: float,
) -> None:
    """RLHF: what the model says in the end is what the preferences liked, though it never saw them."""
    ended = run(
        taught,
        data,
        objective=objective,
        method=METHODS[kind],
        dataset=dataset(data / "prompts.jsonl"),
        hyperparameters=SAMPLING,
        generation=GENERATION,
        reward={"uri": f"file://{reward_model}", **FUNCTIONS, "weights": [1.0, 0.0], "beta": 0.01},
    )
    assert ended.code == 0, ended.log
    rewards = course(ended, "reward")
    assert mean(rewards[-3:]) > mean(rewards[:3]) + 0.5
    red = course(ended, "rewards/red/mean")
    assert mean(red[-3:]) > mean(red[:3]) + learnt
    lineage = ended.manifest["reward"]
    assert lineage["model"]["uri"] == f"file://{reward_model}"
    assert lineage["model"]["digest"].startswith("sha256:")
    assert lineage["weights"] == [1.0, 0.0]


# ---------------------------------------------------------------- chains


@pytest.fixture(scope="session")
def first(taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """An SFT job over the taught model that leaves an adapter, which is only read."""
    folder = tmp_path_factory.mktemp("first")
    document = tiny.run_document(
        taught,
        tiny.write_jsonl(folder / "new.jsonl", tiny.chat_rows(shift=1)),
        folder / "out",
        method=METHODS["LoRA"],
        hyperparameters={"maxSteps": 5, "globalBatchSize": 8, "maxLength": 64, "learningRate": 5e-3},
    )
    (folder / "run.json").write_text(json.dumps(document))
    assert lifecycle.run_job(folder / "run.json") == 0
    digest = hashlib.sha256((folder / "out" / "manifest.json").read_bytes()).hexdigest()
    return Ended(0, {"artifact": {"digest": f"sha256:{digest}"}}, folder / "out", "")


STILL = {"maxSteps": 1, "globalBatchSize": 8, "maxLength": 64, "learningRate": 1e-12, "evalSteps": 1}


@pytest.mark.parametrize("kind", ["LoRA", "QLoRA"])
@pytest.mark.parametrize("objective", ["SFT", "DPO", "RewardModel", "RLOO", "GRPO"])
def test_an_adapter_is_trained_further_and_fits_the_same_base_model(
    taught: Path,
    data: Path,
    chat_file: Path,
    run: Run,
    first: Ended,
    functions_mounted: None,
    objective: str,
    kind: str,
) -> None:
    """At a rate of almost nothing the artifact is the upstream adapter again, and the reference is the policy."""
    sampling = objective in ("RLOO", "GRPO")
    files = {"SFT": None, "DPO": "preferences.jsonl", "RewardModel": "preferences.jsonl"}
    name = files.get(objective, "prompts.jsonl")
    rows = data / name if name else chat_file
    quantization: dict[str, Any] = {"quantization": {}} if kind == "QLoRA" else {}
    ended = run(
        taught,
        data,
        objective=objective,
        model=continued(taught, first),
        method={"type": kind, **quantization},
        dataset=dataset(rows),
        hyperparameters=STILL,
        **({"reward": {**FUNCTIONS, "beta": 0.1}} if sampling else {}),
        **({"generation": {"numGenerations": 4, "maxCompletionLength": 16}} if sampling else {}),
    )
    assert ended.code == 0, ended.log
    before = load_file(first.output / "adapter_model.safetensors")
    after = load_file(ended.output / "adapter_model.safetensors")
    assert set(before) <= set(after)
    assert all(torch.allclose(before[key], after[key], atol=1e-6) for key in before)
    assert {key for key in after if key not in before} <= {"base_model.model.score.weight"}
    config = json.loads((ended.output / "adapter_config.json").read_text())
    assert config["task_type"] == ("SEQ_CLS" if objective == "RewardModel" else "CAUSAL_LM")
    assert config["base_model_name_or_path"] == str(taught)
    assert ended.manifest["baseModel"] == {"uri": f"file://{taught}"}
    assert ended.manifest["rank"] == 8
    assert ended.manifest["continues"]["digest"] == first.result["artifact"]["digest"]
    assert ended.manifest["continues"]["job"]["name"] == "tiny"
    assert not (ended.output / "ref").exists()
    if objective == "DPO":
        assert course(ended, "rewards/margins")[0] == pytest.approx(0, abs=1e-4)
    if sampling:
        assert course(ended, "kl")[0] == pytest.approx(0, abs=1e-4)


def test_an_adapter_that_was_changed_is_refused(taught: Path, data: Path, run: Run, first: Ended) -> None:
    model = continued(taught, first)
    model["adapter"]["digest"] = "sha256:" + "0" * 64
    ended = run(
        taught,
        data,
        objective="DPO",
        model=model,
        method={"type": "LoRA"},
        dataset=dataset(data / "preferences.jsonl"),
    )
    assert (ended.code, ended.result["class"]) == (66, "ModelNotFound")
    assert "is another one" in ended.result["message"]
    assert not ended.output.exists()


# ---------------------------------------------------------------- what goes wrong


def test_a_reward_function_that_fails_in_training_names_its_line(
    taught: Path, data: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "f" / "0").mkdir(parents=True)
    text = (
        "calls = 0\n\n\ndef red(prompts, completions):\n    global calls\n"
        "    calls += 1\n    return [1.0 / (3 - calls)] * 8\n"
    )
    (tmp_path / "f" / "0" / "rewards.py").write_text(text)
    monkeypatch.setenv(functions.FOLDER_VARIABLE, str(tmp_path / "f"))
    ended = run(
        taught,
        data,
        objective="GRPO",
        method=METHODS["LoRA"],
        dataset=dataset(data / "prompts.jsonl", held_out=0),
        hyperparameters={**STILL, "maxSteps": 9},
        generation=GENERATION,
        reward=FUNCTIONS,
    )
    assert (ended.code, ended.result["class"], ended.result["step"]) == (64, "BadConfig", 2)
    assert "ZeroDivisionError: " in ended.result["message"]
    assert "rewards.py line 7: return [1.0 / (3 - calls)] * 8" in ended.result["message"]
    assert not ended.output.exists()


def test_weights_that_broke_end_sampling_as_not_finite(
    taught: Path, data: Path, run: Run, functions_mounted: None
) -> None:
    ended = run(
        taught,
        data,
        objective="RLOO",
        method={"type": "Full"},
        dataset=dataset(data / "prompts.jsonl", held_out=0),
        hyperparameters={**STILL, "maxSteps": 9, "learningRate": 1e30, "maxGradNorm": 1000, "warmupRatio": 0},
        generation=GENERATION,
        reward=FUNCTIONS,
    )
    assert (ended.code, ended.result["class"]) == (82, "NotFinite")
    assert not ended.output.exists()


def test_too_few_prompts_for_one_step_are_told(
    taught: Path, tmp_path: Path, run: Run, functions_mounted: None
) -> None:
    rows = tiny.write_jsonl(tmp_path / "few.jsonl", tiny.prompt_rows()[:3])
    ended = run(
        taught,
        rows,
        objective="RLOO",
        method=METHODS["LoRA"],
        dataset=dataset(rows, held_out=0),
        hyperparameters=SAMPLING,
        generation=GENERATION,
        reward=FUNCTIONS,
    )
    assert ended.code == 65
    assert "answers 4 prompts in each step, and there are 3" in ended.result["message"]


@pytest.mark.parametrize(
    ("objective", "file", "hyper", "expected"),
    [
        (
            "DPO",
            "preferences.jsonl",
            {"maxLength": 20},
            "no learnt token within hyperparameters.maxLength 20",
        ),
        ("RLOO", "prompts.jsonl", {"maxLength": 24}, "prompts have more than 4 tokens"),
    ],
)
def test_rows_that_do_not_fit_are_told(
    taught: Path,
    data: Path,
    run: Run,
    functions_mounted: None,
    objective: str,
    file: str,
    hyper: dict[str, Any],
    expected: str,
) -> None:
    rewards = {"reward": FUNCTIONS, "generation": GENERATION} if objective == "RLOO" else {}
    ended = run(
        taught,
        data,
        objective=objective,
        method=METHODS["LoRA"],
        dataset=dataset(data / file),
        hyperparameters={**STILL, **hyper},
        **rewards,
    )
    assert ended.code == 65
    assert expected in ended.result["message"]


@pytest.mark.parametrize("objective", ["DPO", "RewardModel", "RLOO", "GRPO"])
def test_settings_train_with_every_objective(
    taught: Path, data: Path, run: Run, functions_mounted: None, objective: str
) -> None:
    """Micro batches that are smaller than a group of answers, recomputed activations, bfloat16, early stopping."""
    sampling = objective in ("RLOO", "GRPO")
    ended = run(
        taught,
        data,
        objective=objective,
        method={"type": "LoRA"},
        dataset=dataset(data / ("prompts.jsonl" if sampling else "preferences.jsonl")),
        hyperparameters={
            **STILL,
            "maxSteps": 3,
            "microBatchSize": 2,
            "precision": "BFloat16",
            "gradientCheckpointing": True,
            "optimizer": "AdamW8bit",
        },
        earlyStopping={"patience": 1},
        **({"reward": FUNCTIONS, "generation": {**GENERATION, "topP": 0.9}} if sampling else {}),
    )
    assert ended.code == 0, ended.log
    assert ended.manifest["hyperparameters"]["microBatchSize"] == 2
    assert ("evalReward" in ended.manifest["metrics"]) == sampling

"""RLHF as three jobs that refer to one another, applied at once: the operator runs them in order, the reward rises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.clients import Json, Kubectl, finetunejob

pytestmark = pytest.mark.integration

LORA = {"type": "LoRA", "lora": {"r": 8, "alpha": 16, "dropout": 0.0}}
HYPER = {"globalBatchSize": 16, "microBatchSize": 16, "maxLength": 64, "learningRate": 5e-3}
SCRIPT = """
def short(prompts, completions, thing):
    return [float(name in text and len(text) < 40) for text, name in zip(completions, thing)]
"""


def jobs(base: Path, folder: Path) -> dict[str, Json]:
    """SFT of a base model; a reward model and RLOO that go on with its adapter."""
    demonstrations = tiny.write_jsonl(folder / "demonstrations.jsonl", tiny.chat_rows())
    preferences = tiny.write_jsonl(folder / "preferences.jsonl", tiny.preference_rows())
    prompts = tiny.write_jsonl(folder / "prompts.jsonl", tiny.prompt_rows())
    first: dict[str, Any] = {"model": {"fineTuneJobRef": {"name": "sft"}}, "method": {"type": "LoRA"}}
    function = {"configMapRef": {"name": "rewards", "key": "rewards.py"}, "entry": "short"}
    made = [
        finetunejob("sft", base, demonstrations, method=LORA, hyperparameters={**HYPER, "maxSteps": 5}),
        finetunejob(
            "judge",
            base,
            preferences,
            objective="RewardModel",
            hyperparameters={**HYPER, "maxSteps": 40},
            **first,
        ),
        finetunejob(
            "rlhf",
            base,
            prompts,
            objective="RLOO",
            reward={
                "fineTuneJobRef": {"name": "judge"},
                "functions": [function],
                "weights": [1, 0.1],
                "beta": 0.01,
            },
            generation={"numGenerations": 8, "maxCompletionLength": 20, "temperature": 1.2},
            hyperparameters={**HYPER, "globalBatchSize": 32, "maxSteps": 30, "scheduler": "Constant"},
            **first,
        ),
    ]
    return {job["metadata"]["name"]: job for job in made}


@pytest.fixture
def statuses(taught: Path, tmp_path: Path, kubectl: Kubectl) -> dict[str, Json]:
    """How the three jobs ended; they are applied in the order in which none can begin at once."""
    script = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "rewards"},
        "data": {"rewards.py": SCRIPT},
    }
    chain = jobs(taught, tmp_path)
    kubectl.apply(chain["rlhf"])
    waiting = kubectl.wait_job("rlhf", lambda status: bool(status.get("reason")))["status"]
    assert (waiting["phase"], waiting["reason"]) == ("Pending", "FineTuneJobNotFound")
    for body in (chain["judge"], script, chain["sft"]):
        kubectl.apply(body)
    return {name: kubectl.finished(name, seconds=240) for name in ("sft", "judge", "rlhf")}


def test_three_jobs_by_reference_raise_the_reward(statuses: dict[str, Json], taught: Path) -> None:
    for name, status in statuses.items():
        assert status["phase"] == "Succeeded", (name, status["message"])
        assert len(status["attempts"]) == 1
        assert status["artifact"]["baseModel"] == f"file://{taught}", "each adapter fits the first base model"
        assert status["artifact"]["rank"] == 8
    sft, judge, rlhf = (statuses[name] for name in ("sft", "judge", "rlhf"))
    assert judge["metrics"]["evalAccuracy"] > 0.9
    upstream = {
        "uri": sft["artifact"]["uri"],
        "digest": sft["artifact"]["digest"],
        "baseModel": f"file://{taught}",
    }
    assert judge["effective"]["adapter"] == rlhf["effective"]["adapter"] == upstream
    assert rlhf["effective"]["reward"]["digest"] == judge["artifact"]["digest"]
    assert {"reward", "kl", "evalReward", "completionLength"} <= rlhf["metrics"].keys()

    folder = Path(rlhf["artifact"]["uri"].removeprefix("file://"))
    history = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    rewards = [entry["reward"] for entry in history if "reward" in entry]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.5
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["continues"]["digest"] == sft["artifact"]["digest"]
    assert manifest["continues"]["job"]["name"] == "sft"
    assert manifest["reward"]["model"]["job"]["name"] == "judge"
    assert manifest["reward"]["functions"][0]["entry"] == "short"

"""Runs of the objectives beside SFT on the tiny model that knows the rule: what is liked is an answer with red."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests import tiny
from tests.integration.trainer.conftest import Ended

LORA = {"r": 8, "alpha": 16, "dropout": 0.0, "targetModules": ["all-linear"]}
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"type": "LoRA", "lora": LORA},
    "QLoRA": {"type": "QLoRA", "lora": LORA, "quantization": {}},
    "Full": {"type": "Full"},
}
PREFERRING = {
    "maxSteps": 30,
    "globalBatchSize": 16,
    "microBatchSize": 16,
    "maxLength": 64,
    "learningRate": 5e-3,
    "evalSteps": 30,
}
SAMPLING = {
    "maxSteps": 24,
    "globalBatchSize": 32,
    "microBatchSize": 32,
    "maxLength": 64,
    "learningRate": 5e-3,
    "scheduler": "Constant",
    "evalSteps": 24,
}
GENERATION = {"numGenerations": 8, "maxCompletionLength": 20, "temperature": 1.2}
RED = "def red(prompts, completions):\n    return [float('red' in text) for text in completions]\n"
FUNCTIONS = {"functions": [{"configMapRef": {"name": "rewards", "key": "rewards.py"}, "entry": "red"}]}


def dataset(file: Path, *, held_out: float = 0.1) -> dict[str, Any]:
    return {"sources": [{"uri": f"file://{file}"}], "split": {"eval": held_out, "seed": 1}}


def history(ended: Ended) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ended.output / "history.jsonl").read_text().splitlines()]


def course(ended: Ended, name: str) -> list[float]:
    return [entry[name] for entry in history(ended) if entry.get(name) is not None]


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def model_uri(folder: Path) -> dict[str, Any]:
    return {"uri": f"file://{folder}"}


def continued(base: Path, ended: Ended) -> dict[str, Any]:
    """What the operator writes for model.fineTuneJobRef to a job that left an adapter."""
    digest = ended.result["artifact"]["digest"]
    return {**model_uri(base), "adapter": {"uri": f"file://{ended.output}", "digest": digest}}


def write_preferences(folder: Path) -> Path:
    return tiny.write_jsonl(folder / "preferences.jsonl", tiny.preference_rows())


def write_prompts(folder: Path) -> Path:
    return tiny.write_jsonl(folder / "prompts.jsonl", tiny.prompt_rows())

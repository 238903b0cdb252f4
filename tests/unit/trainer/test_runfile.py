"""The run file: what is accepted, and how a wrong one is explained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer import runfile
from finetune_trainer.failures import BadConfig
from tests import tiny

RLOO: dict[str, Any] = {"objective": "RLOO", "reward": {"uri": "file:///rm"}}


def document(**parts: Any) -> dict[str, Any]:
    return tiny.run_document(Path("/model"), Path("/rows.jsonl"), Path("/out"), **parts)


def refusal(**parts: Any) -> str:
    with pytest.raises(BadConfig) as caught:
        runfile.parse(json.dumps(document(**parts)))
    return str(caught.value)


def test_a_full_run_file_is_read() -> None:
    run = runfile.parse(json.dumps(document(earlyStopping={"patience": 2, "minDelta": 0.1})))
    assert run.method.type is runfile.MethodType.LORA
    assert run.lora.target_modules == ["all-linear"]
    assert run.early_stopping is not None
    assert run.uris() == ["file:///model", "file:///rows.jsonl", "file:///out"]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"objective": "PPO"}, ["objective", "RLOO", "GRPO"]),
        ({"objective": "KTO"}, ["objective", "'SFT', 'DPO', 'RewardModel', 'RLOO' or 'GRPO'", "KTO"]),
        ({"objective": "RLOO"}, ["reward is required for RLOO", "reward.functions"]),
        ({"objective": "GRPO", "reward": {}}, ["reward is required for GRPO"]),
        ({"reward": {"uri": "file:///rm"}}, ["reward has no meaning for objective SFT; remove it"]),
        ({"generation": {}}, ["generation has no meaning for objective SFT"]),
        (
            {"objective": "RewardModel", "preference": {}},
            ["preference has no meaning for objective RewardModel"],
        ),
        (
            {"objective": "DPO", "hyperparameters": {"packing": True, "neftuneAlpha": 5}},
            ["hyperparameters.packing has no meaning for objective DPO", "hyperparameters.neftuneAlpha"],
        ),
        (
            {"objective": "DPO", "dataset": {"sources": [{"uri": "file:///r.csv", "format": "Text"}]}},
            ["dataset.sources[0].format: Text is not for objective DPO; use Preference, or Auto"],
        ),
        (
            {**RLOO, "hyperparameters": {"globalBatchSize": 6}},
            ["globalBatchSize: 6 completions", "generation.numGenerations 4", "multiple"],
        ),
        (
            {**RLOO, "hyperparameters": {"maxLength": 128}},
            ["generation.maxCompletionLength: 128 leaves no room", "maxLength 128"],
        ),
        (
            {**RLOO, "reward": {"uri": "file:///rm", "weights": [1, 2]}},
            ["reward.weights: 2 weights for 1 rewards", "the reward model first"],
        ),
        (
            {**RLOO, "reward": {"functions": [{"configMapRef": {"name": "a", "key": "../x"}, "entry": "f"}]}},
            ["reward.functions.0.configMapRef.key", "../x"],
        ),
        ({**RLOO, "generation": {"numGenerations": 1}}, ["generation.numGenerations", "2"]),
        (
            {"model": {"uri": "file:///m", "adapter": {"uri": "file:///a"}}, "method": {"type": "Full"}},
            ["method.type: Full trains all weights", "model.adapter"],
        ),
        (
            {"model": {"uri": "file:///m", "adapter": {"uri": "file:///a", "digest": "abc"}}},
            ["model.adapter.digest", "sha256"],
        ),
        ({"method": {"type": "QLoRA"}}, ["method.quantization is required for QLoRA", "{}"]),
        ({"method": {"type": "LoRA", "quantization": {}}}, ["method.quantization is only for QLoRA", "LoRA"]),
        ({"method": {"type": "Full", "lora": {}}}, ["method.lora is only for LoRA and QLoRA"]),
        ({"method": {"type": "LoRA", "lora": {"targetModules": ["all-linear", "q_proj"]}}}, ["stands alone"]),
        ({"method": {"type": "DoRA"}}, ["method.type", "DoRA", "LoRA"]),
        (
            {"hyperparameters": {"globalBatchSize": 16, "microBatchSize": 5}},
            ["hyperparameters.microBatchSize: 5 does not divide globalBatchSize 16"],
        ),
        ({"hyperparameters": {"learningrate": 1}}, ["hyperparameters.learningrate", "Extra inputs"]),
        ({"hyperparameters": {"learningRate": -1}}, ["hyperparameters.learningRate", "greater than 0", "-1"]),
        ({"apiVersion": "trainer/v2"}, ["apiVersion", "trainer/v1", "trainer/v2"]),
        ({"model": {"uri": "file:///m", "revision": "main"}}, ["model.revision: 'main'", "hf://"]),
        ({"dataset": {"sources": []}}, ["dataset.sources", "at least 1"]),
        ({"output": {}}, ["output.uri: Field required"]),
        ({"secret": "x"}, ["secret: Extra inputs"]),
        ({"output": {"uri": "s3://"}}, ["output.uri: there is nothing behind s3://", "bucket"]),
        ({"checkpoint": {"uri": "gs://"}}, ["checkpoint.uri: there is nothing behind gs://"]),
        ({"model": {"uri": "hf://"}}, ["model.uri: there is nothing behind hf://"]),
        (
            {"output": {"uri": "https://host/out"}},
            ["output.uri: nothing is written to https://", "use s3://"],
        ),
        ({"checkpoint": {"uri": "hf://org/ck"}}, ["checkpoint.uri: nothing is written to hf://"]),
        ({"checkpoint": {"uri": "file:///out"}}, ["checkpoint.uri", "lie in one another", "-checkpoints"]),
        ({"checkpoint": {"uri": "file:///out/deep/er"}}, ["lie in one another"]),
        ({"checkpoint": {"uri": "file:////out//deep/../ck"}}, ["lie in one another"]),
        ({"checkpoint": {"uri": "file:///"}}, ["lie in one another"]),
        ({"checkpoint": {"uri": "file:///ck", "keep": 0}}, ["checkpoint.keep", "0"]),
        ({"checkpoint": {"uri": "file:///ck", "everyMinutes": 0}}, ["checkpoint.everyMinutes", "0"]),
        ({"checkpoint": {"uri": "file:///ck", "resume": "Maybe"}}, ["checkpoint.resume", "Auto", "Maybe"]),
        ({"overrides": {"microBatchSize": 0}}, ["overrides.microBatchSize", "0"]),
    ],
)
def test_a_wrong_run_file_names_field_value_and_remedy(parts: dict[str, Any], expected: list[str]) -> None:
    text = refusal(**parts)
    for part in expected:
        assert part in text


def test_early_stopping_without_held_out_rows_is_refused() -> None:
    dataset = {"sources": [{"uri": "file:///rows.jsonl"}], "split": {"eval": 0, "seed": 1}}
    assert "dataset.split.eval above 0" in refusal(dataset=dataset, earlyStopping={})


def test_several_problems_are_told_at_once() -> None:
    text = refusal(method={"type": "QLoRA"}, hyperparameters={"globalBatchSize": 4, "microBatchSize": 3})
    assert "method.quantization" in text
    assert "microBatchSize" in text


def test_text_that_is_no_json_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match=r"run file: .document.: Invalid JSON"):
        runfile.parse("{")
    with pytest.raises(BadConfig, match="FINETUNE_RUN_FILE"):
        runfile.load(tmp_path / "none.json")
    (tmp_path / "run.json").write_text("{}", encoding="utf-16")
    with pytest.raises(
        BadConfig, match=r"run.json is not UTF-8 text \(invalid start byte\); save it as UTF-8"
    ):
        runfile.load(tmp_path / "run.json")


def test_a_field_that_is_there_twice_is_refused() -> None:
    text = json.dumps(document()).replace('"maxSteps": 4', '"maxSteps": 4, "epochs": 2, "epochs": 7')
    with pytest.raises(BadConfig, match=r"run file: epochs is there twice in one object \(beside maxSteps, "):
        runfile.parse(text)


def test_checkpoints_and_overrides_are_read() -> None:
    checkpoint = {"uri": "file:///out-checkpoints", "everySteps": 5, "everyMinutes": 0.5, "resume": "Never"}
    run = runfile.parse(json.dumps(document(checkpoint=checkpoint, overrides={"microBatchSize": 2})))
    assert run.checkpoint is not None
    assert (run.checkpoint.every_steps, run.checkpoint.every_minutes, run.checkpoint.keep) == (5, 0.5, 2)
    assert run.checkpoint.resume is runfile.Resume.NEVER
    assert run.overrides.micro_batch_size == 2
    assert run.uris()[-1] == "file:///out-checkpoints"
    assert runfile.parse(json.dumps(document())).checkpoint is None


def test_parts_of_the_objectives_are_read_and_their_folders_count() -> None:
    digest = "sha256:" + "0" * 64
    run = runfile.parse(
        json.dumps(
            document(
                objective="GRPO",
                model={"uri": "file:///model", "adapter": {"uri": "file:///sft", "digest": digest}},
                reward={
                    "uri": "file:///rm",
                    "digest": digest,
                    "functions": [{"configMapRef": {"name": "rewards", "key": "r.py"}, "entry": "polite"}],
                    "weights": [1, -0.5],
                },
                hyperparameters={"globalBatchSize": 16, "maxLength": 256},
            )
        )
    )
    assert run.objective is runfile.Objective.GRPO
    assert run.reward is not None
    assert run.reward.count == 2
    assert (run.sampling.num_generations, run.sampling.temperature) == (4, 1.0)
    assert run.uris()[-2:] == ["file:///sft", "file:///rm"]

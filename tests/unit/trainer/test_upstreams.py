"""Artifacts of earlier jobs: what is taken, and what is refused before anything slow is imported."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer import runfile, upstreams
from finetune_trainer.failures import BadConfig, ModelNotFound
from finetune_trainer.rewards import sources
from tests import tiny

LORA = {"r": 8, "alpha": 16, "dropout": 0.0, "targetModules": ["all-linear"]}


def artifact(folder: Path, **changes: Any) -> str:
    """Writes what a LoRA job leaves and returns the digest of its manifest."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {"adapter_model.safetensors": b"weights", "adapter_config.json": b"{}", "tokenizer.json": b"{}"}
    for name, content in files.items():
        (folder / name).write_bytes(content)
    listed = [
        {"path": name, "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()
    ]
    manifest = {
        "job": {"namespace": "team", "name": "sft"},
        "objective": "SFT",
        "baseModel": {"uri": "file:///model"},
        "lora": LORA,
        "files": [*listed, {"path": "README.md", "sha256": "not read here"}],
        **changes,
    }
    content = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(content)
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def run_file(folder: Path, digest: str | None = None, **parts: Any) -> runfile.RunFile:
    adapter = {"uri": f"file://{folder}", **({} if digest is None else {"digest": digest})}
    document = tiny.run_document(
        Path("/model"),
        Path("/rows"),
        Path("/out"),
        **{"model": {"uri": "file:///model", "adapter": adapter}, "method": {"type": "LoRA"}, **parts},
    )
    return runfile.parse(json.dumps(document))


def test_the_settings_of_the_adapter_are_taken_over(tmp_path: Path) -> None:
    digest = artifact(tmp_path / "sft")
    found = upstreams.find_adapter(run_file(tmp_path / "sft", digest), tmp_path)
    assert found is not None
    adapter, lora = found
    assert (adapter.digest, adapter.is_adapter, adapter.has_tokenizer) == (digest, True, True)
    assert lora == runfile.Lora.model_validate(LORA)


def test_the_same_settings_may_be_given_and_dropout_may_differ(tmp_path: Path) -> None:
    artifact(tmp_path / "sft")
    method = {"type": "LoRA", "lora": {**LORA, "dropout": 0.3}}
    found = upstreams.find_adapter(run_file(tmp_path / "sft", method=method), tmp_path)
    assert found is not None
    assert found[1].dropout == 0.3


@pytest.mark.parametrize(
    ("parts", "kind", "expected"),
    [
        (
            {"method": {"type": "LoRA", "lora": {**LORA, "r": 16}}},
            BadConfig,
            ["method.lora", "r 8", "leave method.lora out"],
        ),
        (
            {"method": {"type": "LoRA", "lora": {**LORA, "targetModules": ["q_proj"]}}},
            BadConfig,
            ["targetModules ['all-linear']"],
        ),
    ],
)
def test_other_settings_are_refused(
    tmp_path: Path, parts: dict[str, Any], kind: type[Exception], expected: list[str]
) -> None:
    artifact(tmp_path / "sft")
    with pytest.raises(kind) as caught:
        upstreams.find_adapter(run_file(tmp_path / "sft", **parts), tmp_path)
    for part in expected:
        assert part in str(caught.value)


def test_an_adapter_of_another_base_model_is_refused(tmp_path: Path) -> None:
    artifact(tmp_path / "sft", baseModel={"uri": "hf://other/model"})
    with pytest.raises(BadConfig, match=r"fits hf://other/model, and model.uri is file:///model"):
        upstreams.find_adapter(run_file(tmp_path / "sft"), tmp_path)


def test_an_artifact_that_was_made_again_is_another_one(tmp_path: Path) -> None:
    digest = artifact(tmp_path / "sft")
    artifact(tmp_path / "sft", createdAt="later")
    with pytest.raises(ModelNotFound, match=r"is another one .* than this job was begun with"):
        upstreams.find_adapter(run_file(tmp_path / "sft", digest), tmp_path)


def test_a_changed_or_missing_file_is_named(tmp_path: Path) -> None:
    digest = artifact(tmp_path / "sft")
    (tmp_path / "sft" / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(ModelNotFound, match=r"adapter_model.safetensors .* differs from its manifest"):
        upstreams.find_adapter(run_file(tmp_path / "sft", digest), tmp_path)
    (tmp_path / "sft" / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match=r"adapter_model.safetensors is missing"):
        upstreams.find_adapter(run_file(tmp_path / "sft", digest), tmp_path)


def test_folders_that_hold_no_artifact_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match=r"is not a folder"):
        upstreams.find_adapter(run_file(tmp_path / "none"), tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelNotFound, match=r"holds no adapter of ours"):
        upstreams.find_adapter(run_file(tmp_path / "empty"), tmp_path)
    with pytest.raises(ModelNotFound, match=r"the artifact was removed"):
        upstreams.find_adapter(run_file(tmp_path / "empty", "sha256:" + "0" * 64), tmp_path)


# ---------------------------------------------------------------- reward models


def judged(folder: Path) -> runfile.RunFile:
    document = tiny.run_document(
        Path("/model"),
        Path("/rows"),
        Path("/out"),
        objective="RLOO",
        reward={"uri": f"file://{folder}"},
        hyperparameters={"globalBatchSize": 8, "maxLength": 256},
    )
    return runfile.parse(json.dumps(document))


def find_base(uri: str, revision: str | None, folder: Path) -> Path:
    return Path("/base of") / uri.rpartition("/")[2]


def test_a_reward_model_may_be_an_adapter_over_its_own_base(tmp_path: Path) -> None:
    artifact(tmp_path / "rm", objective="RewardModel", quantization={"type": "fp4"})
    found = sources.find(judged(tmp_path / "rm"), tmp_path, find_base=find_base)
    assert found is not None
    assert (found.base, found.name) == (Path("/base of/model"), "sft")
    assert found.quantization is not None
    assert found.quantization.type == "fp4"


def test_an_artifact_of_another_objective_is_no_reward_model(tmp_path: Path) -> None:
    artifact(tmp_path / "sft")
    with pytest.raises(BadConfig, match=r"artifact of objective SFT.*one of objective RewardModel"):
        sources.find(judged(tmp_path / "sft"), tmp_path, find_base=find_base)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "is a LlamaForCausalLM, and a reward model is"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "has 2 outputs"),
        (
            {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "a", "1": "b", "2": "c"}},
            "has 3 outputs",
        ),
        ({}, "model of unknown kind"),
    ],
)
def test_a_model_that_scores_nothing_is_refused(
    tmp_path: Path, config: dict[str, Any], expected: str
) -> None:
    for name, text in (
        ("config.json", json.dumps(config)),
        ("model.safetensors", ""),
        ("tokenizer.json", "{}"),
    ):
        (tmp_path / name).write_text(text)
    with pytest.raises(BadConfig, match=expected):
        sources.find(judged(tmp_path), tmp_path, find_base=find_base)


def test_a_plain_reward_model_needs_no_manifest(tmp_path: Path) -> None:
    config = {"architectures": ["LlamaForSequenceClassification"], "id2label": {"0": "LABEL_0"}}
    for name, text in (
        ("config.json", json.dumps(config)),
        ("model.safetensors", ""),
        ("tokenizer.json", "{}"),
    ):
        (tmp_path / name).write_text(text)
    found = sources.find(judged(tmp_path), tmp_path, find_base=find_base)
    assert found is not None
    assert (found.base, found.artifact.digest, found.name) == (None, None, tmp_path.name)

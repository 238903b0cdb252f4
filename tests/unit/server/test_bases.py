"""The base model of an adapter against the engine's: what is told apart, and what cannot be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from finetune_server.bases import Match, compare
from tests import tiny


def manifest(uri: str) -> dict[str, object]:
    return {"baseModel": {"uri": uri}}


def test_the_same_files_under_other_names_are_the_same(tiny_model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    assert compare(manifest(f"file://{copy}"), f"file://{tiny_model}").match is Match.SAME
    assert compare(manifest(f"file://{tiny_model}"), str(tiny_model)).match is Match.SAME
    assert compare(manifest("hf://a/b"), "hf://a/b").match is Match.SAME


def test_a_sister_of_the_same_shape_is_told_apart(tiny_model: Path, tmp_path: Path) -> None:
    sister = tiny.build_model(tmp_path / "sister", seed=1)
    verdict = compare(manifest(f"file://{sister}"), f"file://{tiny_model}")
    assert verdict.match is Match.DIFFERENT
    assert "weights in model.safetensors differ" in verdict.message


def test_another_shape_is_named(tiny_model: Path, tmp_path: Path) -> None:
    other = shutil.copytree(tiny_model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "hidden_size": 128}))
    verdict = compare(manifest(f"file://{other}"), f"file://{tiny_model}")
    assert verdict.match is Match.DIFFERENT
    assert "hidden_size is 128 there and 64 here" in verdict.message


@pytest.mark.parametrize("uri", ["pvc://claim/model", "s3://bucket/model", "hf://a/b", "file:///nowhere", ""])
def test_what_cannot_be_read_here_is_not_called_different(tiny_model: Path, uri: str) -> None:
    assert compare(manifest(uri), f"file://{tiny_model}").match is Match.UNKNOWN


def test_the_volume_of_this_machine_is_looked_into(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_model, tmp_path / "models" / "tiny")
    monkeypatch.setenv("FINETUNE_VOLUMES", str(tmp_path))
    assert compare(manifest("pvc://models/tiny"), f"file://{tiny_model}").match is Match.SAME


@pytest.mark.parametrize("base", ["hf://a/b", ["hf://a/b"], 5, None, {}, {"uri": None}])
def test_a_manifest_that_names_no_base_is_unknown(base: object) -> None:
    assert compare({"baseModel": base}, "hf://a/b").match is Match.UNKNOWN

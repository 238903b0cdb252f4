"""Model folders that a download left incomplete, and target modules checked against the names in the weight files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer import model_files
from finetune_trainer.failures import BadConfig, ModelNotFound
from finetune_trainer.methods import targets
from finetune_trainer.runfile import MethodType

URI = "file:///models/tiny"
TOKENIZER: dict[str, Any] = {
    "version": "1.0",
    "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"},
}
SHAPES = {
    "model.embed_tokens.weight": [10, 4],
    "model.layers.0.self_attn.q_proj.weight": [4, 4],
    "model.layers.0.mlp.up_proj.weight": [8, 4],
    "model.layers.0.input_layernorm.weight": [4],
    "lm_head.weight": [10, 4],
}
LLAMA = {"model_type": "llama"}


def write_weights(path: Path, shapes: dict[str, list[int]], *, missing: int = 0) -> Path:
    """A safetensors file of zeros; `missing` bytes are cut off at its end."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end - missing))
    return path


def test_names_and_shapes_are_read_from_every_file(tmp_path: Path) -> None:
    write_weights(tmp_path / "model-1.safetensors", {"a.weight": [2, 3]})
    write_weights(tmp_path / "model-2.safetensors", {"b.bias": [3]})
    assert model_files.read_tensors(tmp_path, uri=URI) == {"a.weight": [2, 3], "b.bias": [3]}


def test_weights_that_are_cut_off_are_named_with_the_bytes_that_are_there(tmp_path: Path) -> None:
    size = write_weights(tmp_path / "model.safetensors", SHAPES, missing=7).stat().st_size
    with pytest.raises(
        ModelNotFound, match=rf"model.safetensors of {URI} is cut off: {size} of {size + 7} bytes"
    ):
        model_files.read_tensors(tmp_path, uri=URI)


@pytest.mark.parametrize("content", [b"", b"short", b"version https://git-lfs"])
def test_a_file_that_is_no_safetensors_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(
        ModelNotFound, match=r"model.safetensors of .* cannot be read .*copy the model's folder again"
    ):
        model_files.read_tensors(tmp_path, uri=URI)


def test_a_weight_file_that_only_the_index_knows_is_named(tmp_path: Path) -> None:
    write_weights(tmp_path / "one.safetensors", {"a.weight": [2, 3]})
    weight_map = {"a.weight": "one.safetensors", "b.weight": "two.safetensors"}
    (tmp_path / model_files.INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelNotFound, match=r"has no two\.safetensors, which .*index.json lists"):
        model_files.read_tensors(tmp_path, uri=URI)


def test_an_index_of_another_shape_is_named(tmp_path: Path) -> None:
    (tmp_path / model_files.INDEX).write_text(json.dumps({"weight_map": ["a.weight"]}))
    with pytest.raises(ModelNotFound, match=r"weight_map in .*index.json .* is not an object"):
        model_files.read_tensors(tmp_path, uri=URI)


def test_a_tokenizer_that_is_whole_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    model_files.check_tokenizer(tmp_path, uri=URI)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", json.dumps(TOKENIZER)[:40]),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", ""),
        ("tokenizer_config.json", '{"eos_token": '),
        ("tokenizer_config.json", "[]"),
    ],
)
def test_a_broken_tokenizer_is_named_with_a_remedy(tmp_path: Path, file: str, content: str) -> None:
    (tmp_path / file).write_text(content)
    with pytest.raises(ModelNotFound) as caught:
        model_files.check_tokenizer(tmp_path, uri=URI)
    for part in (file, URI, str(tmp_path), "copy the model's folder again"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("quantization", "refused"),
    [
        (None, []),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, ["Full"]),
        ({"load_in_4bit": True}, ["Full"]),
        ({"quant_method": "awq", "bits": 4}, ["QLoRA", "Full"]),
    ],
)
def test_weights_that_are_quantized_already_are_for_methods_that_can_use_them(
    quantization: dict[str, Any] | None, refused: list[str]
) -> None:
    for method in MethodType:
        if method not in refused:
            model_files.check_quantization({"quantization_config": quantization}, method, uri=URI)
            continue
        with pytest.raises(
            BadConfig, match=f"^method.type: {method} .*{URI}.* quantized already .* or use LoRA"
        ):
            model_files.check_quantization({"quantization_config": quantization}, method, uri=URI)


@pytest.mark.parametrize(
    "names", [["q_proj"], ["up_proj", "self_attn.q_proj"], ["all-linear"], ["any.way.q_proj"]]
)
def test_target_modules_that_the_files_name_pass(names: list[str]) -> None:
    targets.check_early(names, LLAMA, SHAPES)


@pytest.mark.parametrize(
    "name", ["q_projection", "self_attn.q_projection", "embed_tokens", "input_layernorm"]
)
def test_a_target_module_that_no_module_matches_is_refused_with_those_that_exist(name: str) -> None:
    with pytest.raises(BadConfig) as caught:
        targets.check_early(["q_proj", name], LLAMA, SHAPES)
    assert f"method.lora.targetModules: the model has no module {name!r}" in str(caught.value)
    assert "choose from q_proj, up_proj, or all-linear" in str(caught.value)


@pytest.mark.parametrize("config", [{"model_type": "mixtral"}, {**LLAMA, "quantization_config": {}}, {}])
def test_where_names_may_change_while_loading_the_files_say_nothing(config: dict[str, Any]) -> None:
    targets.check_early(["experts"], config, SHAPES)

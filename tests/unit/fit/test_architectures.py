"""Parameters of published models, from their config.json or from their tensors, to the last one."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_fit import architectures, memory
from finetune_fit.architectures import UnknownArchitectureError
from finetune_fit.memory import Method, Workload
from tests.unit.fit import models


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (models.LLAMA_2_7B, 6_738_415_616),
        (models.LLAMA_3_8B, 8_030_261_248),
        (models.LLAMA_65B, 65_285_660_672),
        (models.QWEN_2_5_7B, 7_615_616_512),
        (models.QWEN_3_0_6B, 596_049_920),
        (models.GEMMA_2B, 2_506_172_416),
        (models.PHI_3_MINI, 3_821_079_552),
        (models.MIXTRAL_8X7B, 46_702_792_704),
        (models.GPT_2, 124_439_808),
        (models.PYTHIA_160M, 162_322_944),
        (models.SMOLLM2_135M, 134_515_008),
    ],
)
def test_parameters_are_those_of_the_model_card(config: dict[str, Any], parameters: int) -> None:
    assert architectures.read(config).parameters == parameters


def test_parameters_of_an_adapter() -> None:
    """41,943,040 for Llama-3.1-8B at rank 16 on all linear layers, as PEFT prints it."""
    work = Workload(Method.LORA, rows=1, length=512, rank=16)
    model = architectures.read(models.LLAMA_3_8B)
    assert memory.trained_parameters(model, work) == 41_943_040
    only = Workload(Method.LORA, rows=1, length=512, rank=8, targets=("q_proj", "self_attn.v_proj"))
    assert memory.trained_parameters(model, only) == 3_407_872


def tensors() -> dict[str, list[int]]:
    """A Llama of two layers, as its file lists them."""
    found = {"model.embed_tokens.weight": [100, 8], "lm_head.weight": [100, 8], "model.norm.weight": [8]}
    for layer in range(2):
        for name, shape in (("q", [8, 8]), ("k", [4, 8]), ("v", [4, 8]), ("o", [8, 8])):
            found[f"model.layers.{layer}.self_attn.{name}_proj.weight"] = shape
        for name, shape in (("gate", [16, 8]), ("up", [16, 8]), ("down", [8, 16])):
            found[f"model.layers.{layer}.mlp.{name}_proj.weight"] = shape
        found[f"model.layers.{layer}.input_layernorm.weight"] = [8]
        found[f"model.layers.{layer}.post_attention_layernorm.weight"] = [8]
    return found


CONFIG = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 100, "tie_word_embeddings": False,
}  # fmt: skip


def test_counted_and_derived_agree() -> None:
    counted, derived = architectures.read(CONFIG, tensors()), architectures.read(CONFIG)
    assert counted.exact
    assert not derived.exact
    assert counted.parameters == derived.parameters
    assert {(one.name, one.inputs, one.outputs, one.count) for one in counted.linears} == {
        (one.name, one.inputs, one.outputs, one.count) for one in derived.linears
    }
    assert (counted.embeddings, counted.head, counted.gated) == (800, 800, True)


def test_a_tied_head_that_the_file_holds_too_is_one_matrix() -> None:
    tied = architectures.read(CONFIG | {"tie_word_embeddings": True}, tensors())
    assert tied.head == 0
    assert tied.parameters == architectures.read(CONFIG, tensors()).parameters - 800


def test_an_unknown_family_can_be_counted_but_not_guessed() -> None:
    unknown = CONFIG | {"model_type": "novel"}
    assert architectures.read(unknown, tensors()).parameters == architectures.read(CONFIG).parameters
    with pytest.raises(UnknownArchitectureError, match="model_type 'novel'"):
        architectures.read(unknown)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"hidden_size": None}, "no hidden_size"),
        ({"hidden_size": "8"}, "hidden_size is '8'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"vocab_size": True}, "vocab_size is True"),
        ({"intermediate_size": 2**50}, "intermediate_size"),
    ],
)
def test_a_broken_configuration_names_the_field(change: dict[str, Any], problem: str) -> None:
    with pytest.raises(UnknownArchitectureError, match=problem):
        architectures.read(CONFIG | change)


def test_the_language_model_of_a_larger_one_is_read() -> None:
    assert architectures.read({"model_type": "llava", "text_config": CONFIG}).layers == 2

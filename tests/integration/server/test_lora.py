"""Rows of one batch, each with its own adapter: what PEFT gives for each alone, and the bare model for the base."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from finetune_server import adapters, patterns
from finetune_server.lora import AdapterBank
from tests.adapters import rewrite_config, write_adapter

KINDS = ["all", "attention", "rslora", "patterns"]


def load(model: Path) -> torch.nn.Module:
    return transformers.AutoModelForCausalLM.from_pretrained(model).eval()


@pytest.fixture
def inputs() -> torch.Tensor:
    return torch.randint(3, 250, (6, 11), generator=torch.Generator().manual_seed(3))


def make_bank(model: Path, found: dict[str, Path]) -> tuple[torch.nn.Module, AdapterBank]:
    module = load(model)
    bank = AdapterBank(module)
    for name, folder in found.items():
        bank.add(name, adapters.read_adapter(folder, shapes=bank.shapes(), max_rank=16))
    return module, bank


def logits(module: torch.nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return module(input_ids=inputs).logits


def test_a_mixed_batch_gives_what_peft_gives_for_each_adapter_alone(
    tiny_model: Path, tiny_adapters: dict[str, Path], inputs: torch.Tensor
) -> None:
    module, bank = make_bank(tiny_model, tiny_adapters)
    rows: list[str | None] = [None, *KINDS, None]
    bank.select(rows, device="cpu")

    found = logits(module, inputs)

    bare = logits(load(tiny_model), inputs)
    for row, name in enumerate(rows):
        if name is None:
            # Not nearly: the base rows of a mixed batch are the bare model's, to the last bit.
            assert torch.equal(found[row], bare[row])
        else:
            expected = logits(peft.PeftModel.from_pretrained(load(tiny_model), tiny_adapters[name]), inputs)[
                row
            ]
            torch.testing.assert_close(found[row], expected, atol=1e-4, rtol=1e-4)
            assert (found[row] - bare[row]).abs().max() > 0.1


def test_the_base_is_exact_while_and_after_adapters_are_loaded(
    tiny_model: Path, tiny_adapters: dict[str, Path], inputs: torch.Tensor
) -> None:
    bare = logits(load(tiny_model), inputs)
    module, bank = make_bank(tiny_model, tiny_adapters)
    bank.select(["all"] * 6, device="cpu")
    logits(module, inputs)

    bank.select([None] * 6, device="cpu")
    assert torch.equal(logits(module, inputs), bare)
    for name in KINDS:
        bank.remove(name)
    assert torch.equal(logits(module, inputs), bare)


@pytest.mark.parametrize("gone", KINDS)
def test_unloading_one_adapter_leaves_the_others_as_they_were(
    tiny_model: Path, tiny_adapters: dict[str, Path], inputs: torch.Tensor, gone: str
) -> None:
    module, bank = make_bank(tiny_model, tiny_adapters)
    kept = [name for name in KINDS if name != gone]
    before = {}
    for name in kept:
        bank.select([name] * 6, device="cpu")
        before[name] = logits(module, inputs)

    bank.remove(gone)

    for name in kept:
        bank.select([name] * 6, device="cpu")
        torch.testing.assert_close(logits(module, inputs), before[name], atol=1e-5, rtol=1e-5)
    assert bank.names() == kept


def test_an_overflowing_adapter_does_not_touch_its_neighbours(
    tiny_model: Path, tiny_adapters: dict[str, Path], inputs: torch.Tensor, tmp_path: Path
) -> None:
    huge = write_adapter(tiny_model, tmp_path / "huge", seed=9, lora_alpha=1e38)
    module, bank = make_bank(tiny_model, {"all": tiny_adapters["all"], "huge": huge})
    bank.select(["all", None, "huge", "all", None, "all"], device="cpu")

    found = logits(module, inputs)

    assert not torch.isfinite(found[2]).all()
    bare = logits(load(tiny_model), inputs)
    assert torch.equal(found[1], bare[1])
    assert torch.equal(found[4], bare[4])
    assert torch.isfinite(found[[0, 3, 5]]).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"lora_alpha": 10**400}, "must be a number above 0"),
        ({"use_dora": True}, "use_dora is true"),
        ({"bias": "all"}, 'bias is "all"'),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"lora_alpha": "x"}, "lora_alpha"),
        ({"r": 0}, "r is 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern must hold numbers"),
        ({"alpha_pattern": ["q_proj"]}, "alpha_pattern must hold numbers"),
        ({"alpha_pattern": {"(": 1}}, r"'\(' in alpha_pattern is no regular expression"),
        ({"alpha_pattern": {"x{99999999999}": 1}}, "repetition number is too large"),
        ({"alpha_pattern": {"(?i)q_proj": 1}}, "global flags not at the start"),
    ],
)
def test_what_cannot_be_applied_exactly_is_refused(
    tiny_adapters: dict[str, Path], tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    folder = shutil.copytree(tiny_adapters["all"], tmp_path / "changed")
    rewrite_config(folder, **changes)
    with pytest.raises(adapters.AdapterError, match=message):
        adapters.read_adapter(folder, shapes={}, max_rank=64)


def test_patterns_mean_the_layers_that_they_mean_to_peft() -> None:
    layers = [f"model.layers.{n}.self_attn.{name}" for n in (1, 11) for name in ("q_proj", "k_proj")]
    assert patterns.first_matches(["1.self_attn.q_proj", "k_proj"], layers) == [0, 1, None, 1]
    assert patterns.first_matches([r"layers\.\d\..*", "k_proj"], layers) == [0, 0, None, 1]


def test_patterns_that_match_for_ever_are_refused(
    tiny_adapters: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(tiny_adapters["all"], tmp_path / "endless")
    rewrite_config(folder, alpha_pattern={"(.|..|...|....)*z": 1})
    monkeypatch.setattr(patterns, "SECONDS", 0.2)
    with pytest.raises(adapters.AdapterError, match=r"matching alpha_pattern takes more than 0\.2 s"):
        adapters.read_adapter(folder, shapes={}, max_rank=64)


def test_rank_base_and_content_are_checked(
    tiny_model: Path, tiny_adapters: dict[str, Path], tmp_path: Path
) -> None:
    shapes = AdapterBank(load(tiny_model)).shapes()
    with pytest.raises(adapters.RankTooLarge, match="rank 8 is greater than max_lora_rank 4"):
        adapters.read_adapter(tiny_adapters["all"], shapes=shapes, max_rank=4)
    wider = {name: (2 * inner, outer) for name, (inner, outer) in shapes.items()}
    with pytest.raises(adapters.WrongBase, match="another model"):
        adapters.read_adapter(tiny_adapters["all"], shapes=wider, max_rank=64)
    with pytest.raises(adapters.WrongBase, match="does not have"):
        adapters.read_adapter(tiny_adapters["all"], shapes={}, max_rank=64)
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json"):
        adapters.read_adapter(tmp_path, shapes=shapes, max_rank=64)
    broken = shutil.copytree(tiny_adapters["all"], tmp_path / "broken")
    weights = broken / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(adapters.AdapterError, match="cannot be read"):
        adapters.read_adapter(broken, shapes=shapes, max_rank=64)
    with pytest.raises(adapters.AdapterError, match="Not a directory"):
        adapters.read_adapter(weights, shapes=shapes, max_rank=64)
    (broken / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(adapters.AdapterError, match=r"chat_template\.jinja cannot be read"):
        adapters.read_template(broken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensor: tensor.fill_(float("nan")), "not finite"),
        (lambda tensor: tensor.double().fill_(1e300), "not finite"),
        (lambda tensor: tensor.to(torch.int8), "of type torch.int8"),
        (lambda tensor: tensor[:0] if tensor.shape[0] == 8 else tensor[:, :0].contiguous(), "do not fit"),
    ],
    ids=["nan", "float64", "int8", "rank-0"],
)
def test_weights_that_give_no_numbers_are_refused(
    tiny_model: Path, tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    folder = write_adapter(tiny_model, tmp_path / "changed", seed=1)
    tensors = load_file(folder / adapters.WEIGHTS)
    save_file({name: change(tensor) for name, tensor in tensors.items()}, folder / adapters.WEIGHTS)
    shapes = AdapterBank(load(tiny_model)).shapes()
    with pytest.raises(adapters.AdapterError, match=message):
        adapters.read_adapter(folder, shapes=shapes, max_rank=64)


def test_a_scale_that_makes_weights_infinite_is_refused(
    tiny_model: Path, tiny_adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_adapters["all"], tmp_path / "scaled")
    rewrite_config(folder, lora_alpha=1e308)
    shapes = AdapterBank(load(tiny_model)).shapes()
    with pytest.raises(adapters.AdapterError, match=r"not finite \(scaled by 1.25e\+307\)"):
        adapters.read_adapter(folder, shapes=shapes, max_rank=64)


def test_weights_of_a_smaller_type_are_served(tiny_model: Path, inputs: torch.Tensor, tmp_path: Path) -> None:
    folder = write_adapter(tiny_model, tmp_path / "small", seed=1)
    tensors = load_file(folder / adapters.WEIGHTS)
    small = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in tensors.items()}
    save_file(small, folder / adapters.WEIGHTS)
    module, bank = make_bank(tiny_model, {"small": folder})
    bank.select(["small"] * 6, device="cpu")
    assert torch.isfinite(logits(module, inputs)).all()

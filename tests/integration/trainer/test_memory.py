"""The estimate of memory against what torch allocates here, for the tiny model and for one of 135 M parameters.

Weights, gradients and optimizer states must agree to the byte (but for the books of the 8-bit optimizer and of 4-bit
weights); what autograd keeps is measured with saved_tensors_hooks and must agree within a few percent.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_fit import architectures, memory
from finetune_fit.memory import Method, Workload
from finetune_trainer import runfile
from tests import tiny
from tests.unit.fit.models import SMOLLM2_135M

pytestmark = pytest.mark.integration

LORA: dict[str, Any] = {"type": "LoRA", "lora": {"r": 16, "dropout": 0.05}}
METHODS: dict[str, dict[str, Any]] = {
    "LoRA": LORA,
    "QLoRA": {"type": "QLoRA", "lora": {"r": 16}, "quantization": {}},
    "Full": {"type": "Full"},
}


def write_model(folder: Path, **more: Any) -> Path:
    """A model of SmolLM2-135M's shape with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {name: value for name, value in SMOLLM2_135M.items() if name != "model_type"}
    LlamaForCausalLM(LlamaConfig(**shape | more)).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "small")


@pytest.fixture(scope="module")
def shallow_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with fewer layers and words: what autograd keeps is the same in each layer, and most of it theirs."""
    folder = tmp_path_factory.mktemp("model") / "shallow"
    return write_model(folder, num_hidden_layers=6, vocab_size=8_192)


@pytest.fixture(params=["tiny", "small"])
def model_folder(request: pytest.FixtureRequest, tiny_model: Path, small_model: Path) -> Path:
    return tiny_model if request.param == "tiny" else small_model


def read(folder: Path) -> architectures.Architecture:
    from finetune_trainer import model_files

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return architectures.read(config, model_files.read_tensors(folder, uri=str(folder)))


def load(folder: Path, method: dict[str, Any], *, bfloat16: bool = False) -> Any:
    """The model as the trainer loads and adapts it, with TRL's loss in tiles."""
    import peft
    import torch
    from trl.trainer.utils import add_fused_lm_head

    from finetune_trainer.methods import adapters, models

    run = runfile.parse(json.dumps(tiny.run_document(folder, folder, folder, method=method)))
    device = models.Device("cpu", "cpu", has_bfloat16=bfloat16)
    precision = runfile.Precision.BFLOAT16 if bfloat16 else runfile.Precision.FLOAT32
    torch.manual_seed(0)
    model = models.load_base(run, folder, device=device, precision=precision)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    if run.method.type is not runfile.MethodType.FULL:
        model = peft.get_peft_model(model, adapters.build_lora(run.lora, model))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    return model.train()


def storages(tensors: Any) -> dict[int, int]:
    """Bytes of each memory block behind the tensors, by its address."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def held_weights(model: Any) -> int:
    """Bytes of the weights, with the quantization's constants."""
    blocks = storages(model.parameters())
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            blocks |= storages([state.absmax] + ([state.state2.absmax] if state.nested else []))
    return sum(blocks.values())


def step(model: Any, *, rows: int, length: int, bfloat16: bool = False) -> dict[int, int]:
    """One forward and backward pass; returns the blocks that autograd kept between them, weights left out."""
    import torch

    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = torch.randint(0, vocabulary, (rows, length))
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Any) -> Any:
        alive.append(tensor)  # so that no address is used twice
        kept.update(storages([tensor]))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), _autocast(bfloat16):
        loss = model(input_ids=tokens, labels=tokens, fused_lm_head=True).loss
    weights = storages(model.parameters())
    found = {address: size for address, size in kept.items() if address not in weights}
    loss.backward()
    return found


@contextlib.contextmanager
def _autocast(bfloat16: bool) -> Iterator[None]:
    import torch

    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
        yield


def workload(method: str, **more: Any) -> Workload:
    return Workload(Method(method), bfloat16=False, on_gpu=False, **({"rows": 1, "length": 16} | more))


@pytest.mark.parametrize("method", ["LoRA", "QLoRA", "Full"])
def test_weights_gradients_and_optimizer_states_are_counted(model_folder: Path, method: str) -> None:
    import torch

    model, expected = (
        load(model_folder, METHODS[method]),
        memory.estimate(read(model_folder), workload(method)),
    )
    assert expected.parameters == read(model_folder).parameters
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == expected.trained_parameters
    assert held_weights(model) == pytest.approx(expected.weights + expected.trainable, rel=0.01)
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    step(model, rows=1, length=16)
    optimizer.step()
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in trained if p.grad is not None)
    assert gradients == expected.gradients
    moments = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert sum(storages(moments).values()) == expected.optimizer


def compare_kept(model: Any, folder: Path, method: str, bfloat16: bool, rows: int, length: int) -> None:
    kept = sum(step(model, rows=rows, length=length, bfloat16=bfloat16).values())
    work = Workload(Method(method), rows=rows, length=length, bfloat16=bfloat16, on_gpu=False)
    expected = memory.estimate(read(folder), work).activations
    print(
        f"{method} bfloat16={bfloat16} {rows}x{length}: kept {kept:,}, estimated {expected:,} ({expected / kept:.3f})"
    )
    assert expected == pytest.approx(kept, rel=0.1)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("method", ["LoRA", "Full"])
def test_what_autograd_keeps_is_estimated_within_a_tenth(
    shallow_model: Path, method: str, bfloat16: bool
) -> None:
    model = load(shallow_model, METHODS[method], bfloat16=bfloat16)
    for rows, length in ((1, 256), (4, 64)):
        compare_kept(model, shallow_model, method, bfloat16, rows, length)


@pytest.mark.parametrize(
    ("method", "bfloat16", "rows", "length"), [("LoRA", True, 1, 256), ("Full", False, 4, 64)]
)
def test_what_autograd_keeps_is_estimated_within_a_tenth_at_full_depth(
    small_model: Path, method: str, bfloat16: bool, rows: int, length: int
) -> None:
    model = load(small_model, METHODS[method], bfloat16=bfloat16)
    compare_kept(model, small_model, method, bfloat16, rows, length)


def test_with_checkpointing_only_the_inputs_of_the_layers_are_kept(small_model: Path) -> None:
    model = load(small_model, LORA)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    kept = sum(step(model, rows=2, length=128).values())
    shape = read(small_model)
    expected = memory.estimate(shape, workload("LoRA", rows=2, length=128, checkpointing=True)).activations
    one_layer = (expected - 4 * shape.layers * shape.hidden * 256) / expected
    print(f"checkpointing: kept {kept:,}, estimated {expected:,}, of which one layer {one_layer:.2f}")
    assert kept < expected < 3 * kept


def test_what_cannot_fit_is_refused_before_weights_are_loaded(
    small_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from finetune_trainer import fit
    from finetune_trainer.failures import BadConfig
    from finetune_trainer.methods import models
    from finetune_trainer.preflight import Checked

    def check(method: str, memory_bytes: int | None) -> str:
        document = tiny.run_document(small_model, small_model, small_model, method=METHODS[method])
        run = runfile.parse(json.dumps(document))
        device = models.Device("cuda:0", "NVIDIA L4", has_bfloat16=True, memory_bytes=memory_bytes)
        config = json.loads((small_model / "config.json").read_text(encoding="utf-8"))
        checked = Checked(small_model, None, config, [], [], "sha256:0")
        fit.check(run, checked, device, precision=runfile.Precision.BFLOAT16, length=500)
        return capsys.readouterr().out

    with pytest.raises(
        BadConfig, match=r"method.type: Full .* states alone need 2.0 GiB, and NVIDIA L4 has 2.0 GiB"
    ):
        check("Full", 2 * memory.GIB)
    assert check("Full", 3 * memory.GIB).startswith("warning: memory: needs about")
    assert check("LoRA", 16 * memory.GIB).startswith("memory: needs about")
    assert "on the CPU" in check("LoRA", None)

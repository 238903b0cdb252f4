"""The estimate against what others have published, and against itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_fit import accelerators, architectures, memory, runs, verdicts
from finetune_fit.accelerators import Accelerator
from finetune_fit.memory import GIB, Method, Workload
from finetune_fit.verdicts import Fit
from tests.unit.fit import models

GB = 10**9
SMALL = Workload(Method.LORA, rows=1, length=512, checkpointing=True)


def total(config: dict[str, Any], method: Method, **more: Any) -> float:
    work = replace(SMALL, method=method, **more)
    return memory.estimate(architectures.read(config), work).total


@pytest.mark.parametrize(
    ("method", "published"), [(Method.FULL, 120 * GB), (Method.LORA, 16 * GB), (Method.QLORA, 6 * GB)]
)
def test_a_7b_model_needs_what_llama_factorys_table_says(method: Method, published: float) -> None:
    """README of LLaMA-Factory, "Hardware Requirement" (estimated there, too): 7B with full AMP, LoRA 16, QLoRA 4."""
    assert total(models.LLAMA_2_7B, method) == pytest.approx(published, rel=0.1)


def test_qlora_of_65b_fits_into_48_gb() -> None:
    """The claim of the QLoRA paper (arXiv 2305.14314, abstract); 16 bits would take more than 780 GB there."""
    assert total(models.LLAMA_65B, Method.QLORA) < 48 * GIB
    assert total(models.LLAMA_65B, Method.FULL) > 780 * GB


def test_four_bit_weights_have_the_papers_size() -> None:
    """0.127 bits per parameter for the constants with double quantization, 0.5 without (QLoRA, section 3)."""
    model = architectures.read(models.LLAMA_2_7B)
    linear = sum(layer.parameters for layer in model.linears)
    rest = 4 * (model.parameters - linear)
    for double, bits in ((True, 4.127), (False, 4.5)):
        work = replace(SMALL, method=Method.QLORA, double_quantization=double)
        held = memory.estimate(model, work).weights - rest
        assert 8 * held / linear == pytest.approx(bits, abs=0.001)


def test_full_training_takes_16_bytes_a_parameter_and_2_for_autocast() -> None:
    """16: ZeRO (arXiv 1910.02054, section 3.1); 18: docs of transformers, "GPU memory usage" (6 + 8 + 4)."""
    model = architectures.read(models.LLAMA_2_7B)
    needed = memory.estimate(model, replace(SMALL, method=Method.FULL))
    assert needed.certain == 16 * model.parameters
    assert needed.total / model.parameters == pytest.approx(18, rel=0.05)
    eight_bit = memory.estimate(model, replace(SMALL, method=Method.FULL, optimizer="AdamW8bit"))
    assert eight_bit.optimizer / model.parameters == pytest.approx(2, rel=0.02)


WORKS = st.builds(
    Workload,
    method=st.sampled_from(Method),
    rows=st.integers(1, 64),
    length=st.integers(8, 65536),
    bfloat16=st.booleans(),
    checkpointing=st.booleans(),
    optimizer=st.sampled_from(["AdamW", "AdamW8bit", "SGD", "unheard of"]),
    rank=st.integers(1, 1024),
    targets=st.sampled_from([("all-linear",), ("q_proj",), ("no_such",), ("a.b.v_proj", "o_proj")]),
    dropout=st.booleans(),
    objective=st.sampled_from([*memory.OBJECTIVES, "unheard of"]),
    on_gpu=st.booleans(),
)
MODELS = st.sampled_from(
    [models.LLAMA_3_8B, models.QWEN_3_0_6B, models.GPT_2, models.MIXTRAL_8X7B, models.PHI_3_MINI]
)


@given(config=MODELS, work=WORKS)
def test_more_never_needs_less(config: dict[str, Any], work: Workload) -> None:
    model = architectures.read(config)
    needed = memory.estimate(model, work)
    assert all(size >= 0 for size in needed.parts().values())
    assert needed.total == sum(needed.parts().values())
    for more in (
        replace(work, rows=work.rows + 1),
        replace(work, length=work.length + 64),
        replace(work, rank=work.rank + 1),
        replace(work, bfloat16=False) if work.method is not Method.FULL else work,
        replace(work, objective="DPO") if work.objective == "SFT" else work,
    ):
        assert memory.estimate(model, more).total >= needed.total
    assert memory.estimate(model, replace(work, checkpointing=True)).activations <= needed.activations or (
        work.checkpointing or model.layers == 1
    )
    unknown = memory.estimate(model, replace(work, objective="unheard of"))
    assert unknown.total >= needed.total
    assert all(option.estimate.total < needed.total for option in memory.options(model, work))


@given(config=MODELS, work=WORKS, accelerator=st.sampled_from(accelerators.ACCELERATORS))
def test_a_verdict_is_one_of_three_and_its_ways_out_fit(
    config: dict[str, Any], work: Workload, accelerator: Accelerator
) -> None:
    model = architectures.read(config)
    capacity = accelerator.memory_bytes
    verdict = verdicts.judge(model, work, capacity=capacity, device=accelerator.name)
    needed = verdict.estimate
    match verdict.fit:
        case Fit.FITS:
            assert needed.total <= 0.9 * capacity
            assert verdict.ways == ()
        case Fit.TIGHT:
            assert needed.certain + needed.overhead <= capacity
        case Fit.TOO_LARGE:
            assert needed.certain + needed.overhead > capacity
        case Fit.UNKNOWN:
            raise AssertionError("the capacity is known")
    assert all(way.estimate.total <= 0.9 * capacity for way in verdict.ways)
    assert len(verdict.message) < 600


def test_the_message_has_the_numbers_and_what_would_fit() -> None:
    model = architectures.read(models.LLAMA_3_8B)
    l4 = accelerators.find("nvidia-l4")
    assert l4 is not None
    full = verdicts.judge(model, replace(SMALL, method=Method.FULL), capacity=l4.memory_bytes, device=l4.name)
    assert full.fit is Fit.TOO_LARGE
    assert (
        "weights, gradients and optimizer states alone need 119.7 GiB, and NVIDIA-L4 has 22.5 GiB"
        in full.message
    )
    assert "method LoRA, gradientCheckpointing would need" in full.message
    lora = replace(SMALL, rows=8, length=2048, checkpointing=False)
    verdict = verdicts.judge(model, lora, capacity=l4.memory_bytes, device=l4.name)
    assert verdict.fit is Fit.TIGHT
    assert "activations" in verdict.message
    assert "would need" in verdict.message
    unknown = verdicts.judge(model, lora, capacity=None, device="the GPU")
    assert (unknown.fit, unknown.capacity) == (Fit.UNKNOWN, None)


def test_nothing_that_fits_is_said_as_such() -> None:
    model = architectures.read(models.LLAMA_65B)
    verdict = verdicts.judge(model, SMALL, capacity=15 * GIB, device="Tesla-T4")
    assert verdict.ways == ()
    assert "use a GPU with more memory or a smaller model" in verdict.message


def test_names_of_gpus_are_told_apart() -> None:
    names = [name.lower() for one in accelerators.ACCELERATORS for name in (one.name, *one.aliases)]
    assert len(names) == len(set(names))
    assert accelerators.find("NVIDIA-A100-SXM4-80GB") is accelerators.find("a100-80gb")
    assert accelerators.find("NVIDIA L4") is accelerators.find("nvidia-l4")
    assert accelerators.find("abacus") is None
    assert accelerators.find(None) is None


def test_disk_of_an_adapter_is_small_and_of_full_training_large() -> None:
    model = architectures.read(models.LLAMA_3_8B)
    lora = runs.disk(model, SMALL, keep=2)
    assert lora.artifact == pytest.approx(168e6, rel=0.02)
    assert lora.checkpoint == pytest.approx(3 * 168e6, rel=0.02)
    assert lora.checkpoints == 3 * lora.checkpoint
    full = runs.disk(model, replace(SMALL, method=Method.FULL), keep=1)
    assert full.checkpoint == pytest.approx(12 * 8.03e9, rel=0.01)


def test_steps_and_time() -> None:
    assert runs.steps(rows=100, global_batch=16, epochs=3) == 21
    assert runs.steps(rows=1, global_batch=16, epochs=0.1) == 1
    assert [runs.micro_batch_size(batch) for batch in (16, 7, 9, 1, 11)] == [8, 7, 3, 1, 1]
    model, h100 = architectures.read(models.LLAMA_3_8B), accelerators.find("H100")
    assert h100 is not None
    lora = replace(SMALL, length=2048, checkpointing=False)
    seconds = runs.seconds(model, lora, h100, steps=100, global_batch=16)
    assert seconds == pytest.approx(4 * 8.03e9 * 100 * 16 * 2048 / (0.35 * 989e12), rel=1e-3)

"""What `finetune plan` computes for one job: memory, disk, steps, time and cost. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from finetune_fit import accelerators, architectures, memory, runs, verdicts
from finetune_fit.accelerators import Accelerator
from finetune_fit.architectures import Architecture
from finetune_fit.memory import Method, Workload
from finetune_fit.prices import PriceTable
from finetune_fit.verdicts import Fit, Verdict
from finetune_operator.api.finetunejob import FineTuneJobSpec, Precision
from finetune_operator.core.durations import format_duration


@dataclass(frozen=True)
class Assumptions:
    """What the spec alone does not say."""

    rows: int | None = None
    """Rows to train on; None: not known."""
    prices: PriceTable | None = None
    accelerator: str | None = None
    """Kind of GPU where the spec names none."""


@dataclass(frozen=True)
class JobPlan:
    """What a job needs, as far as that is known."""

    model: Architecture
    work: Workload
    verdict: Verdict
    device: str
    named: bool
    """Whether somebody named a kind of GPU."""
    accelerator: Accelerator | None
    smallest: Accelerator | None
    """The smallest GPU of the table that it fits into."""
    methods: dict[Method, memory.Estimate]
    disk: runs.Disk
    steps: int | None
    seconds: float | None
    gpu_hour: float | None
    currency: str | None
    notes: Sequence[str]

    @property
    def cost(self) -> float | None:
        """In the table's currency; None where time or price are not known."""
        if self.seconds is None or self.gpu_hour is None:
            return None
        return self.seconds / 3600 * self.gpu_hour


def plan_job(
    spec: FineTuneJobSpec,
    config: dict[str, Any],
    tensors: dict[str, list[int]] | None,
    assumptions: Assumptions,
) -> JobPlan:
    """The plan of a job over the model with this config.json. Raises UnknownArchitectureError."""
    model = architectures.read(config, tensors)
    name = spec.resources.accelerator_type or assumptions.accelerator
    accelerator = accelerators.find(name)
    work = describe(spec, accelerator, limit=config.get("max_position_embeddings"))
    on_gpu = work.on_gpu
    capacity = accelerator.memory_bytes if accelerator else None
    device = (accelerator.name if accelerator else name or "the GPU") if on_gpu else "the training pod"
    if not on_gpu:
        capacity = bytes_of(spec.resources.memory)
    verdict = verdicts.judge(model, work, capacity=capacity, device=device)
    steps = _steps(spec, assumptions.rows)
    seconds = None
    if steps is not None and accelerator is not None and on_gpu:
        batch = spec.hyperparameters.global_batch_size
        seconds = runs.seconds(model, work, accelerator, steps=steps, global_batch=batch)
    prices = assumptions.prices
    return JobPlan(
        model=model,
        work=work,
        verdict=verdict,
        device=device,
        named=on_gpu and bool(name),
        accelerator=accelerator,
        smallest=_smallest(verdict.estimate.total) if on_gpu else None,
        methods=memory.methods(model, work),
        disk=runs.disk(model, work, keep=spec.checkpoint.keep),
        steps=steps,
        seconds=seconds,
        gpu_hour=prices.gpu_hour(accelerator.name if accelerator else name) if prices and on_gpu else None,
        currency=prices.currency if prices else None,
        notes=_notes(spec, model, accelerator, name, assumptions),
    )


def describe(spec: FineTuneJobSpec, accelerator: Accelerator | None, *, limit: int | None) -> Workload:
    """The spec in the terms of the estimate, with the choices that the trainer would make. `limit`: the model's
    positions."""
    hyper, method = spec.hyperparameters, spec.method
    on_gpu = spec.resources.gpus_per_worker > 0
    has_bfloat16 = accelerator.bfloat16 if accelerator else True
    precise = hyper.precision is Precision.FLOAT32 or (
        hyper.precision is Precision.AUTO and not (on_gpu and has_bfloat16)
    )
    lora, quantization = method.lora, method.quantization
    return Workload(
        method=Method(str(method.type)),
        rows=hyper.micro_batch_size or runs.micro_batch_size(hyper.global_batch_size),
        length=min(hyper.max_length, limit) if isinstance(limit, int) and limit > 0 else hyper.max_length,
        bfloat16=not precise,
        checkpointing=hyper.gradient_checkpointing,
        optimizer=str(hyper.optimizer),
        rank=lora.r if lora else 16,
        targets=tuple(lora.target_modules) if lora else (memory.ALL_LINEAR,),
        dropout=lora is None or lora.dropout > 0,
        double_quantization=quantization is None or quantization.double_quant,
        objective=spec.objective,
        on_gpu=on_gpu,
    )


def _steps(spec: FineTuneJobSpec, rows: int | None) -> int | None:
    hyper = spec.hyperparameters
    if hyper.max_steps is not None:
        return hyper.max_steps
    if rows is None:
        return None
    trained = max(1, round(rows * (1 - spec.dataset.split.eval)))
    return runs.steps(rows=trained, global_batch=hyper.global_batch_size, epochs=hyper.epochs)


def _smallest(total: int) -> Accelerator | None:
    fitting = [one for one in accelerators.ACCELERATORS if total <= verdicts.MARGIN * one.memory_bytes]
    return min(fitting, key=lambda one: one.memory_bytes, default=None)


def _notes(
    spec: FineTuneJobSpec,
    model: Architecture,
    accelerator: Accelerator | None,
    name: str | None,
    assumptions: Assumptions,
) -> list[str]:
    notes = []
    if not model.exact:
        notes.append("parameters follow from config.json; with the safetensors files they would be counted")
    if spec.resources.gpus_per_worker and name and accelerator is None:
        known = ", ".join(one.name for one in accelerators.ACCELERATORS)
        notes.append(f"GPU {name} is not in the table, so its memory is not known; there are {known}")
    if spec.resources.gpus_per_worker and not name:
        notes.append(
            "the spec names no GPU (resources.acceleratorType); name one with --accelerator to compare"
        )
    if spec.objective not in memory.OBJECTIVES:
        notes.append(f"objective {spec.objective} is not known here and was estimated on the safe side")
    if spec.hyperparameters.max_steps is None and assumptions.rows is None:
        notes.append("the number of rows is not known, so neither are steps and time; tell it with --rows")
    return notes


def bytes_of(quantity: str) -> int:
    """A Kubernetes quantity of memory in bytes."""
    number = quantity.rstrip("kKMGTPEim")
    prefixes = "kMGTPE"
    suffix = quantity[len(number) :]
    if suffix in ("", "m"):
        return int(Decimal(number) / (1000 if suffix else 1))
    base = 1024 if suffix.endswith("i") else 1000
    return int(Decimal(number) * base ** (prefixes.upper().index(suffix[0].upper()) + 1))


# ---------------------------------------------------------------- for people and for programs

PART_TEXTS = {
    "weights": "base model",
    "trainable": "adapter",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations",
    "logits": "loss",
    "overhead": "process and libraries",
    "fragmentation": "fragmentation",
}


def memory_rows(plan: JobPlan) -> list[list[str]]:
    """The parts of the memory, then the sum."""
    needed = plan.verdict.estimate
    rows = [["MEMORY", "NEEDED"]]
    rows += [[PART_TEXTS[name], verdicts.gib(size)] for name, size in needed.parts().items() if size]
    return [*rows, ["together", verdicts.gib(needed.total)]]


def method_rows(plan: JobPlan) -> list[list[str]]:
    """What each method needs with the same batch."""
    rows = [["METHOD", "MEMORY", "TRAINED PARAMETERS", ""]]
    for method, needed in plan.methods.items():
        fits = "" if plan.verdict.capacity is None else "fits"
        if plan.verdict.capacity is not None and needed.total > verdicts.MARGIN * plan.verdict.capacity:
            fits = "too large"
        mark = "this job" if method is plan.work.method else ""
        share = f"{needed.trained_parameters:,} of {needed.parameters:,}"
        rows.append([str(method), verdicts.gib(needed.total), share, ", ".join(filter(None, (mark, fits)))])
    return rows


def lines(plan: JobPlan) -> list[str]:
    """Disk, steps, time and cost in sentences."""
    disk = plan.disk
    told = [
        f"disk: checkpoints {verdicts.gib(disk.checkpoints)} ({verdicts.gib(disk.checkpoint)} each), "
        f"artifact {verdicts.gib(disk.artifact)}, base model {verdicts.gib(disk.model)}"
    ]
    if plan.steps is not None:
        time = "" if plan.seconds is None else f", at most about {format_duration(plan.seconds)} of training"
        told.append(f"steps: {plan.steps}{time}")
    if plan.cost is not None and plan.seconds is not None:
        hours = f"{plan.seconds / 3600:.2g} GPU hours at {plan.gpu_hour:g}"
        told.append(f"cost: at most about {plan.cost:.2f} {plan.currency} ({hours} {plan.currency} an hour)")
    if plan.smallest is not None:
        told.append(f"smallest GPU: {plan.smallest.name} ({verdicts.gib(plan.smallest.memory_bytes)})")
    elif plan.work.on_gpu:
        told.append("smallest GPU: none of the table is large enough")
    return told


def to_data(plan: JobPlan) -> dict[str, Any]:
    """The plan for programs: sizes in bytes, time in seconds; what is not known is left out."""
    needed = plan.verdict.estimate
    data: dict[str, Any] = {
        "fit": str(plan.verdict.fit),
        "message": plan.verdict.message,
        "device": plan.device,
        "memory": {**needed.parts(), "total": needed.total},
        "capacity": plan.verdict.capacity,
        "parameters": needed.parameters,
        "trainedParameters": needed.trained_parameters,
        "methods": {str(method): one.total for method, one in plan.methods.items()},
        "ways": [{"change": way.name, "memory": way.estimate.total} for way in plan.verdict.ways],
        "disk": {
            "artifact": plan.disk.artifact,
            "checkpoint": plan.disk.checkpoint,
            "checkpoints": plan.disk.checkpoints,
            "model": plan.disk.model,
        },
        "smallestAccelerator": plan.smallest.name if plan.smallest else None,
        "steps": plan.steps,
        "seconds": None if plan.seconds is None else round(plan.seconds),
        "cost": None if plan.cost is None else {"estimated": round(plan.cost, 2), "currency": plan.currency},
        "notes": list(plan.notes),
    }
    return {name: value for name, value in data.items() if value is not None}


__all__ = ["Assumptions", "Fit", "JobPlan", "describe", "plan_job"]

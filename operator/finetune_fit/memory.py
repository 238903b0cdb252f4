"""How much GPU memory a fine-tuning needs, part by part.

Weights, gradients and optimizer states are counted; what autograd keeps for the backward pass is derived from how
transformers computes a layer (see `_kept_by_layer`); tests compare all of it with what torch allocates.
The choices of type are those of the trainer: LoRA over bfloat16 weights with float32 adapters, QLoRA over 4-bit linear
layers with everything else in float32 (peft.prepare_model_for_kbit_training), Full with float32 weights under autocast.

Sources: 4-bit sizes and double quantization, QLoRA (arXiv 2305.14314, section 3); activations of a layer, Korthikanti
et al. (arXiv 2205.05198, section 4); 16 to 18 bytes per parameter of full mixed-precision training with Adam, ZeRO
(arXiv 1910.02054, section 3.1) and huggingface.co/docs/transformers/model_memory_anatomy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from finetune_fit.architectures import Architecture, Linear

GIB = 2**30
ALL_LINEAR = "all-linear"

BLOCK = 64  # weights that share one quantization constant (bitsandbytes)
OUTER_BLOCK = 256  # constants that share one constant of their own, with double quantization
CONTEXT = int(0.6 * GIB)  # CUDA context, loaded kernels and cuBLAS' workspace
PROCESS = int(0.7 * GIB)  # on a CPU: Python with torch, transformers and trl loaded
FRAGMENTATION = 0.05  # of what is allocated anew in every step
# TRL computes the loss of SFT in tiles of so many tokens and words, and never holds all logits (trl/kernels).
TILE_TOKENS, TILE_WORDS = 4_096, 32_768


class Method(StrEnum):
    LORA = "LoRA"
    QLORA = "QLoRA"
    FULL = "Full"


# Bytes of state per trained parameter. AdamW keeps two moments in float32; in 8 bits they share constants by block.
OPTIMIZER_STATE = {"AdamW": 8.0, "AdamW8bit": 2.0 + 2 * 4 / 256, "SGD": 0.0}


@dataclass(frozen=True)
class Objective:
    """What an objective asks for beside supervised fine-tuning."""

    sequences: int = 1
    """Sequences that are trained on per row at once: 2 for a chosen and a rejected answer."""
    reference: bool = False
    """Whether Full needs the weights of a frozen reference model beside (an adapter is switched off instead)."""
    all_logits: bool = False
    """Whether the logits of all tokens may be held at once."""
    scores: bool = False
    """Whether another model (of the same size, to be on the safe side) scores what was generated."""
    generates: bool = False
    """Whether it generates, with a cache of keys and values."""


OBJECTIVES = {
    "SFT": Objective(),
    "DPO": Objective(sequences=2, reference=True),
    "RewardModel": Objective(sequences=2),
    "RLOO": Objective(reference=True, scores=True, generates=True),
    "GRPO": Objective(reference=True, scores=True, generates=True),
}
UNKNOWN_OBJECTIVE = Objective(sequences=2, reference=True, all_logits=True, scores=True, generates=True)


@dataclass(frozen=True)
class Workload:
    """What is trained how."""

    method: Method
    rows: int
    """Rows per forward pass."""
    length: int
    """Tokens per row, at most."""
    bfloat16: bool = True
    """Type of the forward and backward pass; False: float32."""
    checkpointing: bool = False
    """Whether activations are computed again in the backward pass."""
    optimizer: str = "AdamW"
    rank: int = 16
    targets: Sequence[str] = (ALL_LINEAR,)
    dropout: bool = True
    double_quantization: bool = True
    objective: str = "SFT"
    on_gpu: bool = True

    @property
    def tokens(self) -> int:
        """Tokens of one forward pass."""
        return self.rows * self.length * self.asks.sequences

    @property
    def asks(self) -> Objective:
        return OBJECTIVES.get(self.objective, UNKNOWN_OBJECTIVE)

    @property
    def width(self) -> int:
        """Bytes of a value of the forward pass."""
        return 2 if self.bfloat16 else 4

    @property
    def residual_width(self) -> int:
        """Bytes of a value of the residual stream: that of the embeddings."""
        return 2 if self.bfloat16 and self.method is Method.LORA else 4


@dataclass(frozen=True)
class Estimate:
    """Bytes by part."""

    weights: int
    """Base model as it is held, with a reference model where the objective has one."""
    trainable: int
    """Weights that are trained beside the base model (the adapter)."""
    gradients: int
    optimizer: int
    activations: int
    logits: int
    overhead: int
    """What the process takes before anything is loaded."""
    fragmentation: int
    trained_parameters: int
    parameters: int

    @property
    def certain(self) -> int:
        """Weights, gradients and optimizer states: counted, not estimated, and needed whatever the batch."""
        return self.weights + self.trainable + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """The parts by their names, without the counts of parameters."""
        names = (
            "weights", "trainable", "gradients", "optimizer", "activations", "logits", "overhead", "fragmentation",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}


def estimate(model: Architecture, work: Workload) -> Estimate:
    """The memory that training needs at its peak, in bytes by part."""
    trained = trained_parameters(model, work)
    adapter = 0 if work.method is Method.FULL else 4 * trained  # adapters are trained in float32
    activations, logits = _activations(model, work), _logits(model, work)
    return Estimate(
        weights=_weights(model, work) * (1 + _other_models(work)),
        trainable=adapter,
        gradients=4 * trained,
        optimizer=int(OPTIMIZER_STATE.get(work.optimizer, 8.0) * trained),
        activations=activations,
        logits=logits,
        overhead=CONTEXT if work.on_gpu else PROCESS,
        fragmentation=int(FRAGMENTATION * (activations + logits)),
        trained_parameters=trained,
        parameters=model.parameters,
    )


def adapted(model: Architecture, targets: Sequence[str]) -> list[Linear]:
    """The linear layers that get an adapter."""
    if list(targets) == [ALL_LINEAR]:
        return list(model.linears)
    names = {target.rpartition(".")[2] for target in targets}
    return [linear for linear in model.linears if linear.name in names]


def trained_parameters(model: Architecture, work: Workload) -> int:
    """Parameters that get a gradient."""
    if work.method is Method.FULL:
        return model.parameters
    return sum(
        work.rank * (linear.inputs + linear.outputs) * linear.count for linear in adapted(model, work.targets)
    )


def _other_models(work: Workload) -> int:
    """Frozen models beside the one that is trained. An adapter that is switched off is its own reference."""
    reference = work.asks.reference and work.method is Method.FULL
    return int(reference) + int(work.asks.scores)


def _weights(model: Architecture, work: Workload) -> int:
    linear = sum(layer.parameters for layer in model.linears)
    rest = model.parameters - linear
    match work.method:
        case Method.FULL:
            return 4 * model.parameters
        case Method.LORA:
            return work.width * model.parameters
        case Method.QLORA:
            constants = 1 / BLOCK + 4 / (BLOCK * OUTER_BLOCK) if work.double_quantization else 4 / BLOCK
            return int(linear * (0.5 + constants)) + 4 * rest


# ---------------------------------------------------------------- what the backward pass needs


def _activations(model: Architecture, work: Workload) -> int:
    layer = _kept_by_layer(model, work) * work.tokens
    if work.checkpointing:
        # Of every layer its input, and one layer at a time as a whole.
        kept = model.layers * work.residual_width * model.hidden * work.tokens + layer
    else:
        kept = model.layers * layer
    # The last norm, the loss' input and its gradient.
    ends = (4 + 4 + work.width) * model.hidden * work.tokens
    return int(kept + ends + _copies(model, work) + _cache(model, work))


def _kept_by_layer(model: Architecture, work: Workload) -> float:
    """Bytes per token that autograd keeps of one layer, as transformers' LlamaDecoderLayer computes it.

    Each norm keeps its input in float32 and, where its own weight is trained, its normalized input; attention its
    queries, keys, values and output (keys and values once for every query head); a gated feed-forward network the
    inputs of its activation function and of its product; every trained linear layer its input. Under autocast a float32
    input is copied for each linear layer.
    """
    hidden, wide, width = model.hidden, model.intermediate, work.width
    full = work.method is Method.FULL
    norms = 2 * (4 + (work.residual_width if full else 0)) * hidden
    attention = 4 * width * model.attention
    network = (3 if model.gated else 4) * width * wide
    return norms + attention + network + _inputs(model, work)


def _inputs(model: Architecture, work: Workload) -> float:
    """Bytes per token of the inputs of one layer's trained linear layers."""
    layers = max(1, model.layers)
    if work.method is Method.FULL:
        # In float32 the layers behind one norm share its output, and attention's output is counted already.
        copies = sum(layer.inputs * layer.count for layer in model.linears) / layers
        shared = (2 * model.hidden + model.intermediate) if not work.bfloat16 else copies
        return work.width * shared
    mask = (1 if work.on_gpu else 4) if work.dropout else 0  # a CPU keeps the mask as float32
    kept = sum(
        ((work.width + mask) * layer.inputs + 2 * work.width * work.rank) * layer.count
        for layer in adapted(model, work.targets)
    )
    return kept / layers


def _copies(model: Architecture, work: Workload) -> int:
    """Weights that are held in a second type: under autocast, and while 4-bit weights are computed with."""
    if work.method is Method.FULL and work.bfloat16:
        return 2 * sum(layer.parameters for layer in model.linears)
    if work.method is Method.QLORA:
        return work.width * model.largest_linear
    return 0


def _cache(model: Architecture, work: Workload) -> int:
    """Keys and values of what is generated; it is gone when the backward pass begins, and counted all the same."""
    if not work.asks.generates:
        return 0
    return 2 * work.width * model.key_value * model.layers * work.tokens


def _logits(model: Architecture, work: Workload) -> int:
    held = min(TILE_TOKENS, work.tokens) * min(TILE_WORDS, model.vocabulary)
    if work.asks.all_logits:
        held = model.vocabulary * work.tokens
    head = model.vocabulary * model.hidden
    gradient = 4 * head if work.method is Method.FULL else 0  # of the head, before it is added to the others
    # Logits, their float32 copy, log-probabilities and gradient, all of them at once.
    return (work.width + 3 * 4) * held + gradient


# ---------------------------------------------------------------- other ways


@dataclass(frozen=True)
class Option:
    """Another way to train the same model, and what it needs."""

    name: str
    work: Workload
    estimate: Estimate


def options(model: Architecture, work: Workload) -> list[Option]:
    """Ways that need less memory, the least change first."""
    variants: list[tuple[str, Workload]] = []
    rows = work.rows
    while rows > 1:
        rows //= 2
        variants.append((f"microBatchSize {rows}", replace(work, rows=rows)))
    saving = replace(work, checkpointing=True)
    if not work.checkpointing:
        variants.append(("gradientCheckpointing", saving))
        if work.rows > 1:
            variants.append(("gradientCheckpointing and microBatchSize 1", replace(saving, rows=1)))
    if work.method is Method.FULL:
        variants.append(("method LoRA", replace(work, method=Method.LORA)))
        variants.append(("method LoRA, gradientCheckpointing", replace(saving, method=Method.LORA)))
    if work.method is not Method.QLORA:
        variants.append(("method QLoRA", replace(work, method=Method.QLORA)))
        variants.append(("method QLoRA, gradientCheckpointing", replace(saving, method=Method.QLORA)))
    smallest = replace(saving, rows=1, method=Method.QLORA if work.method is not Method.FULL else Method.LORA)
    if work.length > 512:
        half = work.length // 2
        variants.append((f"maxLength {half}", replace(work, length=half)))
    variants.append((f"method {smallest.method}, gradientCheckpointing, microBatchSize 1", smallest))
    found = [Option(name, variant, estimate(model, variant)) for name, variant in variants]
    limit = estimate(model, work).total
    unique = {option.name: option for option in found if option.estimate.total < limit}
    return list(unique.values())


def methods(model: Architecture, work: Workload) -> dict[Method, Estimate]:
    """The same with each method."""
    return {method: estimate(model, replace(work, method=method)) for method in Method}

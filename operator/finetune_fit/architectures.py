"""What a model is made of: its linear layers, embeddings and the rest, from config.json and the files' tensors.

With the names and shapes of the tensors (the headers of safetensors files) the counts are exact. From config.json alone
they follow from the layout of the model's family; families that are not known here are not guessed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

EMBEDDINGS = ("embed_tokens", "embed_in", "embed_positions", "wte", "wpe")
HEADS = ("lm_head", "embed_out")
# Families whose layers are q, k, v, o and a gated feed-forward network, with RMSNorm or LayerNorm around them.
GATED = frozenset(
    {
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3_text",
        "olmo2",
        "granite",
        "smollm3",
        "stablelm",
    }
)
EXPERTS = frozenset({"mixtral", "qwen3_moe", "qwen2_moe", "olmoe"})


class UnknownArchitectureError(ValueError):
    """The model's family is not known and there are no tensors to count; the message says what would help."""


@dataclass(frozen=True)
class Linear:
    """Linear layers of one name and shape."""

    name: str
    inputs: int
    outputs: int
    count: int

    @property
    def parameters(self) -> int:
        return self.inputs * self.outputs * self.count


@dataclass(frozen=True)
class Architecture:
    """A causal language model in numbers; sizes in elements."""

    family: str
    layers: int
    hidden: int
    attention: int
    """Width of all query heads together."""
    key_value: int
    """Width of all key heads together."""
    intermediate: int
    vocabulary: int
    gated: bool
    linears: Sequence[Linear]
    """Of all layers; the output head is not among them."""
    embeddings: int
    """Parameters of the embeddings."""
    head: int
    """Parameters of the output head; 0 where it is the embedding's own matrix."""
    other: int
    """Norms, biases, and experts that are stored as one tensor."""
    exact: bool
    """Whether the parameters were counted in the files, not derived from config.json."""

    @property
    def parameters(self) -> int:
        return sum(linear.parameters for linear in self.linears) + self.embeddings + self.head + self.other

    @property
    def largest_linear(self) -> int:
        return max((linear.inputs * linear.outputs for linear in self.linears), default=0)


def read(config: Mapping[str, Any], tensors: Mapping[str, Sequence[int]] | None = None) -> Architecture:
    """The architecture by a parsed config.json and, where they are known, name and shape of every tensor.

    Raises UnknownArchitectureError.
    """
    text = config.get("text_config") or config
    family = str(text.get("model_type") or config.get("model_type") or "")
    sizes = _read_sizes(text, family)
    if tensors:
        return _counted(sizes, tensors)
    if family in GATED:
        return _gated(sizes, text)
    if family in EXPERTS:
        return _experts(sizes, text)
    if family == "phi3":
        return _phi3(sizes, text)
    if family in ("gpt2", "gpt_neox"):
        return _gpt(sizes, text)
    raise UnknownArchitectureError(
        f"config.json has model_type {family!r}, whose layers are not known here; name a folder that holds the "
        "model's safetensors files, whose tensors can be counted"
    )


@dataclass(frozen=True)
class _Sizes:
    family: str
    layers: int
    hidden: int
    heads: int
    key_value_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    tied: bool
    positions: int

    @property
    def attention(self) -> int:
        return self.heads * self.head_size

    @property
    def key_value(self) -> int:
        return self.key_value_heads * self.head_size


def _read_sizes(config: Mapping[str, Any], family: str) -> _Sizes:
    hidden = _number(config, "hidden_size", "n_embd", "d_model")
    heads = _number(config, "num_attention_heads", "n_head")
    default_intermediate = 4 * hidden
    return _Sizes(
        family=family,
        layers=_number(config, "num_hidden_layers", "n_layer"),
        hidden=hidden,
        heads=heads,
        key_value_heads=_number(config, "num_key_value_heads", default=heads),
        head_size=_number(config, "head_dim", default=max(1, hidden // heads)),
        intermediate=_number(config, "intermediate_size", "n_inner", default=default_intermediate),
        vocabulary=_number(config, "vocab_size"),
        tied=bool(config.get("tie_word_embeddings", family in ("gpt2", "gemma", "gemma2", "gemma3_text"))),
        positions=_number(config, "n_positions", "max_position_embeddings", default=1),
    )


LARGEST = 2**40  # of any number in a config.json; more is a broken file


def _number(config: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    for name in names:
        value = config.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
            raise UnknownArchitectureError(
                f"config.json: {name} is {value!r} and must be a whole number above 0"
            )
        return value
    if default is None:
        raise UnknownArchitectureError(f"config.json has no {names[0]}; it is no causal language model's")
    return default


def _build(
    sizes: _Sizes,
    linears: Sequence[Linear],
    *,
    other: int,
    gated: bool,
    embeddings: int | None = None,
    head: int | None = None,
    exact: bool = False,
) -> Architecture:
    table = sizes.vocabulary * sizes.hidden
    return Architecture(
        family=sizes.family,
        layers=sizes.layers,
        hidden=sizes.hidden,
        attention=sizes.attention,
        key_value=sizes.key_value,
        intermediate=sizes.intermediate,
        vocabulary=sizes.vocabulary,
        gated=gated,
        linears=tuple(linears),
        embeddings=table if embeddings is None else embeddings,
        head=(0 if sizes.tied else table) if head is None else head,
        other=other,
        exact=exact,
    )


def _attention_layers(sizes: _Sizes) -> list[Linear]:
    return [
        Linear("q_proj", sizes.hidden, sizes.attention, sizes.layers),
        Linear("k_proj", sizes.hidden, sizes.key_value, sizes.layers),
        Linear("v_proj", sizes.hidden, sizes.key_value, sizes.layers),
        Linear("o_proj", sizes.attention, sizes.hidden, sizes.layers),
    ]


def _gated(sizes: _Sizes, config: Mapping[str, Any]) -> Architecture:
    linears = [
        *_attention_layers(sizes),
        Linear("gate_proj", sizes.hidden, sizes.intermediate, sizes.layers),
        Linear("up_proj", sizes.hidden, sizes.intermediate, sizes.layers),
        Linear("down_proj", sizes.intermediate, sizes.hidden, sizes.layers),
    ]
    norms = (4 if sizes.family in ("gemma2", "gemma3_text") else 2) * sizes.hidden
    if sizes.family in ("qwen3", "gemma3_text"):
        norms += 2 * sizes.head_size
    if sizes.family == "olmo2":
        norms += sizes.attention + sizes.key_value
    biases = 0
    if sizes.family == "qwen2" or config.get("attention_bias") or config.get("use_qkv_bias"):
        biases = sizes.attention + 2 * sizes.key_value
    if config.get("attention_bias"):
        biases += sizes.hidden
    last = sizes.hidden * (2 if sizes.family == "stablelm" else 1)
    norms *= 2 if sizes.family == "stablelm" else 1  # LayerNorm has a bias
    return _build(sizes, linears, other=(norms + biases) * sizes.layers + last, gated=True)


def _experts(sizes: _Sizes, config: Mapping[str, Any]) -> Architecture:
    """transformers keeps a layer's experts in one tensor, which gets no adapter and is not quantized."""
    experts = _number(config, "num_local_experts", "num_experts")
    width = _number(config, "moe_intermediate_size", default=sizes.intermediate)
    per_layer = 3 * experts * sizes.hidden * width + experts * sizes.hidden + 2 * sizes.hidden
    return _build(sizes, _attention_layers(sizes), other=per_layer * sizes.layers + sizes.hidden, gated=True)


def _phi3(sizes: _Sizes, config: Mapping[str, Any]) -> Architecture:
    del config
    linears = [
        Linear("qkv_proj", sizes.hidden, sizes.attention + 2 * sizes.key_value, sizes.layers),
        Linear("o_proj", sizes.attention, sizes.hidden, sizes.layers),
        Linear("gate_up_proj", sizes.hidden, 2 * sizes.intermediate, sizes.layers),
        Linear("down_proj", sizes.intermediate, sizes.hidden, sizes.layers),
    ]
    return _build(sizes, linears, other=2 * sizes.hidden * sizes.layers + sizes.hidden, gated=True)


def _gpt(sizes: _Sizes, config: Mapping[str, Any]) -> Architecture:
    del config
    hidden, wide = sizes.hidden, sizes.intermediate
    names = ("c_attn", "c_proj", "c_fc", "c_proj")
    if sizes.family == "gpt_neox":
        names = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
    linears = [
        Linear(names[0], hidden, 3 * hidden, sizes.layers),
        Linear(names[1], hidden, hidden, sizes.layers),
        Linear(names[2], hidden, wide, sizes.layers),
        Linear(names[3], wide, hidden, sizes.layers),
    ]
    per_layer = 4 * hidden + 3 * hidden + hidden + wide + hidden  # two LayerNorms, four biases
    table = sizes.vocabulary * hidden + (sizes.positions * hidden if sizes.family == "gpt2" else 0)
    return _build(sizes, linears, other=per_layer * sizes.layers + 2 * hidden, gated=False, embeddings=table)


def _counted(sizes: _Sizes, tensors: Mapping[str, Sequence[int]]) -> Architecture:
    embeddings = head = other = 0
    shapes: dict[tuple[str, int, int], int] = {}
    for name, shape in tensors.items():
        size = math.prod(shape)
        parts = name.split(".")
        last = parts[-2] if len(parts) > 1 and parts[-1] in ("weight", "bias") else parts[-1]
        if last in EMBEDDINGS:
            embeddings += size
        elif last in HEADS:
            head += size
        elif len(shape) == 2 and parts[-1] == "weight" and last != "gate":
            key = (last, int(shape[1]), int(shape[0]))
            shapes[key] = shapes.get(key, 0) + 1
        else:
            other += size
    if sizes.tied and embeddings:
        head = 0  # some files hold the one matrix twice
    linears = [Linear(name, inputs, outputs, count) for (name, inputs, outputs), count in shapes.items()]
    gated = any(linear.name in ("gate_proj", "gate_up_proj", "w1") for linear in linears)
    return _build(sizes, linears, other=other, gated=gated, embeddings=embeddings, head=head, exact=True)

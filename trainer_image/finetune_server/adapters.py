"""A PEFT LoRA folder read, and refused when the engine could not apply every part of it exactly."""

from __future__ import annotations

import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch

from finetune_server import patterns

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_KEY = re.compile(r"^base_model\.model\.(?P<layer>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight$")

# Settings of peft.LoraConfig that change the arithmetic; any other value than these is refused.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "lora_bias": (None, False),
    "bias": (None, "none"),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "layer_replication": (None, []),
    "fan_in_fan_out": (None, False),
}


class AdapterError(Exception):
    """The folder is not an adapter that this engine can serve. The message says what to change."""


class RankTooLarge(AdapterError):  # noqa: N818  as the agent reports it
    """The adapter's rank is above the engine's limit."""


class WrongBase(AdapterError):  # noqa: N818  as the agent reports it
    """The adapter was made for another model."""


@dataclass(frozen=True)
class Part:
    """The adapter of one linear layer: delta = x @ down.T @ up.T * scale."""

    down: torch.Tensor  # [rank, in]
    up: torch.Tensor  # [out, rank]
    scale: float

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])


@dataclass(frozen=True)
class Adapter:
    rank: int  # the largest of its parts
    parts: dict[str, Part]  # by the name of the layer in the base model


def read_adapter(folder: Path, *, shapes: dict[str, tuple[int, int]], max_rank: int) -> Adapter:
    """Returns the adapter of a folder, checked against the base model's layers: name -> (in, out).

    Raises FileNotFoundError when the folder holds none, AdapterError when the engine cannot apply it.
    """
    config = _read_config(folder)
    tensors = _read_weights(folder)
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.match(key)
        if match is None:
            raise AdapterError(f"{WEIGHTS} holds {key!r}, which is no LoRA weight of a linear layer")
        sides.setdefault(match["layer"], {})[match["side"]] = tensor
    if not sides:
        raise AdapterError(f"{WEIGHTS} holds no weights")
    alphas = _alphas(config, list(sides))
    parts = {
        layer: _build_part(layer, found, alphas[layer], config, shapes, max_rank=max_rank)
        for layer, found in sides.items()
    }
    return Adapter(rank=max(part.rank for part in parts.values()), parts=parts)


def read_template(folder: Path) -> str | None:
    """Returns the chat template beside the adapter: the one that it was trained with. Raises AdapterError."""
    try:
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise AdapterError(f"chat_template.jinja cannot be read ({error})") from error


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"No adapter found for {folder}: it has no {CONFIG}") from None
    except OSError as error:  # no folder, a name that is too long
        raise AdapterError(f"{CONFIG} cannot be read ({error})") from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{CONFIG} is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{CONFIG} is not a JSON object")
    if config.get("peft_type") != "LORA":
        raise AdapterError(
            f"{CONFIG}: peft_type is {config.get('peft_type')!r}; only LORA can be served, merge the others"
        )
    for name, neutral in _NEUTRAL.items():
        value = config.get(name)
        if value not in neutral:
            raise AdapterError(f"{CONFIG}: {name} is {json.dumps(value)}, which this engine cannot apply")
    for name in ("r", "lora_alpha"):
        if not _is_positive(config.get(name)):
            raise AdapterError(f"{CONFIG}: {name} is {config.get(name)!r}; it must be a number above 0")
    _check_alphas(config.get("alpha_pattern") or {})
    return config


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _check_alphas(given: Any) -> None:
    if not isinstance(given, dict) or not all(map(_is_positive, given.values())):
        raise AdapterError(f"{CONFIG}: alpha_pattern must hold numbers above 0 by names of layers")
    for pattern in given:
        try:
            patterns.compile_as_peft(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise AdapterError(
                f"{CONFIG}: {pattern!r} in alpha_pattern is no regular expression ({error})"
            ) from error


def _read_weights(folder: Path) -> dict[str, torch.Tensor]:
    try:
        with safetensors.safe_open(folder / WEIGHTS, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except FileNotFoundError:
        raise FileNotFoundError(f"No adapter found for {folder}: it has no {WEIGHTS}") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise AdapterError(f"{WEIGHTS} cannot be read ({error})") from error


def _build_part(
    layer: str,
    found: dict[str, torch.Tensor],
    alpha: float,
    config: dict[str, Any],
    shapes: dict[str, tuple[int, int]],
    *,
    max_rank: int,
) -> Part:
    if layer not in shapes:
        raise WrongBase(
            f"the adapter changes {layer!r}, which the base model does not have as a linear layer"
        )
    if set(found) != {"A", "B"}:
        raise AdapterError(f"{WEIGHTS} holds only one half of {layer!r} (lora_{next(iter(found))})")
    down, up = found["A"], found["B"]
    inner, outer = shapes[layer]
    if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1] or not down.shape[0]:
        raise AdapterError(f"{layer!r}: lora_A {list(down.shape)} and lora_B {list(up.shape)} do not fit")
    if (down.shape[1], up.shape[0]) != (inner, outer):
        raise WrongBase(
            f"{layer!r} of the adapter maps {down.shape[1]} to {up.shape[0]} features, the base model's "
            f"{inner} to {outer}: it was made for another model"
        )
    if down.shape[0] > max_rank:
        raise RankTooLarge(f"LoRA rank {down.shape[0]} is greater than max_lora_rank {max_rank}.")
    if not (down.is_floating_point() and up.is_floating_point()):
        raise AdapterError(f"{layer!r} holds weights of type {down.dtype} and {up.dtype}, not real numbers")
    rank = int(down.shape[0])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)  # rsLoRA: arXiv 2312.03732
    # As float32, which is the widest type that the engine computes with, and scaled, as the bank keeps them.
    if not (bool(torch.isfinite(down.float()).all()) and bool(torch.isfinite(up.float() * scale).all())):
        raise AdapterError(f"{layer!r} holds weights that are not finite (scaled by {scale:g}); train again")
    return Part(down=down, up=up, scale=scale)


def _alphas(config: dict[str, Any], layers: list[str]) -> dict[str, float]:
    """Returns each layer's alpha. Raises AdapterError."""
    given = config.get("alpha_pattern") or {}
    values = [*given.values(), config["lora_alpha"]]
    try:
        found = patterns.first_matches(list(given), layers)
    except patterns.EndlessError:
        raise AdapterError(
            f"{CONFIG}: matching alpha_pattern takes more than {patterns.SECONDS:g} s; name the layers more simply"
        ) from None
    return {
        layer: float(values[-1 if index is None else index])
        for layer, index in zip(layers, found, strict=True)
    }

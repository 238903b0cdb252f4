"""Whether an adapter was made for the model that an engine serves.

Shapes are not enough: a base model and its instruction-tuned sister fit one another's adapters, and answer nonsense.
Names are not enough either: the same files are called differently on every machine. So the files are compared where
both can be read: configuration, layout of the weights, and samples of the weights themselves.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from finetune_trainer import storage
from finetune_trainer.failures import TrainerError

_SHAPE_KEYS = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
_SAMPLES = 16  # places per weight file
_SAMPLE_BYTES = 4096


class Match(StrEnum):
    SAME = "Same"
    DIFFERENT = "Different"
    UNKNOWN = "Unknown"  # one of the two cannot be read here, or they are stored differently


@dataclass(frozen=True)
class Verdict:
    match: Match
    message: str


def compare(manifest: dict[str, Any], engine_uri: str | None) -> Verdict:
    """Compares the base model of an artifact's manifest with the one that an engine was started with."""
    base = manifest.get("baseModel")
    wanted = str(base.get("uri") or "") if isinstance(base, dict) else ""
    if not wanted or not engine_uri:
        return Verdict(Match.UNKNOWN, "the base model is not known by name; only its shapes are checked")
    if wanted == engine_uri:
        return Verdict(Match.SAME, wanted)
    mine, theirs = _local(engine_uri), _local(wanted)
    if mine is None or theirs is None:
        return Verdict(
            Match.UNKNOWN,
            f"the adapter was made for {wanted}, the engine serves {engine_uri}; "
            "they cannot be compared here, only their shapes",
        )
    if mine.samefile(theirs):
        return Verdict(Match.SAME, wanted)
    difference = _first_difference(mine, theirs)
    if difference:
        return Verdict(
            Match.DIFFERENT,
            f"the adapter was made for {wanted}, the engine serves {engine_uri}: {difference}",
        )
    if difference is None:
        return Verdict(
            Match.UNKNOWN, f"{wanted} and {engine_uri} are stored differently; only shapes are checked"
        )
    return Verdict(Match.SAME, wanted)


def _local(uri: str) -> Path | None:
    try:
        path = storage.local_path(uri if "://" in uri else f"file://{Path(uri).absolute()}")
    except TrainerError:
        return None
    return path if path is not None and (path / "config.json").is_file() else None


def _first_difference(mine: Path, theirs: Path) -> str | None:
    """Returns what differs, an empty text for equal models, None when the weights are stored in other files."""
    try:
        configs = [json.loads((path / "config.json").read_text(encoding="utf-8")) for path in (mine, theirs)]
        for key in _SHAPE_KEYS:
            values = [config.get(key) for config in configs]
            if values[0] != values[1]:
                return f"{key} is {values[1]} there and {values[0]} here"
        files = [
            {path.name: path for path in sorted(folder.glob("*.safetensors"))} for folder in (mine, theirs)
        ]
        if {name: path.stat().st_size for name, path in files[0].items()} != {
            name: path.stat().st_size for name, path in files[1].items()
        }:
            return None
        for name, path in files[0].items():
            if _sample(path) != _sample(files[1][name]):
                return f"the weights in {name} differ"
    except (OSError, ValueError):
        return None
    return ""


def _sample(path: Path) -> list[bytes]:
    size = path.stat().st_size
    with path.open("rb") as file:
        found = []
        for number in range(_SAMPLES):
            file.seek(max(0, (size - _SAMPLE_BYTES) * number // (_SAMPLES - 1)))
            found.append(file.read(_SAMPLE_BYTES))
    return found

"""The stored form of evidence: one compact JSON text, for a ConfigMap (1 MiB)."""

from __future__ import annotations

import base64
import dataclasses
import json
import zlib
from collections.abc import Mapping
from typing import Any

from finetune_operator.api.routes import Arm
from finetune_operator.core.epochs import Epochs, Told
from finetune_operator.core.eprocesses import RELATIVE_RISKS, HarmProcess
from finetune_operator.core.evidence import Block, Evidence, Stratum
from finetune_operator.core.key_places import KeyPlaces, Place

VERSION = "evidence/v1"
KEY_BYTES = 7  # hashes have 53 bits


def to_json(evidence: Evidence) -> str:
    """The evidence as text. `from_json` of it is equal."""
    return _dump(
        {
            "version": VERSION,
            "alias": evidence.alias,
            "stable": evidence.stable_revision,
            "candidate": evidence.candidate_revision,
            "rollout": evidence.rollout,
            "latest": [evidence.comparison, evidence.weight, evidence.is_sample_pure, evidence.highest_share],
            "harm": {
                name: [process.blocks, *process.log_evidence, process.log_peak]
                for name, process in evidence.harm.items()
            },
            "blocks": {name: dataclasses.astuple(block) for name, block in evidence.blocks.items()},
            "strata": _packed([[stratum.weight, stratum.arms] for stratum in evidence.strata]),
            "keys": {
                f"{low!r}/{high!r}": _pack(raw) for (low, high), raw in _places_out(evidence.keys).items()
            },
            "coins": [[chance, *outcomes] for chance, outcomes in evidence.keys.coins.items()],
            "epochs": _packed(_epochs_out(evidence.epochs)),
        }
    )


def from_json(text: str) -> Evidence:
    """The evidence that was stored. ValueError where the text is none: begin anew then, nothing else is lost."""
    try:
        stored = json.loads(text)
        if stored["version"] != VERSION:
            raise ValueError(f"its version is {stored['version']!r}, this operator reads {VERSION!r}")
        comparison, weight, is_sample_pure, *share = stored["latest"]
        return Evidence(
            alias=stored["alias"],
            stable_revision=stored["stable"],
            candidate_revision=stored["candidate"],
            rollout=stored["rollout"],
            comparison=comparison,
            weight=weight,
            is_sample_pure=is_sample_pure,
            highest_share=share[0] if share else weight,  # older operators stored no share
            harm={name: _harm_in(numbers) for name, numbers in stored["harm"].items()},
            # Older operators stored one for all guardrails, of less than ten requests.
            blocks={name: Block(*numbers) for name, numbers in stored.get("blocks", {}).items()},
            strata=tuple(Stratum(weight, _arms_in(arms)) for weight, arms in _unpacked(stored["strata"])),
            keys=KeyPlaces(
                _places_in(stored["keys"]),
                {chance: (stable, candidate) for chance, stable, candidate in stored["coins"]},
            ),
            epochs=_epochs_in(_unpacked(stored["epochs"])),
        )
    except (KeyError, TypeError, IndexError, ValueError, zlib.error) as error:
        raise ValueError(
            f"the stored evidence cannot be read ({error}); remove it, and the comparison begins anew"
        ) from error


def _places_out(keys: KeyPlaces) -> dict[Place, bytes]:
    """The hashes by place, of which there are few."""
    raw: dict[Place, bytes] = {}
    for key, place in sorted(keys.places.items()):
        raw[place] = raw.get(place, b"") + key.to_bytes(KEY_BYTES, "big")
    return raw


def _places_in(stored: Mapping[str, str]) -> dict[int, Place]:
    places: dict[int, Place] = {}
    for name, packed in stored.items():
        low, high = name.split("/")
        raw = base64.b64decode(packed)
        for start in range(0, len(raw), KEY_BYTES):
            places[int.from_bytes(raw[start : start + KEY_BYTES], "big")] = (float(low), float(high))
    return places


def _epochs_out(epochs: Epochs) -> dict[str, Any]:
    return {
        "told": {
            name: [told.arms, *([told.behind, told.sightings] if told.behind is not None else [])]
            for name, told in epochs.told.items()
        },
        "retired": "".join(name + mark for name, mark in epochs.retired.items()),
        "instances": "".join(epochs.instances),
        "forgetful": epochs.forgetful,
    }


def _epochs_in(stored: Mapping[str, Any]) -> Epochs:
    retired = _names_in(stored["retired"])
    return Epochs(
        told={name: _told_in(*parts) for name, parts in stored["told"].items()},
        retired=dict(zip(retired[::2], retired[1::2], strict=True)),
        instances=_names_in(stored["instances"]),
        forgetful=stored["forgetful"],
    )


def _told_in(
    arms: Mapping[str, Mapping[str, float]],
    behind: Mapping[str, Mapping[str, float]] | None = None,
    sightings: int = 0,
) -> Told:
    return Told(_arms_in(arms), None if behind is None else _arms_in(behind), sightings)


def _arms_in(arms: Mapping[str, Mapping[str, float]]) -> dict[Arm, Mapping[str, float]]:
    return {Arm(name): tally for name, tally in arms.items()}


def _harm_in(numbers: list[float]) -> HarmProcess:
    blocks, *logs, peak = numbers
    if len(logs) not in (0, len(RELATIVE_RISKS)):
        raise ValueError(f"a guardrail has {len(logs)} numbers where {len(RELATIVE_RISKS)} belong")
    return HarmProcess(int(blocks), tuple(logs), peak)


def _names_in(joined: str) -> tuple[str, ...]:
    return tuple(joined[i : i + 8] for i in range(0, len(joined), 8))


def _packed(value: object) -> str:
    return _pack(zlib.compress(_dump(value).encode(), 6))


def _unpacked(text: Any) -> Any:
    """What was packed; older operators stored the strata as they are."""
    return json.loads(zlib.decompress(base64.b64decode(text))) if isinstance(text, str) else text


def _pack(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


def _dump(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)

"""Which arm a request belongs to: a fixed function of the route and the request's key, with no state.

The candidate owns the top of the line [0, 1): raising its weight moves keys from stable to candidate only, lowering it
only back, and every replica, in whatever language, comes to the same answer.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple, Self

from finetune_operator.api.routes import GROUPS

_WHOLE = 2.0**64
_SAMPLE_SHIFT = 11  # 64 bit to 53 bit, which every JSON reader keeps exactly


class KeyKind(StrEnum):
    """Where a key of a request may stand."""

    HEADER = "header"
    BODY = "body"
    API_KEY = "apiKey"


@dataclass(frozen=True, slots=True)
class KeySource:
    """One entry of a route's `keys`, for example header:x-adapter-key."""

    kind: KeyKind
    name: str = ""

    @classmethod
    def parse(cls, text: str) -> Self | None:
        """None for a kind that this router does not know: it is passed over, the next entry counts."""
        kind, _, name = text.partition(":")
        match kind:
            case "header" if name:
                return cls(KeyKind.HEADER, name.lower())
            case "body" if name:
                return cls(KeyKind.BODY, name)
            case "apiKey":
                return cls(KeyKind.API_KEY)
        return None


class Draw(NamedTuple):
    """Place of a request on the line, and its hash in the sample of distinct keys (independent of the place)."""

    place: float
    sample_hash: int


def find_key(
    sources: tuple[KeySource, ...], headers: Mapping[str, str], texts: Mapping[str, str], api_key: str
) -> str | None:
    """The first key found; None when the request has none of them."""
    for source in sources:
        match source.kind:
            case KeyKind.HEADER:
                value = headers.get(source.name)
            case KeyKind.BODY:
                value = texts.get(source.name)
            case KeyKind.API_KEY:
                value = api_key
        if value:
            return value
    return None


def draw(salt: bytes, key: str) -> Draw:
    """Place of a key: sha256(salt, a zero byte, key), first 8 bytes as a fraction. `salt` ends with the zero byte."""
    digest = hashlib.sha256(salt + key.encode("utf-8", "surrogatepass")).digest()
    return Draw(
        int.from_bytes(digest[:8], "big") / _WHOLE, int.from_bytes(digest[8:16], "big") >> _SAMPLE_SHIFT
    )


def group_of(sample_hash: int) -> int:
    """The group of keys that a key is in, whatever its place; of a request without a key, one at random."""
    return sample_hash % GROUPS


def draw_at_random() -> Draw:
    """Place of a request without a key: the request itself is the unit."""
    return Draw(random.random(), random.getrandbits(53))  # noqa: S311 - a coin, not a secret


def is_candidate(place: float, weight: float) -> bool:
    """Whether a place belongs to the candidate at this weight (percent)."""
    return weight > 0 and place >= 1 - weight / 100

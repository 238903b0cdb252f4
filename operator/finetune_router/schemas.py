"""Whether a JSON schema that a client sent can be applied without holding up the worker.

References let a short schema stand for an endless one: 30 definitions, each of which names the next one twice, are a
thousand million checks of one value. So they are followed here, before the schema is used. And a pattern of ten
characters may take five megabytes and 40 ms to compile, of which 32 KB hold a thousand.
"""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import unquote

MOST_SUBSCHEMAS = 4096  # objects and lists, with all references followed; milliseconds to count
_PATTERNS_ROOM = 2 * 1024 * 1024  # bytes that all patterns of a schema together may take, compiled
_LONGEST_INDEX = 6  # digits
_UNFOLLOWED = ("$dynamicRef", "$recursiveRef")  # where they lead depends on the value
_NEW_BASES = ("$id", "id")  # below them, references are read another way


def is_bounded(schema: object) -> bool:
    """Whether the schema stays small when its references are followed. A recursive one does not."""
    left = MOST_SUBSCHEMAS
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        left -= 1
        if left < 0:
            return False
        if isinstance(part, list):
            waiting += [item for item in part if isinstance(item, dict | list)]
        elif isinstance(part, dict):
            refused = _UNFOLLOWED if part is schema else (*_UNFOLLOWED, *_NEW_BASES)
            if any(isinstance(part.get(name), str) for name in refused):
                return False
            waiting += [value for value in part.values() if isinstance(value, dict | list)]
            reference = part.get("$ref")
            if isinstance(reference, str):
                target = _target(schema, reference)
                if target is None:
                    return False
                waiting.append(target)
    return True


class Room(NamedTuple):
    """Bytes that a compiled pattern may take; None: as many as the engine for patterns allows."""

    plain: int | None = None
    """Of a pattern that runs in linear time."""
    piece: int | None = None
    """Of each part of a pattern between those that look around."""


def room_for_patterns(schema: object) -> Room:
    """What each pattern of a client's schema may take."""
    found: set[str] = set()
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        elif isinstance(part, dict):
            waiting += part.values()
            pattern, by_pattern = part.get("pattern"), part.get("patternProperties")
            if isinstance(pattern, str):
                found.add(pattern)
            if isinstance(by_pattern, dict):
                found.update(by_pattern)
    pieces = sum(1 + pattern.count("(") + pattern.count("\\") for pattern in found)
    return Room(_PATTERNS_ROOM // max(1, len(found)), _PATTERNS_ROOM // max(1, pieces))


def _target(schema: object, reference: str) -> object:
    """What a JSON pointer (RFC 6901) within the schema names; None for nothing, or another kind of reference."""
    if reference != "#" and not reference.startswith("#/"):
        return None
    part = schema
    for name in unquote(reference[1:]).split("/")[1:]:
        key = name.replace("~1", "/").replace("~0", "~")
        if isinstance(part, dict):
            part = part.get(key)
        elif isinstance(part, list) and key.isascii() and key.isdigit() and len(key) <= _LONGEST_INDEX:
            part = part[int(key)] if int(key) < len(part) else None
        else:
            return None
    return part

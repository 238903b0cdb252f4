"""JSON merge patches: how the tables of tests say what is other than in a good object."""

from __future__ import annotations

from typing import Any


def merged(target: Any, change: Any) -> Any:
    """`target` with the JSON merge patch `change` (RFC 7386): None removes a field, lists are replaced."""
    if not isinstance(change, dict):
        return change
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in change.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result

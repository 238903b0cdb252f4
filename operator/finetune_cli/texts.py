"""Small pieces of text and time that all views need. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any


def status_of(one: Mapping[str, Any]) -> Mapping[str, Any]:
    """The status of an object; empty before the operator has looked at it."""
    return one.get("status") or {}


def seconds_between(start: str | None, end: str | datetime | None) -> float | None:
    """Seconds from one RFC 3339 time to another, None where one is missing."""
    if start is None or end is None:
        return None
    last = end if isinstance(end, datetime) else datetime.fromisoformat(end)
    return (last - datetime.fromisoformat(start)).total_seconds()


def number(value: float | None, *, digits: int = 4) -> str:
    """A measured value to read, not to compute with."""
    return "" if value is None else f"{value:.{digits}g}"

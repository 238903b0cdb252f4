"""Pieces of the `describe` pages that are the same for every kind. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from finetune_cli.texts import seconds_between, status_of
from finetune_operator.core.durations import format_duration

SHOWN = 5  # events


def section(title: str, lines: Sequence[str]) -> list[str]:
    """Nothing to say, no section; without a title, more lines of the one before."""
    head = ["", title] if title else []
    return [*head, *(f"  {line}" for line in lines)] if lines else []


def condition_lines(one: Mapping[str, Any], now: datetime) -> list[str]:
    """One line per condition of the status, as the operator wrote them."""
    lines = []
    for condition in status_of(one).get("conditions", ()):
        since = seconds_between(condition["lastTransitionTime"], now) or 0
        lines.append(
            f"{condition['type']} {condition['status']} for {format_duration(since)} ({condition['reason']}): "
            f"{condition['message']}"
        )
    return lines


def event_lines(events: Sequence[Mapping[str, Any]], now: datetime) -> list[str]:
    """The last events, the newest at the end."""
    lines = []
    for event in last_events(events):
        ago = format_duration(seconds_between(last_seen(event), now) or 0)
        lines.append(f"{ago} ago {event['type']} {event['reason']}: {event.get('message', '')}")
    return lines


def last_events(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The newest ones, the very newest at the end; their times are whole seconds, so equal ones go by version."""

    def order(event: Mapping[str, Any]) -> tuple[str, int]:
        version = event["metadata"].get("resourceVersion", "")
        return last_seen(event), int(version) if version.isdecimal() else 0

    return sorted(events, key=order)[-SHOWN:]


def last_seen(event: Mapping[str, Any]) -> str:
    """RFC 3339 time."""
    return str(event.get("lastTimestamp") or event.get("eventTime") or event["metadata"]["creationTimestamp"])

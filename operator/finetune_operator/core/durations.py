"""Durations for people, as kubectl prints ages."""

from __future__ import annotations


def format_duration(seconds: float) -> str:
    """Two units at most: 12s, 3m20s, 2h5m, 3d4h."""
    minutes, second = divmod(max(0, int(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d{hour}h"
    if hours:
        return f"{hours}h{minute}m"
    return f"{minutes}m{second}s" if minutes else f"{second}s"

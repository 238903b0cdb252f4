"""Durations: for people as kubectl prints ages, and as the API has them."""

from __future__ import annotations

import re


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


_UNITS = {"h": 3600.0, "m": 60.0, "s": 1.0}


def parse_duration(text: str) -> float:
    """Seconds of a duration of the API such as 30s, 10m or 1h30m. ValueError for anything else."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text, re.ASCII)
    if match is None or not text:
        raise ValueError(f"duration {text!r} is not readable; write it as 30s, 10m or 1h30m")
    return sum(int(number or 0) * _UNITS[unit] for unit, number in zip("hms", match.groups(), strict=True))

"""Waiting for a state that must come, however busy the machine is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

Found = TypeVar("Found")


def wait_until(
    check: Callable[[], Found | None], *, seconds: float = 60, what: str | Callable[[], str] = ""
) -> Found:
    """The first true result of `check`; a file or server that is not there yet is no error. `what` is for people."""
    deadline = time.monotonic() + seconds
    last: object = None
    while time.monotonic() < deadline:
        try:
            if found := check():
                return found
            last = found
        except OSError as error:
            last = error
        time.sleep(0.1)
    told = what if isinstance(what, str) else what()
    raise AssertionError(f"not within {seconds:g} s: {told or check}; last: {last!r}")


async def until(holds: Callable[[], bool], *, seconds: float = 10) -> None:
    """Returns as soon as it holds. Raises TimeoutError."""
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.005)

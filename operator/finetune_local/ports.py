"""Ports on loopback that stay the same from one `up` to the next, so that a kubeconfig stays valid."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterable, Mapping

# Below the range that Linux uses for outgoing connections (32768) and above Ray's worker ports (10002 to 19999).
FIRST, LAST = 20_000, 32_000


def is_free(port: int) -> bool:
    """Whether a server could listen on 127.0.0.1:port now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def choose(
    names: Iterable[str], *, known: Mapping[str, int], in_use_by_us: Iterable[str] = ()
) -> dict[str, int]:
    """One port per name.

    A known port is kept when it is free or held by our own running part (`in_use_by_us`, names).
    Raises OSError when the range is exhausted.
    """
    ours = set(in_use_by_us)
    chosen: dict[str, int] = {}
    for name in names:
        port = known.get(name)
        if port is not None and (name in ours or is_free(port)):
            chosen[name] = port
    taken = set(chosen.values())
    for name in names:
        if name not in chosen:
            chosen[name] = _pick(taken)
            taken.add(chosen[name])
    return chosen


def _pick(taken: set[int]) -> int:
    for port in random.sample(range(FIRST, LAST), LAST - FIRST):
        if port not in taken and is_free(port):
            return port
    raise OSError(f"no free port on 127.0.0.1 between {FIRST} and {LAST}")

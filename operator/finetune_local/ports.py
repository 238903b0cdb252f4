"""Ports on loopback that stay the same from one `up` to the next, so that a kubeconfig stays valid."""

from __future__ import annotations

import itertools
import os
import random
import socket
import time
from collections.abc import Container, Iterable, Mapping

from finetune_local.errors import LocalClusterError

RANGE_VARIABLE = "FINETUNE_LOCAL_PORTS"
# Below the range that Linux uses for outgoing connections (32768) and above Ray's worker ports (10002 to 19999).
DEFAULT_RANGE = range(20_000, 32_000)
DYING_SECONDS = 3.0  # a killed process holds its port until the kernel has taken down its memory

_picked: set[int] = set()  # by this process: who asked for one may listen on it much later


def is_free(port: int) -> bool:
    """Whether a server could listen on 127.0.0.1:port now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _becomes_free(port: int) -> bool:
    deadline = time.monotonic() + DYING_SECONDS
    while not is_free(port):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def choose(
    names: Iterable[str], *, known: Mapping[str, int], in_use_by_us: Iterable[str] = ()
) -> dict[str, int]:
    """One port per name.

    A known port is kept when it is held by our own running part (`in_use_by_us`, names), or free within seconds.
    Raises LocalClusterError when the range is exhausted.
    """
    ours = set(in_use_by_us)
    chosen: dict[str, int] = {}
    for name in names:
        port = known.get(name)
        if port is not None and (name in ours or _becomes_free(port)):
            chosen[name] = port
    missing = [name for name in names if name not in chosen]
    return chosen | dict(zip(missing, pick(len(missing), taken=set(chosen.values())), strict=True))


def pick(count: int, *, taken: Container[int] = ()) -> list[int]:
    """Different ports that are free now, in no order; none twice in a process while there are others.

    Raises LocalClusterError when the range is exhausted, or is none.
    """
    among = allowed()
    ports = sorted(random.sample(among, len(among)), key=_picked.__contains__)
    found = list(itertools.islice((port for port in ports if port not in taken and is_free(port)), count))
    if len(found) < count:
        raise LocalClusterError(
            f"no free port on 127.0.0.1 between {among.start} and {among.stop - 1}",
            remedy=f"Set {RANGE_VARIABLE} to a wider range, such as 20000-31999.",
        )
    _picked.update(found)
    return found


def allowed() -> range:
    """The ports to choose from: FINETUNE_LOCAL_PORTS, or the default. Raises LocalClusterError."""
    text = os.environ.get(RANGE_VARIABLE)
    if not text:
        return DEFAULT_RANGE
    first, _, last = text.partition("-")
    if not (first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last) < 65_536):
        raise LocalClusterError(
            f"{RANGE_VARIABLE} is {text!r}", remedy="It must be a first and a last port, such as 20000-31999."
        )
    return range(int(first), int(last) + 1)

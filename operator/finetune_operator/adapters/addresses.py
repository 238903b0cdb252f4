"""From the name in a URL to every process behind it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeAlias
from urllib.parse import urlsplit, urlunsplit

FRESH_SECONDS = 2.0  # within which a name is not looked up again; a headless Service changes with its pods
LOOKUP_SECONDS = 5.0


Lookup: TypeAlias = Callable[[str, int], Awaitable[list[tuple[int, str]]]]
"""From host and port to (address family, address) pairs. Raises OSError."""


class UnknownHostError(Exception):
    """A name that has no address; `str()` names it."""


@dataclass(frozen=True)
class _Known:
    urls: tuple[str, ...]
    until: float


class Resolver:
    """A name with several addresses (a headless Service) is several processes; each gets a URL of its own.

    A name with one address stays as it is, so that servers that are told apart by name still are. So does https, whose
    certificates are for names. What was known stays known while a lookup fails.
    """

    def __init__(self, lookup: Lookup | None = None) -> None:
        """`lookup`: a resolver in place of the system's."""
        self._lookup = lookup or _system_lookup
        self._known: dict[str, _Known] = {}

    async def spread(self, url: str) -> tuple[str, ...]:
        """The URL once per address of its host, in a fixed order. Raises UnknownHostError."""
        loop = asyncio.get_running_loop()
        known = self._known.get(url)
        if known is not None and known.until > loop.time():
            return known.urls
        parts = urlsplit(url)
        if parts.hostname is None or parts.scheme == "https":
            return (url,)
        try:
            async with asyncio.timeout(LOOKUP_SECONDS):
                found = await self._lookup(parts.hostname, parts.port or 80)
        except (OSError, UnicodeError) as error:  # TimeoutError is an OSError
            if known is not None:
                return known.urls
            raise UnknownHostError(f"{parts.hostname}: {error or 'the lookup takes too long'}") from error
        urls = urls_of(url, found)
        self._known[url] = _Known(urls, loop.time() + FRESH_SECONDS)
        return urls


async def _system_lookup(host: str, port: int) -> list[tuple[int, str]]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(family, str(address[0])) for family, _, _, _, address in found]


def urls_of(url: str, found: list[tuple[int, str]]) -> tuple[str, ...]:
    """Of a name with both kinds of addresses only IPv4 counts: they lead to the same processes."""
    old = sorted({address for family, address in found if family == socket.AF_INET})
    new = sorted({f"[{address}]" for family, address in found if family == socket.AF_INET6})
    addresses = old or new
    if len(addresses) <= 1:
        return (url,)
    parts = urlsplit(url)
    port = f":{parts.port}" if parts.port else ""
    return tuple(urlunsplit(parts._replace(netloc=f"{address}{port}")) for address in addresses)

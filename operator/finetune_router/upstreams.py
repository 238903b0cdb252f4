"""The engines that a worker knows: their addresses, kept connections, and whether they could be reached."""

from __future__ import annotations

import asyncio
import functools
import socket
import ssl
import time
from collections import deque
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import aiohappyeyeballs

from finetune_router.connections import ConnectFailedError, Connection

DOWN_SECONDS = 2.0  # an engine that could not be reached is left out for so long, where there are others
IDLE_SECONDS = 4.0  # engines on uvicorn close an idle connection after 5 s
_NEXT_SECONDS = 0.25  # then a name's next address is tried beside the first one, as RFC 8305 has it


@dataclass(frozen=True, slots=True)
class Address:
    """A base URL, taken apart."""

    url: str
    host: str
    port: int
    secure: bool
    prefix: str
    """Path before the API's own, without a trailing slash."""

    @property
    def host_header(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.secure else 80) else f"{host}:{self.port}"


def parse_address(url: str) -> Address:
    """Raises ValueError for anything but http(s)://host[:port][/prefix]."""
    parts = urlsplit(url)
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError(f"{url!r} is no http:// or https:// URL")
    secure = parts.scheme == "https"
    return Address(
        url=url,
        host=parts.hostname,
        port=parts.port or (443 if secure else 80),
        secure=secure,
        prefix=parts.path.rstrip("/"),
    )


class Upstream:
    """One engine, as this worker knows it."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._context = _client_context() if address.secure else None
        self._idle: deque[Connection] = deque()
        self._lookup: asyncio.Future[list[Any]] | None = None
        self.outstanding = 0
        self.down_until = 0.0
        self.is_suspect = False
        """Whether the last connection could not be made."""

    def note_unreachable(self) -> None:
        """Leave it out for a while, where there are others."""
        self.is_suspect = True
        self.down_until = time.perf_counter() + DOWN_SECONDS

    def note_chosen(self) -> None:
        """Of an engine that could not be reached, one request at a time finds out whether it can: a dead machine
        takes each of them the whole time to connect."""
        if self.is_suspect:
            self.down_until = time.perf_counter() + DOWN_SECONDS

    def take_idle(self) -> Connection | None:
        """A kept connection, the one used last first. Younger than what engines keep open, see IDLE_SECONDS."""
        oldest = time.perf_counter() - IDLE_SECONDS
        while self._idle:
            connection = self._idle.pop()
            if connection.closed:
                continue
            if connection.idle_since < oldest:
                connection.abort()
                continue
            return connection
        return None

    async def connect(self, *, within: float) -> Connection:
        """A new connection. Raises ConnectFailedError, also when there is none within that many seconds."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(within):
                host = self.address.host
                found = await asyncio.shield(self._look_up(loop))
                # uvloop itself would wait for a dead address until nothing of the time is left for the next one.
                sock = await aiohappyeyeballs.start_connection(found, happy_eyeballs_delay=_NEXT_SECONDS)
                _, connection = await loop.create_connection(
                    lambda: Connection(loop),
                    sock=sock,
                    ssl=self._context,
                    server_hostname=host if self._context else None,
                )
        except TimeoutError:
            raise ConnectFailedError("no connection in time") from None
        except (OSError, UnicodeError) as error:  # the latter for a host name that can be none
            raise ConnectFailedError(f"cannot connect: {error}") from None
        self.is_suspect = False
        self.down_until = 0.0
        return connection

    def _look_up(self, loop: asyncio.AbstractEventLoop) -> asyncio.Future[list[Any]]:
        """The name's addresses; one lookup for all who wait. While no name server answers, each keeps a thread for
        half a minute, whoever gave it up, and connections to other engines need those threads as well."""
        if self._lookup is None or self._lookup.done():
            address = self.address
            self._lookup = asyncio.ensure_future(
                loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
            )
        return self._lookup

    def give_back(self, connection: Connection) -> None:
        """End an exchange; the connection is kept when it is whole."""
        if connection.finish():
            connection.idle_since = time.perf_counter()
            self._idle.append(connection)

    def close_idle(self, *, older_than: float = 0.0) -> None:
        """Close connections that were idle for that many seconds."""
        latest = time.perf_counter() - older_than
        while self._idle and (self._idle[0].closed or self._idle[0].idle_since <= latest):
            self._idle.popleft().abort()


@functools.cache
def _client_context() -> ssl.SSLContext:
    """Certificates are checked against those of the system, or SSL_CERT_FILE; reading them takes a while."""
    return ssl.create_default_context()


class Upstreams:
    """All engines of a worker, by base URL. They outlive snapshots, so that connections do."""

    def __init__(self) -> None:
        self._by_url: dict[str, Upstream] = {}

    def get(self, url: str) -> Upstream:
        """Raises ValueError for a URL that is none."""
        upstream = self._by_url.get(url)
        if upstream is None:
            upstream = self._by_url[url] = Upstream(parse_address(url))
        return upstream

    def tend(self, wanted: frozenset[str]) -> None:
        """Close connections that idled too long, and forget engines that no route names and no request uses."""
        for url, upstream in list(self._by_url.items()):
            gone = url not in wanted and upstream.outstanding == 0
            upstream.close_idle(older_than=0.0 if gone else IDLE_SECONDS)
            if gone:
                del self._by_url[url]

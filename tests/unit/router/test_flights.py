"""How a request ends."""

from __future__ import annotations

import asyncio
import socket
from unittest import mock

from finetune_router import flights


async def test_a_client_that_reads_nothing_does_not_keep_its_connection() -> None:
    """What is written for it stays in memory, and so does the socket, for as long as it likes."""
    lost = asyncio.Event()

    class Client(asyncio.Protocol):
        def connection_lost(self, exc: Exception | None) -> None:
            lost.set()

    ours, theirs = socket.socketpair()
    transport, _ = await asyncio.get_running_loop().create_connection(Client, sock=ours)
    transport.write(b"x" * 10_000_000)
    flights.cut(mock.Mock(transport=transport), patience=0.1)
    await asyncio.sleep(0)
    assert not lost.is_set(), "it has the time to read"
    async with asyncio.timeout(5):
        await lost.wait()
    theirs.close()

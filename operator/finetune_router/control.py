"""The line between the parent process and a worker: JSON messages over a socket pair.

orjson, because a thousand aliases are two megabytes every two seconds, on the core that serves requests.

Parent to worker: setup, routes, report, drain. Worker to parent: serving, applied, counters.
"""

from __future__ import annotations

import asyncio
import struct
from typing import Any

import orjson

_LENGTH = struct.Struct(">I")
_LONGEST = 256 * 1024 * 1024  # bytes; a broken length must not eat the memory

Message = dict[str, Any]


class Channel:
    """One end of the line."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, kind: str, **content: Any) -> None:
        """Queue a message; a line that is closed swallows it, whoever reads from it learns of that."""
        if self._writer.is_closing():
            return
        data = orjson.dumps({"kind": kind, **content})
        self._writer.write(_LENGTH.pack(len(data)) + data)

    async def drain(self) -> None:
        await self._writer.drain()

    async def receive(self) -> Message | None:
        """The next message; None when the other end is gone."""
        try:
            size = _LENGTH.unpack(await self._reader.readexactly(_LENGTH.size))[0]
            if size > _LONGEST:
                return None
            message: Message = orjson.loads(await self._reader.readexactly(size))
        except (asyncio.IncompleteReadError, ConnectionError):
            return None
        return message

    def close(self) -> None:
        self._writer.close()

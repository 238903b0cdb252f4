"""A trivial engine for the router's benchmark: it parses requests and answers at once, or streams at a fixed pace.

python -m benchmarks.router_upstream --port 9100 --chunks 20 --interval 0.25
"""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import cast

import httptools
import uvloop

_TEXT = "a word or two " * 60
_ANSWER = json.dumps(
    {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "base-model",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": _TEXT}, "finish_reason": "stop"}
        ],
        "usage": {"prompt_tokens": 200, "completion_tokens": 180, "total_tokens": 380},
    }
).encode()
WHOLE = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(_ANSWER)
    + _ANSWER
)
_STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)


def _event(delta: dict[str, str], finish: str | None = None) -> bytes:
    data = json.dumps(
        {
            "id": "chatcmpl-1",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": "base-model",
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish}],
        }
    )
    return _chunk(f"data: {data}\n\n".encode())


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


_FIRST = _event({"role": "assistant", "content": "a"})
_NEXT = _event({"content": " word"})
_LAST = _event({}, "stop") + _chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


class Answerer(asyncio.Protocol):
    """One connection."""

    def __init__(self, chunks: int, interval: float) -> None:
        self._chunks = chunks
        self._interval = interval
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpRequestParser(self)
        self._stream = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self._stream = self._stream or b'"stream":true' in body or b'"stream": true' in body

    def on_message_complete(self) -> None:
        transport = self._transport
        if transport is None:
            return
        if self._stream:
            self._stream = False
            transport.write(_STREAM_HEAD + _FIRST)
            asyncio.get_running_loop().call_later(self._interval, self._go_on, 1)
        else:
            transport.write(WHOLE)

    def _go_on(self, sent: int) -> None:
        if self._transport is None:
            return
        if sent < self._chunks:
            self._transport.write(_NEXT)
            asyncio.get_running_loop().call_later(self._interval, self._go_on, sent + 1)
        else:
            self._transport.write(_LAST)


async def serve(port: int, chunks: int, interval: float) -> None:
    server = await asyncio.get_running_loop().create_server(
        lambda: Answerer(chunks, interval), "127.0.0.1", port, backlog=4096
    )
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--chunks", type=int, default=20, help="events of a stream")
    parser.add_argument("--interval", type=float, default=0.25, help="seconds between them")
    options = parser.parse_args()
    uvloop.run(serve(options.port, options.chunks, options.interval))


if __name__ == "__main__":
    main()

"""The request body: the few fields that routing needs, and the body again with another model name.

A short body is parsed whole, which finds every mistake and is fastest; a long one is only scanned. Both ways give the
same fields.
"""

from __future__ import annotations

import asyncio
import json
import re
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import orjson

from finetune_router import scanner
from finetune_router.scanner import BrokenBodyError

PARSE_UP_TO = 16 * 1024  # bytes; above, json.loads costs more than the scan
PACKINGS = frozenset(("gzip", "x-gzip", "deflate"))
_PIECE = 64 * 1024  # bytes that are unpacked at once
_BOM = b"\xef\xbb\xbf"
_MODEL_KEY = b'"model"'
_MODEL = re.compile(rb'"model"[ \t\n\r]*+:[ \t\n\r]*+("[^"\\]*+")')
_ALWAYS = frozenset(("model", "stream", "response_format"))


class Body(NamedTuple):
    """What is known of a request body."""

    data: bytes
    model: str | None
    stream: bool
    texts: dict[str, str]
    """The wanted top-level fields that are strings and not empty."""
    response_format: bytes | None
    """JSON of the field, for checking the answer."""
    spans: tuple[tuple[int, int], ...]
    """Where the values of `model` stand, one span for each occurrence of the key."""

    def for_model(self, quoted_name: bytes) -> bytes:
        """The body with the model's name replaced by a JSON string."""
        if len(self.spans) == 1:
            start, end = self.spans[0]
            return b"".join((self.data[:start], quoted_name, self.data[end:]))
        pieces: list[bytes] = []
        position = 0
        for start, end in self.spans:
            pieces += (self.data[position:start], quoted_name)
            position = end
        pieces.append(self.data[position:])
        return b"".join(pieces)


def unpack(data: bytes, encoding: str) -> Iterator[bytes]:
    """The content of a body packed in one of PACKINGS, piece by piece: a kilobyte may hold a megabyte.

    Raises BrokenBodyError.
    """
    is_bare = (
        encoding == "deflate" and data[:1] != b"" and data[0] & 0x0F != zlib.DEFLATED
    )  # some clients do so
    unpacking = zlib.decompressobj(-zlib.MAX_WBITS if is_bare else zlib.MAX_WBITS | 32)
    while not unpacking.eof:
        try:
            piece = unpacking.decompress(data, _PIECE)
        except zlib.error as error:
            raise BrokenBodyError(f"the body is not {encoding}: {error}") from None
        data = unpacking.unconsumed_tail
        if not piece and not data:
            raise BrokenBodyError(f"the body is not {encoding}: it is cut off")
        yield piece


async def scan_body(data: bytes, wanted: frozenset[str]) -> Body:
    """The fields of a long body, scanned in slices, so that other requests are not held up.

    Raises BrokenBodyError, which says where the body is not JSON.
    """
    walk = scanner.scan(data, wanted | _ALWAYS)
    while True:
        try:
            next(walk)
        except StopIteration as done:
            return _from_fields(done.value, wanted)
        await asyncio.sleep(0)


def parse_body(data: bytes, wanted: frozenset[str]) -> Body:
    """The fields of a short body. Raises BrokenBodyError."""
    try:
        values = _read(data)
        asked = values.get("response_format") if isinstance(values, dict) else None
        # Written again it may be nested too deeply where it was not when it was read.
        response_format = json.dumps(asked).encode() if asked else None
    except (ValueError, RecursionError) as error:
        raise BrokenBodyError(f"the body is not JSON in UTF-8: {error}") from None
    if not isinstance(values, dict):
        raise BrokenBodyError("the body must be a JSON object")
    spans: tuple[tuple[int, int], ...] = ()
    model = values.get("model")
    if isinstance(model, str):
        match = _MODEL.search(data) if data.count(_MODEL_KEY) == 1 and b"\\u" not in data else None
        # Without a match the word stands elsewhere too, or is written with escapes.
        spans = (match.span(1),) if match else tuple(scanner.scan_at_once(data, _ALWAYS).all_spans["model"])
    return Body(
        data=data,
        model=model if isinstance(model, str) else None,
        stream=values.get("stream") is True,
        texts={name: value for name in wanted if isinstance(value := values.get(name), str) and value},
        response_format=response_format,
        spans=spans,
    )


def _read(data: bytes) -> Any:
    """As json.loads reads it; orjson takes a fifth of the time and refuses more. Raises ValueError, RecursionError."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        return json.loads(data.decode("utf-8-sig" if data.startswith(_BOM) else "utf-8"))


def _from_fields(fields: scanner.Fields, wanted: frozenset[str]) -> Body:
    return Body(
        data=fields.body,
        model=fields.text("model"),
        stream=fields.raw("stream") == b"true",
        texts={name: value for name in wanted if (value := fields.text(name))},
        response_format=fields.raw("response_format"),
        spans=tuple(fields.all_spans.get("model", ())),
    )

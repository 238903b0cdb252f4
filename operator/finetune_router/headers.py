"""Which headers cross the router, in both directions (RFC 9110, section 7.6)."""

from __future__ import annotations

import functools
from collections.abc import Iterable

from multidict import CIMultiDict, CIMultiDictProxy

from finetune_operator.api.routes import ARM_HEADER, FALLBACK_HEADER, REVISION_HEADER

# Of one connection, never passed on; `connection` may name more of them. `expect` is answered by the router itself.
HOP_BY_HOP = frozenset(
    (
        "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
        "trailers", "transfer-encoding", "upgrade", "expect",
    )
)  # fmt: skip
# What the client proves itself with; only for the router.
CREDENTIALS = frozenset(("authorization", "proxy-authorization", "cookie", "x-api-key", "api-key"))
# Set by the router: the body is a new one, and answers must be such that it can read them.
_OWN = frozenset(("host", "content-length", "content-encoding", "x-request-id", "accept-encoding"))
READABLE_ENCODINGS = frozenset(("gzip", "x-gzip", "deflate", "identity"))
_FORWARDED = (
    "accept", "accept-language", "content-type", "user-agent", "traceparent", "tracestate",
    "x-client-request-id",
)  # fmt: skip
_LONGEST_CACHED = 256  # characters of an Accept-Encoding; no client has a longer one
# Whose answer it is, is for this router to say; the engine may stand behind another one.
_ARMS = {ARM_HEADER, REVISION_HEADER, FALLBACK_HEADER}
_ANSWER_DROPPED = frozenset(
    name.encode() for name in HOP_BY_HOP | {"server", "date", "content-length", "x-request-id"} | _ARMS
) - {b"expect"}


class HeaderPolicy:
    """Which of a client's headers the engines see: few by default, more by configuration."""

    def __init__(self, further: str = "") -> None:
        names = [name.strip().lower() for name in further.split(",") if name.strip()]
        self._everything = "*" in names
        self._names = frozenset(_FORWARDED) | {name for name in names if name != "*"} - HOP_BY_HOP - _OWN

    def build(self, headers: CIMultiDictProxy[str]) -> bytes:
        """Lines for the request to the engine."""
        named = {name.strip().lower() for name in headers.get("connection", "").split(",")}
        lines = []
        for name, value in headers.items():
            lowered = name.lower()
            if lowered in self._names:
                passes = lowered not in named
            else:
                passes = self._everything and lowered not in HOP_BY_HOP | CREDENTIALS | _OWN | named
            if passes and "\r" not in value and "\n" not in value and "\0" not in value:
                lines.append(f"{lowered}: {value}\r\n")
        encodings = headers.getall("accept-encoding", None)
        if encodings is not None:
            lines.append(f"accept-encoding: {_readable(encodings)}\r\n")
        return "".join(lines).encode("utf-8", "surrogateescape")


@functools.lru_cache(maxsize=256)
def _readable_in(value: str) -> str:
    """Those of a client's encodings that the router can read, with their weights."""
    items = (item.strip() for item in value.split(","))
    kept = [item for item in items if item.partition(";")[0].strip().lower() in READABLE_ENCODINGS]
    return ", ".join(kept)


def _readable(values: list[str]) -> str:
    """What an engine may send to this client. Signals of the output would be blind to br and zstd."""
    text = ", ".join(values)
    kept = _readable_in(text) if len(text) <= _LONGEST_CACHED else ""
    return kept or "identity"


def answer_headers(headers: Iterable[tuple[bytes, bytes]]) -> CIMultiDict[str]:
    """Headers of an engine's answer that the client sees."""
    named: set[bytes] = set()
    passed: list[tuple[bytes, bytes]] = []
    for name, value in headers:
        if name == b"connection":
            named.update(part.strip().lower() for part in value.split(b","))
        elif name not in _ANSWER_DROPPED:
            passed.append((name, value))
    return CIMultiDict(
        (name.decode("latin-1"), value.decode("utf-8", "surrogateescape"))
        for name, value in passed
        if name not in named
    )

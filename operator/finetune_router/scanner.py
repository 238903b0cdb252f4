"""Finds the top-level fields of a JSON request body without parsing the rest of it.

A prompt of 100,000 tokens is one long string: its end is found by memchr, and nothing of it is copied or decoded. For
every body that is valid JSON the fields are those that `json.loads` would give, the last of equal keys included. A body
that is broken inside a nested value may pass here; it is passed on as it is, and the engine refuses it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator
from dataclasses import dataclass, field

_STEPS_BETWEEN_YIELDS = 2048  # about 0.5 ms of work; other requests get their turn in between
_BLANK = re.compile(rb"[ \t\n\r]*+")
_SCALAR = re.compile(
    rb"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?|true|false|null|NaN|-?Infinity"
)
_NESTED = re.compile(rb'["\[\]{}]')
_ESCAPE = re.compile(rb"[\x00-\x1f]|\\")
_BOM = b"\xef\xbb\xbf"
_QUOTE, _BACKSLASH, _COMMA, _COLON, _OPEN, _CLOSE = b'"\\,:{}'
_OPENERS = b"{["
_LONGEST_KEY = 256  # bytes; a longer key is none that anybody looks for


class BrokenBodyError(ValueError):
    """The body is not a JSON object in UTF-8. The message says where."""


@dataclass(slots=True)
class Fields:
    """Spans (start, end) of the values of the wanted keys; `all_spans` has each occurrence of a repeated key."""

    body: bytes
    last: dict[str, tuple[int, int]] = field(default_factory=dict)
    all_spans: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def text(self, key: str) -> str | None:
        """The value when it is a string, else None. Raises BrokenBodyError for a string that is not valid."""
        span = self.last.get(key)
        if span is None or self.body[span[0]] != _QUOTE:
            return None
        return _decode(self.body[span[0] : span[1]])

    def raw(self, key: str) -> bytes | None:
        """The value as it stands in the body."""
        span = self.last.get(key)
        return None if span is None else self.body[span[0] : span[1]]


def scan(body: bytes, wanted: frozenset[str]) -> Generator[None, None, Fields]:
    """Walk over the body and return the fields; yields now and then so that a long one can be walked in pieces.

    Raises BrokenBodyError when the body is not an object, when a key or the outer structure is broken, or when it
    ends too early.
    """
    fields = Fields(body)
    size = len(body)
    position = _skip(body, len(_BOM) if body.startswith(_BOM) else 0)
    if position >= size or body[position] != _OPEN:
        raise BrokenBodyError("the body must be a JSON object in UTF-8")
    position = _skip(body, position + 1)
    if position < size and body[position] == _CLOSE:
        _expect_end(body, position + 1)
        return fields
    steps = 0
    while True:
        if position >= size or body[position] != _QUOTE:
            raise BrokenBodyError(f"expected a key in double quotes at byte {position}")
        key_end = _string_end(body, position)
        key = _key(body, position, key_end)
        position = _skip(body, key_end)
        if position >= size or body[position] != _COLON:
            raise BrokenBodyError(f"expected ':' after a key at byte {position}")
        start = position = _skip(body, position + 1)
        if position >= size:
            raise BrokenBodyError("the body ends where a value was expected")
        first = body[position]
        if first == _QUOTE:
            position = _string_end(body, position)
        elif first in _OPENERS:
            position = yield from _nested_end(body, position)
        else:
            match = _SCALAR.match(body, position)
            if match is None:
                raise BrokenBodyError(f"no JSON value at byte {position}")
            position = match.end()
        if key in wanted:
            fields.last[key] = span = (start, position)
            fields.all_spans.setdefault(key, []).append(span)
        position = _skip(body, position)
        if position >= size:
            raise BrokenBodyError("the body ends before its object is closed")
        if body[position] == _CLOSE:
            _expect_end(body, position + 1)
            return fields
        if body[position] != _COMMA:
            raise BrokenBodyError(f"expected ',' or '}}' at byte {position}")
        position = _skip(body, position + 1)
        steps += 1
        if steps % _STEPS_BETWEEN_YIELDS == 0:
            yield


def scan_at_once(body: bytes, wanted: frozenset[str]) -> Fields:
    """`scan` without a break, for short bodies."""
    walk = scan(body, wanted)
    while True:
        try:
            next(walk)
        except StopIteration as done:
            fields: Fields = done.value
            return fields


def _skip(body: bytes, position: int) -> int:
    """The next position that is not white space."""
    if position < len(body) and body[position] > 0x20:
        return position
    match = _BLANK.match(body, position)
    return match.end() if match else position


def _string_end(body: bytes, position: int) -> int:
    """The position after the closing quote of the string that opens at `position`."""
    end = position
    while True:
        end = body.find(b'"', end + 1)
        if end < 0:
            raise BrokenBodyError(f"the string that starts at byte {position} is not closed")
        before = end - 1
        while body[before] == _BACKSLASH:  # stops at the opening quote at the latest
            before -= 1
        if (end - before) & 1:  # an even number of backslashes: the quote is not escaped
            return end + 1


def _nested_end(body: bytes, position: int) -> Generator[None, None, int]:
    """The position after the array or object that opens at `position`.

    Brackets are only counted: where their kinds do not match, no reader takes the body for JSON.
    """
    depth = 0
    steps = 0
    here = position
    search = _NESTED.search
    while True:
        match = search(body, here)
        if match is None:
            raise BrokenBodyError(f"the value that starts at byte {position} is not closed")
        here = match.end()
        sign = body[here - 1]
        if sign == _QUOTE:
            here = _string_end(body, here - 1)
        elif sign in _OPENERS:
            depth += 1
        else:
            depth -= 1
            if depth == 0:
                return here
        steps += 1
        if steps % _STEPS_BETWEEN_YIELDS == 0:
            yield


def _key(body: bytes, start: int, end: int) -> str:
    """The key as text; escapes such as \\u006d are resolved, because engines resolve them too."""
    if end - start > _LONGEST_KEY * 6:
        return ""
    return _decode(body[start:end])


def _decode(quoted: bytes) -> str:
    try:
        if _ESCAPE.search(quoted) is None:
            return quoted[1:-1].decode()
        value: str = json.loads(quoted)
    except ValueError as error:  # UnicodeDecodeError is one
        raise BrokenBodyError(f"a string of the outer object is broken: {error}") from None
    return value


def _expect_end(body: bytes, position: int) -> None:
    if _skip(body, position) != len(body):
        raise BrokenBodyError(f"something follows the JSON object at byte {position}")

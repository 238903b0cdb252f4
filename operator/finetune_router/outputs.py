"""What an answer says: its text, why it ended, how many tokens it has; and which output signals that fires.

This runs after the user has the answer. Bytes are taken as the engines send them: OpenAI's JSON, or its server-sent
events.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import jsonschema_rs

from finetune_operator.api.routes import WORD_BINS, SignalEvent
from finetune_router import paths
from finetune_router.documents import read_json

TEXT_LIMIT = 1024 * 1024  # characters kept of one choice; a longer text is not checked against a schema
_MOST_TOKENS = 10**9  # of one answer; what says more, or less than none, has not counted them
_PIECES = 512  # joined then: many short strings take ten times their length in memory
_DATA = b"data:"
_DONE = b"[DONE]"
_BLANK = b"\xef\xbb\xbf \t\r\n"  # and a byte order mark
_BEGINNING = 256  # bytes in which an answer shows what it is
_UNPACKED = 128 * 1024  # more than becomes of so many
_FIRST_DATA = re.compile(rb"(?:^|[\r\n])data:[ \t]*+([^ \t\r\n][^\r\n]*+)[\r\n]")
# Possessive (`*+`): a text of blanks only, as loops make them, took 50 ms of trying each way to share them out.
_REFUSAL = re.compile(
    r"\W*+(?:(?:i['’]?m|i am) (?:very |really |so )?(?:sorry|afraid)|sorry\b|i apologi[sz]e|unfortunately)?"
    r"[,.;:!\s—-]*+(?:but |that )?(?:as an ai\b[^.]{0,60}?[,\s])?"
    r"\s*+i(?:['’]m| am)?\s*(?:can(?:no|['’]?)t|can not|unable to|not able to|won['’]?t|will not"
    r"|must decline|must refuse|do not feel comfortable|don['’]?t feel comfortable)\b",
    re.IGNORECASE,
)
_REPEATS = 5  # equal pieces in a row at the end of the text ...
_REPEATED_CHARACTERS = 60  # ... that together are at least this long
_PROBE = 16
_FIRST_WORDS, _FIRST_CHARACTERS = 32, 500  # of an answer, so that all count for about as much
# A word, or a sign of a script that puts no blanks between words.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")


@dataclass(slots=True)
class Choice:
    """One of the `n` answers."""

    has_tool_call: bool = False
    refused: bool = False
    finish_reason: str | None = None
    cut: bool = False
    """Whether the text is longer than what was kept."""
    _pieces: list[str] = field(default_factory=list)
    _size: int = 0

    def add(self, text: str) -> None:
        self._size += len(text)
        if self._size > TEXT_LIMIT:
            self.cut = True
        else:
            self._pieces.append(text)
            if len(self._pieces) > _PIECES:
                self._pieces = ["".join(self._pieces)]

    @property
    def text(self) -> str:
        return "".join(self._pieces)

    @property
    def is_begun(self) -> bool:
        """Whether there is anything but its role."""
        return bool(self._size or self.has_tool_call or self.refused or self.finish_reason)


@dataclass(slots=True)
class Output:
    """What was read of an answer so far."""

    choices: dict[int, Choice] = field(default_factory=dict)
    completion_tokens: int | None = None
    error: bool = False
    """An error object where an answer was expected, as engines send in the middle of a stream."""
    generative: bool = False
    """Whether the answer has choices at all; embeddings have none."""

    def is_answer(self, target: str) -> bool:
        """Whether it is no error, and has choices where answers have some, be they none. `target` is what was asked."""
        return not self.error and (self.generative or not paths.has_choices(target))

    def add(self, document: object) -> None:
        """Take in a whole answer, or one event of a stream."""
        if not isinstance(document, dict):
            return
        kinds = document.get("object"), document.get("type")
        if document.get("error") or "error" in kinds or "response.failed" in kinds:
            self.error = True
        usage = document.get("usage")
        tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
        if isinstance(tokens, int) and 0 <= tokens <= _MOST_TOKENS:
            self.completion_tokens = tokens
        choices = document.get("choices")
        if not isinstance(choices, list):
            return
        self.generative = True
        for item in choices:
            if isinstance(item, dict):
                index = item.get("index")
                self._add_choice(
                    self.choices.setdefault(index if isinstance(index, int) else 0, Choice()), item
                )

    def _add_choice(self, choice: Choice, item: dict[str, object]) -> None:
        message = item.get("message") or item.get("delta")
        text: object = item.get("text")
        if isinstance(message, dict):
            text = message.get("content")
            choice.has_tool_call |= bool(message.get("tool_calls") or message.get("function_call"))
            choice.refused |= bool(message.get("refusal"))
        if isinstance(text, str):
            choice.add(text)
        reason = item.get("finish_reason")
        if isinstance(reason, str):
            choice.finish_reason = reason


class EventReader:
    """Server-sent events (WHATWG HTML, "Server-sent events"), fed in pieces cut anywhere."""

    def __init__(self) -> None:
        self._rest = b""
        self._lines: list[bytes] = []
        """Data of an event whose first line is no JSON of its own."""
        self._size = 0
        self.events = 0

    def feed(self, data: bytes, output: Output) -> None:
        lines = (self._rest + data).replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        self._rest = lines.pop()
        for line in lines:
            if not line.startswith(_DATA):
                if self._lines and not line:
                    self._end_event(output)
                continue
            value = line[len(_DATA) :].strip()
            if not value or value.startswith(_DONE):
                continue
            if self._lines:
                self._keep(value, output)
                continue
            try:
                document = read_json(value)
            except (ValueError, RecursionError):
                self._keep(value, output)
                continue
            self.events += 1
            output.add(document)

    def _keep(self, value: bytes, output: Output) -> None:
        self._lines.append(value)
        self._size += len(value)
        if self._size > TEXT_LIMIT:
            self._end_event(output)

    def _end_event(self, output: Output) -> None:
        try:
            document = read_json(b"\n".join(self._lines))
        except (ValueError, RecursionError):
            output.error = True  # clients stumble over it
        else:
            self.events += 1
            output.add(document)
        self._lines, self._size = [], 0

    def end(self, output: Output) -> None:
        """Nothing more comes: the last line may have no end. What has said nothing until then has failed."""
        self.feed(b"\n\n", output)
        is_begun = any(choice.is_begun for choice in output.choices.values())
        output.error |= not self.events or (output.generative and not is_begun)


def read_answer(body: bytes) -> Output:
    """A whole answer that is no stream."""
    output = Output()
    try:
        output.add(read_json(body))
    except (ValueError, RecursionError):
        output.error = True
    return output


def is_answer(body: bytes, encoding: str, target: str) -> bool:
    """Whether a whole answer is one, and not an error object or no JSON, as far as it can be read."""
    try:
        plain = decoded(body, encoding, _UNPACKED) if encoding else body
    except ValueError:
        return False
    return plain is None or read_answer(plain).is_answer(target)


def begins_with_error(data: bytes, encoding: str, limit: int, *, is_whole: bool = False) -> bool | None:
    """Whether a stream begins with an error (the engine failed after it had sent its headers), with no JSON, or with
    its end.

    None as long as its first event is not there as a whole, for example behind a comment that keeps the line open.
    """
    try:
        plain = decoded(data, encoding, limit) if encoding else data
    except ValueError:
        return True
    if plain is None:
        return False
    match = _FIRST_DATA.search(plain + b"\n" if is_whole else plain)  # the last line may have no end
    if match is None:
        return is_whole or (None if len(plain) < limit else False)
    value = match[1]
    return not value.startswith(b"{") or (b'"error"' in value and read_answer(value).error)


def begins_as_json(data: bytes, encoding: str) -> bool:
    """Whether the beginning of an answer is that of an object or a list, as far as it can be read."""
    beginning = data[:_BEGINNING]
    if encoding:
        try:
            plain = decoded(beginning, encoding, _UNPACKED)
        except ValueError:
            return False
        if plain is None:
            return True
        beginning = plain
    text = beginning.lstrip(_BLANK)
    # Blanks keep a connection open while an engine thinks.
    return text.startswith((b"{", b"[")) if text else len(data) > _BEGINNING


def decoded(data: bytes, encoding: str, limit: int) -> bytes | None:
    """The content of a compressed answer; None for other codings, or when it is longer than `limit` bytes.

    Raises ValueError for what is not compressed as it says.
    """
    if encoding not in {"gzip", "deflate", "x-gzip"}:
        return None
    headed, bare = zlib.MAX_WBITS | 32, -zlib.MAX_WBITS  # some servers send deflate bare, and clients take it
    for window in (headed, bare) if encoding == "deflate" else (headed,):
        unpacking = zlib.decompressobj(wbits=window)
        with contextlib.suppress(zlib.error):
            content = unpacking.decompress(data, limit)
            # half a document would look like an engine's mistake
            return None if unpacking.unconsumed_tail else content
    raise ValueError(f"no {encoding}")


def fired_events(
    output: Output, wanted: frozenset[SignalEvent], validator: jsonschema_rs.Validator | None
) -> frozenset[SignalEvent]:
    """Those of the wanted events that any choice of the answer shows."""
    if not output.generative:
        return frozenset()
    choices = list(output.choices.values()) or [Choice()]
    return frozenset(event for event in wanted if any(_shows(event, choice, validator) for choice in choices))


def _shows(event: SignalEvent, choice: Choice, validator: jsonschema_rs.Validator | None) -> bool:
    match event:
        case SignalEvent.SCHEMA_INVALID:
            return not choice.cut and not choice.has_tool_call and not is_valid(choice.text, validator)
        case SignalEvent.EMPTY:
            return not choice.has_tool_call and not choice.refused and not choice.text.strip()
        case SignalEvent.TRUNCATED:
            return choice.finish_reason == "length"
        case SignalEvent.FLAGGED:
            return choice.finish_reason == "content_filter"
        case SignalEvent.REFUSAL:
            return choice.refused or is_refusal(choice.text)
        case SignalEvent.REPETITION:
            return is_repetitive(choice.text)
    return False


def word_bins(text: str) -> Iterator[int]:
    """Bin of each of the first words. Nothing of the text can be read from counts of so few bins."""
    words = _WORD.finditer(text[:_FIRST_CHARACTERS].lower())
    for match in itertools.islice(words, _FIRST_WORDS):
        yield zlib.crc32(match.group().encode("utf-8", "surrogatepass")) % WORD_BINS


def is_valid(text: str, validator: jsonschema_rs.Validator | None) -> bool:
    """Whether the text is JSON, and valid where there is a schema."""
    try:
        value = json.loads(text)
        return validator is None or validator.is_valid(value)
    except (ValueError, RecursionError):
        return False


def is_refusal(text: str) -> bool:
    """Whether the text begins like a refusal (English)."""
    return _REFUSAL.match(text[:200]) is not None


def is_repetitive(text: str) -> bool:
    """Whether the text ends in one piece five or more times in a row, 60 characters or more in all.

    The end of a looping generation is where the loop is; the last 16 characters are looked up before themselves, and
    the distance is the length of the piece.
    """
    text = text.rstrip()
    if len(text) < _REPEATED_CHARACTERS:
        return False
    probe = text[-_PROBE:]
    found = text.rfind(probe, max(0, len(text) - len(text) // _REPEATS - 2 * _PROBE), len(text) - 1)
    if found < 0:
        return False
    period = len(text) - _PROBE - found
    length = max(period * _REPEATS, _REPEATED_CHARACTERS)
    if length > len(text):
        return False
    tail = text[-length:]
    return tail[period:] == tail[:-period]

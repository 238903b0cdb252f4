"""Tokens to text, piece by piece: characters that several tokens form, and stop strings that cross tokens."""

from __future__ import annotations

from typing import Any

UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no whole character yet
PATIENCE = 8  # tokens to wait for the rest of a character; no UTF-8 character has more than 4 bytes


class Detokenizer:
    """Decodes a growing list of tokens without decoding it again and again."""

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        """`tokenizer` is a tokenizers.Tokenizer; the end of the prompt decides about spaces before the answer."""
        self._tokenizer = tokenizer
        self._tokens = list(prompt[-4:])
        self._begin = 0  # of the window that is decoded
        self._known = len(self._tokens)  # tokens whose text was returned

    def push(self, token: int) -> str:
        """Returns the text that the token completes, which may be none."""
        self._tokens.append(token)
        return self._advance(final=False)

    def flush(self) -> str:
        """Returns what is still held back: an unfinished character."""
        return self._advance(final=True)

    def _advance(self, *, final: bool) -> str:
        before = self._decode(self._begin, self._known)
        after = self._decode(self._begin, len(self._tokens))
        waiting = len(self._tokens) - self._known
        if not waiting or (after.endswith(UNFINISHED) and waiting < PATIENCE and not final):
            return ""
        self._begin, self._known = self._known, len(self._tokens)
        return after[len(before) :]

    def _decode(self, begin: int, end: int) -> str:
        return str(self._tokenizer.decode(self._tokens[begin:end], skip_special_tokens=True))


class StopFilter:
    """Passes text on until a stop string begins; what could be the beginning of one is held back."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """Returns the text that may be shown and, when one was found, the stop string (which is not shown)."""
        if not self._stops:
            return text, None
        text = self._held + text
        found = min(((text.find(stop), stop) for stop in self._stops if stop in text), default=None)
        if found is not None:
            self._held = ""
            return text[: found[0]], found[1]
        kept = self._doubtful(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept], None

    def flush(self) -> str:
        """Returns what was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held

    def _doubtful(self, text: str) -> int:
        """Length of the longest end of the text that begins a stop string."""
        longest = max(len(stop) for stop in self._stops) - 1
        return next(
            (
                size
                for size in range(min(longest, len(text)), 0, -1)
                if any(stop.startswith(text[-size:]) for stop in self._stops)
            ),
            0,
        )

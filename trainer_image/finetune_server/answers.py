"""Answers in OpenAI's shapes: whole ones and the chunks of a stream, for both APIs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from finetune_server.sampling import TokenLogprob
from finetune_server.sequences import Finish, Piece

DONE = b"data: [DONE]\n\n"


@dataclass
class Choice:
    """What has arrived of one answer."""

    text: str = ""
    tokens: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: Finish | None = None
    stop_reason: str | int | None = None

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.tokens += len(piece.tokens)
        self.logprobs.extend(piece.logprobs)
        self.finish, self.stop_reason = piece.finish, piece.stop_reason


@dataclass(frozen=True)
class Form:
    """The shape of one request's answers."""

    identity: str
    model: str
    is_chat: bool
    wants_logprobs: bool
    decode: Callable[[int], str]  # a token's text
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: list[Choice], *, prompt_tokens: int) -> dict[str, Any]:
        """Returns the answer to a request that does not stream."""
        built = []
        for index, choice in enumerate(choices):
            content: dict[str, Any] = (
                {"message": {"role": "assistant", "content": choice.text}}
                if self.is_chat
                else {"text": choice.text}
            )
            built.append(
                {
                    "index": index,
                    **content,
                    "logprobs": self._logprobs(choice.logprobs, offset=0),
                    "finish_reason": choice.finish,
                    "stop_reason": choice.stop_reason,
                }
            )
        tokens = sum(choice.tokens for choice in choices)
        return {
            **self._head("chat.completion" if self.is_chat else "text_completion"),
            "choices": built,
            "usage": usage(prompt_tokens, tokens),
        }

    def opening(self, index: int) -> bytes:
        """Returns the first chunk of a chat answer, which says whose turn it is; nothing for completions."""
        if not self.is_chat:
            return b""
        return self._chunk(
            [{"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]
        )

    def chunk(self, index: int, piece: Piece, *, offset: int) -> bytes:
        """Returns the chunk for a piece that begins at character `offset`; nothing when it says nothing."""
        if not (piece.text or piece.finish or (self.wants_logprobs and piece.logprobs)):
            return b""
        content: dict[str, Any] = {"delta": {"content": piece.text}} if self.is_chat else {"text": piece.text}
        choice = {
            "index": index,
            **content,
            "logprobs": self._logprobs(list(piece.logprobs), offset=offset),
            "finish_reason": piece.finish,
        }
        if piece.finish is not None:
            choice["stop_reason"] = piece.stop_reason
        return self._chunk([choice])

    def usage_chunk(self, *, prompt_tokens: int, tokens: int) -> bytes:
        return self._chunk([], usage=usage(prompt_tokens, tokens))

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        head = self._head("chat.completion.chunk" if self.is_chat else "text_completion")
        return event({**head, "choices": choices, **more})

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.identity, "object": kind, "created": self.created, "model": self.model}

    def _logprobs(self, found: list[TokenLogprob], *, offset: int) -> dict[str, Any] | None:
        if not self.wants_logprobs:
            return None
        if self.is_chat:
            return {
                "content": [
                    {
                        **self._entry(one.token, one.logprob),
                        "top_logprobs": [self._entry(token, value) for token, value in one.top],
                    }
                    for one in found
                ]
            }
        texts = [self.decode(one.token) for one in found]
        offsets = [offset + sum(len(text) for text in texts[:place]) for place in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [one.logprob for one in found],
            "top_logprobs": [self._top(one) for one in found],
            "text_offset": offsets,
        }

    def _top(self, one: TokenLogprob) -> dict[str, float]:
        told: dict[str, float] = {}
        for token, value in ((one.token, one.logprob), *one.top):
            told.setdefault(self.decode(token), value)  # parts of characters look alike: the first one stays
        return told

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.decode(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}


def usage(prompt_tokens: int, tokens: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": tokens,
        "total_tokens": prompt_tokens + tokens,
    }


def event(document: dict[str, Any]) -> bytes:
    """Returns a server-sent event."""
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()

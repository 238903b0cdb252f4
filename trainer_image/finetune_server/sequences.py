"""One answer in the making, and what the engine says about it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from finetune_server.sampling import Sampling, TokenLogprob, make_generator
from finetune_server.texts import Detokenizer, StopFilter


class Finish(StrEnum):
    """Why an answer ended; the values are OpenAI's and vLLM's."""

    STOP = "stop"  # end token or stop string
    LENGTH = "length"  # max_tokens or the model's length
    ABORT = "abort"  # the client went away, or the engine stopped
    ERROR = "error"  # the engine failed; `message` says how


@dataclass(frozen=True)
class Piece:
    """What one step added to an answer."""

    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    stop_reason: str | int | None = None  # the stop string or token, when that is what ended it
    message: str = ""  # of an error


@dataclass(eq=False)
class Sequence:
    """State of one sequence. The engine's thread owns it once it is submitted."""

    prompt: list[int]
    settings: Sampling
    model: str  # name that the client asked for
    tokenizer: Any  # tokenizers.Tokenizer
    ends: frozenset[int]  # end tokens of the model
    sink: Callable[[Piece], None]  # called from the engine's thread
    adapter: str | None = None  # key of the weights in the bank; None: the base model
    arrived: float = field(default_factory=time.monotonic)
    output: list[int] = field(default_factory=list)
    computed: int = 0  # tokens whose keys and values are stored
    started: float | None = None
    last_token: float | None = None
    finish: Finish | None = None
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.random = make_generator(self.settings.seed)
        self.seen: Counter[int] = Counter()
        self._text = Detokenizer(self.tokenizer, self.prompt)
        self._stops = StopFilter(self.settings.stop)

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.output)

    def pending(self) -> list[int]:
        """Tokens that the model has not seen yet."""
        if self.computed >= len(self.prompt):
            return self.output[self.computed - len(self.prompt) :]
        return self.prompt[self.computed :] + self.output

    def add(self, token: int, logprob: TokenLogprob | None, *, max_length: int) -> Piece:
        """Takes a chosen token and returns what the client may see of it."""
        self.output.append(token)
        self.seen[token] += 1
        settings = self.settings
        logprobs = () if logprob is None else (logprob,)
        is_end = token in self.ends and not settings.ignore_eos
        if is_end or token in settings.stop_token_ids:
            self.finish = Finish.STOP
            reason = None if is_end else token
            text, stop = self._stops.push(self._text.flush())
            return Piece(
                text + ("" if stop else self._stops.flush()), (token,), logprobs, self.finish, stop or reason
            )
        text, stop = self._stops.push(self._text.push(token))
        if stop is None and (len(self.output) >= settings.max_tokens or self.length >= max_length):
            self.finish = Finish.LENGTH
            more, stop = self._stops.push(self._text.flush())
            text += more + ("" if stop else self._stops.flush())
        if stop is not None:
            self.finish = Finish.STOP
        return Piece(text, (token,), logprobs, self.finish, stop)

"""Messages and texts to tokens, as the model was taught to read them."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jinja2

from finetune_server.errors import BadRequest
from finetune_server.wire import ChatRequest, CompletionRequest

RENDER_SECONDS = 10.0  # a long conversation takes a tenth of a second


def encode_chat(
    request: ChatRequest, tokenizer: Any, *, template: str | None, max_characters: int
) -> list[int]:
    """Returns the prompt's tokens. `template` is the adapter's own. Raises BadRequest, which names the field."""
    if template is None and tokenizer.chat_template is None:
        raise BadRequest(
            "messages: the model has no chat template; use /v1/completions, or train with model.chatTemplate",
            "messages",
        )
    messages = [message.render() for message in request.messages]
    try:
        with _ended_in_time():
            text = tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                chat_template=template,
                add_generation_prompt=request.add_generation_prompt and not request.continue_final_message,
                continue_final_message=request.continue_final_message,
                **(request.chat_template_kwargs or {}),
            )
    except Exception as error:  # a template is a program and raises what it likes
        raise BadRequest(
            f"messages: the chat template refuses them ({type(error).__name__}: {error})", "messages"
        ) from None
    return _encode(text, tokenizer, field="messages", special=False, max_characters=max_characters)


@contextlib.contextmanager
def _ended_in_time() -> Iterator[None]:
    """Breaks a template off that loops for longer than RENDER_SECONDS: nothing else would ever end its thread."""
    deadline = time.monotonic() + RENDER_SECONDS

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename != "<template>":
            return None
        if time.monotonic() > deadline:
            raise jinja2.TemplateRuntimeError(f"it takes more than {RENDER_SECONDS:g} s")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def encode_completion(
    request: CompletionRequest, tokenizer: Any, *, vocabulary: int, max_characters: int
) -> list[list[int]]:
    """Returns the tokens of every prompt. Raises BadRequest, which names the field."""
    found = []
    for prompt in request.prompts():
        if isinstance(prompt, str):
            tokens = _encode(
                prompt,
                tokenizer,
                field="prompt",
                special=request.add_special_tokens,
                max_characters=max_characters,
            )
        else:
            tokens = prompt
            if not all(0 <= token < vocabulary for token in tokens):
                raise BadRequest(f"prompt: tokens must be from 0 to {vocabulary - 1}", "prompt")
        if not tokens:
            raise BadRequest("prompt: it is empty; send at least one token", "prompt")
        found.append([int(token) for token in tokens])
    return found


def _encode(text: str, tokenizer: Any, *, field: str, special: bool, max_characters: int) -> list[int]:
    # Eight texts of 8 MB at once took 8 GB, and a minute in which no other prompt was encoded.
    if len(text) > max_characters:
        raise BadRequest(
            f"{field}: the model's maximum context length holds {max_characters} characters at most, and the prompt "
            f"has {len(text)}. Please reduce the length of the prompt.",
            field,
        )
    if not is_whole(text):
        raise BadRequest(f"{field}: the text holds half a character (a lone surrogate)", field)
    # The backend itself: the wrapper around it sets its options at each call, and threads would meet there. As a batch
    # of one: `encode` holds Python's lock, and for a text of 10 MB no other answer goes on for ten seconds.
    (found,) = tokenizer.backend_tokenizer.encode_batch_fast([text], add_special_tokens=special)
    return [int(token) for token in found.ids]


def is_whole(text: str) -> bool:
    """Whether a text can be written as UTF-8; JSON can say half a character."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_length(tokens: int, *, asked: int | None, longest: int, default: int | None) -> int:
    """Returns how many tokens may be generated. Raises BadRequest when prompt and answer do not fit the model."""
    if tokens >= longest or (asked is not None and tokens + asked > longest):
        wanted = f"{asked} output tokens and " if asked is not None else ""
        raise BadRequest(
            f"This model's maximum context length is {longest} tokens. However, you requested {wanted}"
            f"your prompt contains {tokens} input tokens. Please reduce the length of the prompt"
            f"{' or the number of requested output tokens' if asked is not None else ''}."
        )
    room = longest - tokens
    return asked if asked is not None else min(room, default or room)

"""Chat templates, which are programs from outside: what is wrong with one is told, and none runs for ever.

And texts of any length, which hold up nobody else.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import pytest

from finetune_server import prompts
from finetune_server.errors import BadRequest
from finetune_server.wire import ChatRequest, CompletionRequest
from tests import tiny

REQUEST = ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "Hello"}]})


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny.build_tokenizer()


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% for i in range(10**9) %}{% endfor %}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ raise_exception('only one turn') }}", "only one turn"),
    ],
)
def test_a_template_that_fails_is_told(tokenizer: Any, template: str, message: str) -> None:
    with pytest.raises(BadRequest, match=f"messages: the chat template refuses them .*{message}"):
        prompts.encode_chat(REQUEST, tokenizer, template=template, max_characters=1000)


def test_a_template_that_loops_for_ever_is_broken_off(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "RENDER_SECONDS", 0.1)
    before = sys.gettrace()
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(BadRequest, match=r"it takes more than 0\.1 s"):
        prompts.encode_chat(REQUEST, tokenizer, template=loops, max_characters=1000)
    assert sys.gettrace() is before


def test_other_threads_have_their_turn_while_a_long_text_is_encoded(tokenizer: Any) -> None:
    asked = CompletionRequest.model_validate({"model": "m", "prompt": "hello wörld " * 100_000})
    thread = threading.Thread(
        target=prompts.encode_completion,
        args=(asked, tokenizer),
        kwargs={"vocabulary": 1, "max_characters": 10**7},
    )
    begun = last = time.monotonic()
    longest = 0.0
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.001)
        now = time.monotonic()
        longest, last = max(longest, now - last), now
    assert longest < (last - begun) / 2


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded(tokenizer: Any) -> None:
    text = "hello " * 1000
    chat = ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": text}]})
    completion = CompletionRequest.model_validate({"model": "m", "prompt": text})
    with pytest.raises(BadRequest, match="messages: the model's maximum context length holds 5000"):
        prompts.encode_chat(chat, tokenizer, template=None, max_characters=5000)
    with pytest.raises(BadRequest, match=r"prompt: .* 5999 characters at most, and the prompt has 6000"):
        prompts.encode_completion(completion, tokenizer, vocabulary=1, max_characters=5999)
    assert prompts.encode_completion(completion, tokenizer, vocabulary=1, max_characters=6000)

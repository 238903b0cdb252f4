"""What clients may rely on, whichever engine answers: ours, or a vLLM that FINETUNE_VLLM_URL names.

Against vLLM, FINETUNE_VLLM_ADAPTER is the path of a LoRA adapter that it can load; without, those tests are skipped.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.integration.server.processes import call, engine
from tests.waiting import wait_until

VLLM = os.environ.get("FINETUNE_VLLM_URL")
QUESTION = [{"role": "user", "content": "What colour is cup 3?"}]


@dataclass(frozen=True)
class Served:
    """An engine under test."""

    url: str
    base: str
    adapters: tuple[str, ...]  # paths

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def served(
    tiny_model: Path, published: dict[str, tuple[Path, str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    if VLLM:
        base = call("GET", f"{VLLM}/v1/models")[1]["data"][0]["id"]
        adapter = os.environ.get("FINETUNE_VLLM_ADAPTER")
        yield Served(VLLM, base, (adapter, adapter) if adapter else ())
        return
    paths = tuple(str(published[name][0]) for name in ("first", "second"))
    with engine(
        tiny_model, tmp_path_factory.mktemp("contract"), "--max-loras", "2", "--max-queue", "8"
    ) as made:
        made.wait_healthy()
        yield Served(made.url, "tiny", paths)


@pytest.fixture
def client(served: Served) -> openai.OpenAI:
    return served.client()


@pytest.fixture
def adapters(served: Served) -> Iterator[list[str]]:
    """Two loaded adapters; unloaded afterwards."""
    if not served.adapters:
        pytest.skip("FINETUNE_VLLM_ADAPTER names no adapter for this vLLM")
    names = ["one--11111111", "two--22222222"]
    for name, path in zip(names, served.adapters, strict=True):
        body = {"lora_name": name, "lora_path": path}
        assert call("POST", f"{served.url}/v1/load_lora_adapter", body, headers=JSON) == (
            200,
            {"text": f"Success: LoRA adapter '{name}' added successfully."},
        )
    yield names
    for name in names:
        call("POST", f"{served.url}/v1/unload_lora_adapter", {"lora_name": name}, headers=JSON)


JSON = {"Content-Type": "application/json"}


def ask(client: openai.OpenAI, model: str, **more: Any) -> Any:
    options: dict[str, Any] = {"messages": QUESTION, "max_tokens": 12, "temperature": 0, **more}
    return client.chat.completions.create(model=model, **options)


def complete(client: openai.OpenAI, model: str, **more: Any) -> Any:
    options: dict[str, Any] = {"prompt": "What colour is", "max_tokens": 12, "temperature": 0, **more}
    return client.completions.create(model=model, **options)


def test_models_tell_the_base_and_its_length(client: openai.OpenAI, served: Served) -> None:
    card = client.models.list().data[0].model_dump()
    assert card["id"] == served.base
    assert card["object"] == "model"
    assert card["parent"] is None
    assert card["max_model_len"] > 0
    assert card["root"]


def test_a_chat_answer_has_text_reason_and_usage(client: openai.OpenAI, served: Served) -> None:
    answer = ask(client, served.base, extra_body={"ignore_eos": True})
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == served.base
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
    assert ask(client, served.base, max_tokens=None, max_completion_tokens=3).usage.completion_tokens <= 3


def test_an_answer_may_be_asked_for_by_a_schema(client: openai.OpenAI, served: Served) -> None:
    """vLLM forces it into the schema; ours does not, and says so where it is `strict`."""
    schema = {"name": "answer", "schema": {"type": "object"}}
    answer = ask(client, served.base, response_format={"type": "json_schema", "json_schema": schema})
    assert answer.choices[0].message.content


def test_a_stream_says_the_same_as_the_whole(client: openai.OpenAI, served: Served) -> None:
    whole = ask(client, served.base, extra_body={"ignore_eos": True})
    chunks = list(ask(client, served.base, stream=True, extra_body={"ignore_eos": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_comes_last_in_a_stream_that_asks_for_it(client: openai.OpenAI, served: Served) -> None:
    chunks = list(ask(client, served.base, stream=True, stream_options={"include_usage": True}))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 0
    assert all(not chunk.usage for chunk in chunks[:-1])


def test_the_bytes_of_a_stream_are_events_and_done(served: Served) -> None:
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=60)
    body = {"model": served.base, "messages": QUESTION, "max_tokens": 4, "stream": True}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {**JSON, "X-Request-Id": "abc-1"})
    answer = connection.getresponse()
    content = answer.read().decode()
    assert answer.getheader("Content-Type", "").startswith("text/event-stream")
    assert content.endswith("data: [DONE]\n\n")
    events = content.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") for event in events)
    assert {json.loads(event[6:])["id"] for event in events[:-1]} == {"chatcmpl-abc-1"}


def test_request_ids_become_response_ids(client: openai.OpenAI, served: Served) -> None:
    headers = {"X-Request-Id": "r.1_2-3"}
    assert ask(client, served.base, extra_headers=headers).id == "chatcmpl-r.1_2-3"
    assert complete(client, served.base, extra_headers=headers).id == "cmpl-r.1_2-3"


def test_completions_continue_texts_and_tokens(client: openai.OpenAI, served: Served) -> None:
    answer = complete(client, served.base, prompt=["What colour", "Is it"], max_tokens=5)
    assert answer.object == "text_completion"
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage.completion_tokens <= 10
    alone = complete(client, served.base, prompt="Is it", max_tokens=5)
    assert alone.choices[0].text == answer.choices[1].text
    assert complete(client, served.base, prompt=[5, 6, 7], max_tokens=2).usage.prompt_tokens == 3
    # OpenAI's default length.
    default = client.completions.create(
        model=served.base, prompt="a", temperature=0, extra_body={"ignore_eos": True}
    )
    assert default.usage is not None
    assert default.usage.completion_tokens == 16


def test_several_prompts_stream_into_one_answer(client: openai.OpenAI, served: Served) -> None:
    prompts = ["What colour", "Is it"]
    whole = complete(client, served.base, prompt=prompts)
    texts = ["", ""]
    for chunk in complete(client, served.base, prompt=prompts, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in whole.choices]


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_answer_and_is_not_in_it(
    client: openai.OpenAI, served: Served, stream: bool
) -> None:
    whole = complete(client, served.base, max_tokens=24, extra_body={"ignore_eos": True}).choices[0].text
    # A piece of several characters from the middle, so that it lies across tokens.
    stop = whole[len(whole) // 2 : len(whole) // 2 + 3]
    answer = complete(
        client,
        served.base,
        max_tokens=24,
        stop=["never there", stop],
        stream=stream,
        extra_body={"ignore_eos": True},
    )
    if stream:
        chunks = list(answer)
        text, reason = "".join(chunk.choices[0].text for chunk in chunks), chunks[-1].choices[0].finish_reason
    else:
        text, reason = answer.choices[0].text, answer.choices[0].finish_reason
    assert text == whole[: whole.index(stop)]
    assert reason == "stop"


def test_greedy_repeats_and_seeds_are_honoured(client: openai.OpenAI, served: Served) -> None:
    def text(**more: Any) -> str:
        answer = complete(client, served.base, max_tokens=16, extra_body={"ignore_eos": True}, **more)
        return str(answer.choices[0].text)

    assert text() == text()
    hot = {"temperature": 1.5}
    assert text(**hot, seed=11) == text(**hot, seed=11)
    assert text(**hot, seed=11) != text(**hot, seed=12)
    assert text(temperature=1.0, top_p=1e-6) == text()  # only the likeliest remains


def test_chat_logprobs(client: openai.OpenAI, served: Served) -> None:
    answer = ask(client, served.base, logprobs=True, top_logprobs=3, max_tokens=4)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    for entry in content:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].token == entry.token  # greedy takes the likeliest
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob, abs=1e-3)
        assert bytes(entry.bytes).decode() == entry.token
    chunks = ask(client, served.base, logprobs=True, top_logprobs=0, max_tokens=4, stream=True)
    told = [
        entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content
    ]
    assert [entry.token for entry in told] == [entry.token for entry in content]


def test_completion_logprobs(client: openai.OpenAI, served: Served) -> None:
    choice = complete(client, served.base, logprobs=2, max_tokens=4, extra_body={"ignore_eos": True}).choices[
        0
    ]
    assert len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) == 4
    assert choice.logprobs.text_offset[0] == 0
    # Keyed by text, so that tokens which are parts of a character may fall together.
    for token, logprob, top in zip(
        choice.logprobs.tokens, choice.logprobs.token_logprobs, choice.logprobs.top_logprobs, strict=True
    ):
        assert token in top
        assert len(top) <= 3
        assert max(top.values()) == pytest.approx(logprob, abs=1e-3)  # greedy takes the likeliest


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/chat/completions", b"{", 400),
        ("/v1/chat/completions", b"[]", 400),
        ("/v1/chat/completions", {"messages": QUESTION, "model": "nobody"}, 404),
        ("/v1/completions", {"prompt": "a", "model": "nobody"}, 404),
        ("/v1/chat/completions", {"model": "BASE", "messages": "no list"}, 400),
        ("/v1/chat/completions", {"model": "BASE"}, 400),
        ("/v1/chat/completions", {"model": "BASE", "messages": QUESTION, "temperature": -1}, 400),
        ("/v1/chat/completions", {"model": "BASE", "messages": QUESTION, "top_p": 2}, 400),
        ("/v1/chat/completions", {"model": "BASE", "messages": QUESTION, "max_tokens": 10**9}, 400),
        ("/v1/completions", {"model": "BASE", "prompt": "a " * 200_000}, 400),
        ("/v1/completions", {"model": "BASE", "prompt": [10**9]}, 400),
        ("/v1/completions", {"model": "BASE", "prompt": []}, 400),
        ("/v1/completions", b'{"model": "BASE", "prompt": "\\ud800"}', 400),
    ],
)
def test_bad_requests_are_the_clients_fault(served: Served, path: str, body: Any, status: int) -> None:
    if isinstance(body, dict) and body.get("model") == "BASE":
        body = {**body, "model": served.base}
    elif isinstance(body, bytes):
        body = body.replace(b"BASE", served.base.encode())
    found, document = call("POST", served.url + path, body, headers=JSON)
    assert found == status
    assert document["error"]["message"]
    assert document["error"]["code"] == status


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/chat/completions", 405), ("DELETE", "/v1/models", 405), ("GET", "/v1/nothing", 404)],
)
def test_wrong_paths_and_methods_have_the_shape_of_errors(
    served: Served, method: str, path: str, status: int
) -> None:
    found, document = call(method, served.url + path)
    assert found == status
    assert document["error"]["code"] == status
    assert document["error"]["message"]


def test_too_long_a_prompt_says_how_long_it_may_be(client: openai.OpenAI, served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        complete(client, served.base, prompt="word " * 100_000)


def test_adapters_are_listed_with_their_base(
    client: openai.OpenAI, served: Served, adapters: list[str]
) -> None:
    cards = {card.id: card.model_dump() for card in client.models.list()}
    for name, path in zip(adapters, served.adapters, strict=True):
        assert cards[name]["parent"] == served.base
        assert cards[name]["root"] == path


def test_adapters_and_base_answer_as_themselves_when_asked_at_once(
    client: openai.OpenAI, served: Served, adapters: list[str]
) -> None:
    models = [served.base, *adapters]

    def text(model: str) -> str:
        return str(ask(client, model, extra_body={"ignore_eos": True}).choices[0].message.content)

    alone = {model: text(model) for model in models}
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(text, models * 2))
    assert found == [alone[model] for model in models * 2]
    assert alone[served.base] != alone[adapters[0]]


def test_an_unloaded_adapter_is_gone_and_the_base_is_as_before(client: openai.OpenAI, served: Served) -> None:
    if not served.adapters:
        pytest.skip("FINETUNE_VLLM_ADAPTER names no adapter for this vLLM")
    before = ask(client, served.base).choices[0].message.content
    load = {"lora_name": "gone--1", "lora_path": served.adapters[0]}
    assert call("POST", f"{served.url}/v1/load_lora_adapter", load, headers=JSON)[0] == 200
    ask(client, "gone--1")

    found = call("POST", f"{served.url}/v1/unload_lora_adapter", {"lora_name": "gone--1"}, headers=JSON)

    assert found == (200, {"text": "Success: LoRA adapter 'gone--1' removed successfully."})
    assert "gone--1" not in {card.id for card in client.models.list()}
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        ask(client, "gone--1")
    assert ask(client, served.base).choices[0].message.content == before


def test_answers_stay_right_while_an_adapter_comes_and_goes(
    client: openai.OpenAI, served: Served, adapters: list[str]
) -> None:
    """Its weights come and go beside those that answer; itself it answers rightly, or is not there."""
    kept, changing = adapters

    def text(model: str) -> str | None:
        try:
            return str(ask(client, model, extra_body={"ignore_eos": True}).choices[0].message.content)
        except openai.NotFoundError:
            return None

    def change(verb: str, **more: str) -> bool:
        body = {"lora_name": changing, **more}
        return call("POST", f"{served.url}/v1/{verb}_lora_adapter", body, headers=JSON)[0] == 200

    right = {model: text(model) for model in (served.base, kept, changing)}
    end = time.monotonic() + 5
    cycles = 0

    def keep_asking(model: str) -> list[str | None]:
        answers = []
        while time.monotonic() < end:
            answers.append(text(model))
        return answers

    with ThreadPoolExecutor(3) as pool:
        asking = {model: pool.submit(keep_asking, model) for model in right}
        while time.monotonic() < end:
            assert change("unload")
            # Its place is free when its last answer has ended.
            wait_until(lambda: change("load", lora_path=served.adapters[1]), seconds=20)
            cycles += 1
        found = {model: set(answers.result()) for model, answers in asking.items()}
    print(f"{cycles} cycles")
    assert cycles > 3
    assert found[changing] <= {right[changing], None}
    assert {model: found[model] for model in (served.base, kept)} == {
        model: {right[model]} for model in (served.base, kept)
    }


def test_wrong_adapter_calls_are_told_apart(served: Served, adapters: list[str], tmp_path: Path) -> None:
    def load(name: str, path: str) -> tuple[int, dict[str, Any]]:
        body = {"lora_name": name, "lora_path": path}
        return call("POST", f"{served.url}/v1/load_lora_adapter", body, headers=JSON)

    status, document = load(adapters[0], served.adapters[0])
    assert (status, "already been loaded" in document["error"]["message"]) == (400, True)
    assert load("other--3", str(tmp_path / "nothing"))[0] == 404
    assert load("", "")[0] == 400
    if not VLLM:
        assert load("other--3", __file__)[0] == 400
        assert call("POST", f"{served.url}/v1/load_lora_adapter", b"[" * 100_000, headers=JSON)[0] == 400
        # Half a character: metrics that name it could not be written.
        half = {"lora_name": "\ud800", "lora_path": served.adapters[0]}
        assert call("POST", f"{served.url}/v1/load_lora_adapter", half, headers=JSON)[0] == 400
    assert call("POST", f"{served.url}/v1/unload_lora_adapter", {"lora_name": "x"}, headers=JSON)[0] == 404


def test_metrics_have_vllms_names(client: openai.OpenAI, served: Served, adapters: list[str]) -> None:
    ask(client, adapters[0])
    text = call("GET", f"{served.url}/metrics")[1]["text"]
    for name in (
        "vllm:num_requests_running{",
        "vllm:num_requests_waiting{",
        "vllm:kv_cache_usage_perc{",
        "vllm:time_to_first_token_seconds_bucket{",
        "vllm:inter_token_latency_seconds_bucket{",
        "vllm:e2e_request_latency_seconds_count{",
        "vllm:request_queue_time_seconds_sum{",
        "vllm:prompt_tokens_total{",
        "vllm:generation_tokens_total{",
        "vllm:lora_requests_info{",
        "process_start_time_seconds",
    ):
        assert f"\n{name}" in text, name
    success = [line for line in text.splitlines() if line.startswith("vllm:request_success_total{")]
    assert any('finished_reason="length"' in line or 'finished_reason="stop"' in line for line in success)
    assert f'model_name="{served.base}"' in success[0]


def test_health_and_version(served: Served) -> None:
    assert call("GET", f"{served.url}/health")[0] == 200
    assert call("GET", f"{served.url}/version")[1]["version"]


def count_aborted(served: Served) -> float:
    text = call("GET", f"{served.url}/metrics")[1]["text"]
    lines = [line for line in text.splitlines() if line.startswith("vllm:request_success_total{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines if 'finished_reason="abort"' in line)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_its_place(served: Served, stream: bool) -> None:
    before = count_aborted(served)
    asked = {"model": served.base, "prompt": "a", "max_tokens": 450, "ignore_eos": True, "stream": stream}
    body = json.dumps(asked).encode()
    host, port = served.url.removeprefix("http://").split(":")
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        if stream:
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
        else:
            time.sleep(0.1)
    wait_until(lambda: count_aborted(served) == before + 1, seconds=20)


@pytest.mark.skipif(bool(VLLM), reason="vLLM has several choices, tools and guided answers")
@pytest.mark.parametrize(
    "fields",
    [{"n": 2}, {"tools": [{}]}, {"response_format": {"type": "json_object"}}, {"logit_bias": {"1": 1}}],
)
def test_what_ours_does_not_have_is_refused_by_name(served: Served, fields: dict[str, Any]) -> None:
    body = {"model": served.base, "messages": QUESTION, **fields}
    status, document = call("POST", f"{served.url}/v1/chat/completions", body, headers=JSON)
    assert status == 400
    assert document["error"]["param"] == next(iter(fields))


@pytest.mark.skipif(bool(VLLM), reason="vLLM queues without a limit")
def test_a_full_queue_is_429(served: Served) -> None:
    def post(_: int) -> int:
        body = {"model": served.base, "prompt": "a", "max_tokens": 300, "ignore_eos": True}
        return call("POST", f"{served.url}/v1/completions", body, headers=JSON)[0]

    with ThreadPoolExecutor(40) as pool:
        found = set(pool.map(post, range(40)))
    assert found == {200, 429}

"""The router as an HTTP server and client: what crosses it, what does not, and its limits."""

from __future__ import annotations

import asyncio
import gzip
import itertools
import json
import re
import ssl
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from finetune_operator.api.routes import Arm
from finetune_router import credentials
from tests.integration.router import certificates, engines
from tests.integration.router.engines import Behaviour, Engine
from tests.integration.router.routers import Router, route, target

CHAT = "/v1/chat/completions"


async def raw(router: Router, data: bytes, *, until: bytes | None = None) -> bytes:
    """What comes back for bytes as they are, to the end of the connection or to a mark."""
    reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
    writer.write(data)
    try:
        async with asyncio.timeout(10):
            return await (reader.read() if until is None else reader.readuntil(until))
    finally:
        writer.close()


def chat(alias: str, **more: object) -> bytes:
    return json.dumps({"model": alias, "messages": [], **more}).encode()


@pytest.fixture
async def ready(router: Router, engine: Engine, alias: str) -> Router:
    await router.push(route(alias, target("base", engine.url)))
    return router


PIECES = (
    b'data: {"choices": [{"index": 0, "delta": {"content": "gr\xc3',
    b'\xb6\xc3\x9fe"}}]}\r\n\r',
    b"\n: comment\n\nevent: x\ndata: not json\n\n",
    b"\x00\xff odd bytes \n\n",
    b"data: [DONE]\n\n",
)


async def test_a_stream_passes_byte_for_byte(
    ready: Router, engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    for chunk_delay in (0.0, 0.02):
        engine.behaviours["base-model"] = Behaviour(chunks=PIECES, chunk_delay=chunk_delay)
        async with session.post(ready.url + CHAT, data=chat(alias, stream=True)) as response:
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert await response.read() == b"".join(PIECES)


async def test_a_piece_reaches_the_user_when_it_leaves_the_engine(
    ready: Router, engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    engine.behaviours["base-model"] = Behaviour(text="one two three", chunk_delay=0.2)
    clock = asyncio.get_running_loop().time
    async with session.post(ready.url + CHAT, data=chat(alias, stream=True)) as response:
        times = [clock() async for _ in response.content.iter_any()]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert len(gaps) >= 4
    assert all(0.1 < gap < 0.5 for gap in gaps)


async def test_the_time_in_the_router_is_none_of_an_empty_stream(
    ready: Router, engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    engine.behaviours["base-model"] = Behaviour(chunks=(b"",))
    async with session.post(ready.url + CHAT, data=chat(alias, stream=True)) as response:
        assert (response.status, await response.read()) == (200, b"")
    lines = (await ready.metrics()).splitlines()
    sums = [
        line for line in lines if line.startswith("adapter_router_overhead_seconds_sum") and alias in line
    ]
    assert all(float(line.split()[-1]) < 10.0 for line in sums)


async def test_a_compressed_answer_passes_as_it_is_and_is_still_read(
    ready: Router, alias: str, session: aiohttp.ClientSession
) -> None:
    packed = gzip.compress(
        b'data: {"choices": [{"index": 0, "delta": {"content": ""}, "finish_reason": "length"}]}\n\n'
    )
    async with engines.running() as engine:
        engine.behaviours["base-model"] = Behaviour(
            chunks=(packed[:20], packed[20:]), headers={"Content-Encoding": "gzip"}
        )
        await ready.push(route(alias, target("base", engine.url)))
        async with (
            aiohttp.ClientSession(auto_decompress=False) as plain,
            plain.post(ready.url + CHAT, data=chat(alias, stream=True)) as response,
        ):
            assert response.headers["content-encoding"] == "gzip"
            assert await response.read() == packed
    assert (await ready.arm(alias, Arm.STABLE)).events["cut"] == 1


async def test_an_answer_in_an_encoding_that_cannot_be_read_is_said_to_be_unread(
    own_router: Callable[..., Router], engine: Engine, alias: str
) -> None:
    router = own_router()
    await asyncio.to_thread(router.start)
    await router.push(route(alias, target("base", engine.url)))
    engine.behaviours["base-model"] = Behaviour(headers={"Content-Encoding": "br"})
    async with (
        aiohttp.ClientSession(auto_decompress=False) as plain,
        plain.post(router.url + CHAT, data=chat(alias)) as response,
    ):
        assert response.status == 200
    assert "adapter_router_outputs_unread_total 1.0" in await router.metrics()


async def test_large_answers_pass_whole(
    ready: Router, engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    """Above the size that is buffered: with a length, and in chunks."""
    text = "".join(f"line {number}\n" for number in range(120_000))
    engine.behaviours["base-model"] = Behaviour(text=text)
    async with session.post(ready.url + CHAT, data=chat(alias)) as response:
        assert int(response.headers["content-length"]) > 1_000_000
        assert (await response.json())["choices"][0]["message"]["content"] == text
    pieces = tuple(f"{number} ".encode() * 5000 for number in range(40))
    engine.behaviours["base-model"] = Behaviour(chunks=pieces, headers={"Content-Type": "application/json"})
    async with session.post(ready.url + CHAT, data=chat(alias, stream=True)) as response:
        assert await response.read() == b"".join(pieces)
    counted = await ready.arm(alias, Arm.STABLE)
    assert counted.requests == 2
    assert counted.events["errors"] == 1, "the second one is no JSON"


async def test_what_the_engine_sees_of_the_clients_headers(
    ready: Router, engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    headers = {
        "Authorization": "Bearer sk-secret", "Cookie": "session=1", "x-api-key": "k", "X-Secret-Tenant": "acme",
        "traceparent": "00-1-2-03", "X-Client-Request-Id": "mine", "Connection": "keep-alive, tracestate",
        "tracestate": "hop=by-hop", "x-request-id": "forged", "TE": "trailers", "Content-Type": "application/json",
    }  # fmt: skip
    async with session.post(ready.url + CHAT + "?a=1", data=chat(alias), headers=headers) as response:
        assert response.status == 200
        request_id = response.headers["x-request-id"]
    seen = engine.seen[-1]
    assert seen.path == CHAT + "?a=1"
    assert seen.headers["x-request-id"] == request_id != "forged"
    assert seen.headers["traceparent"] == "00-1-2-03"
    assert seen.headers["x-client-request-id"] == "mine"
    for name in (
        "authorization",
        "cookie",
        "x-api-key",
        "x-secret-tenant",
        "tracestate",
        "te",
        "transfer-encoding",
    ):
        assert name not in seen.headers
    assert "sk-secret" not in str(seen.headers)


async def test_configured_headers_and_the_engines_own_key(
    own_router: Callable[..., Router],
    engine: Engine,
    session: aiohttp.ClientSession,
    tmp_path: Path,
    alias: str,
) -> None:
    key = tmp_path / "key"
    key.write_text("engine-key\n")
    router = own_router("--upstream-api-key-file", str(key), "--forward-headers", "x-tenant, *")
    await asyncio.to_thread(router.start)
    await router.push(route(alias, target("base", engine.url)))
    headers = {"Authorization": "Bearer sk-secret", "x-tenant": "acme", "x-other": "1", "Cookie": "c=1"}
    async with session.post(router.url + CHAT, data=chat(alias), headers=headers) as response:
        assert response.status == 200
    seen = engine.seen[-1].headers
    assert (seen["authorization"], seen["x-tenant"], seen["x-other"]) == ("Bearer engine-key", "acme", "1")
    assert "cookie" not in seen


async def test_api_keys(
    own_router: Callable[..., Router],
    engine: Engine,
    session: aiohttp.ClientSession,
    tmp_path: Path,
    alias: str,
) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"# clients\nsk-plain\nsha256:{credentials.hash_key('sk-hashed')}\n")
    router = own_router("--api-keys-file", str(keys))
    await asyncio.to_thread(router.start)
    await router.push(route(alias, target("base", engine.url)))

    async def status(token: str, path: str = CHAT) -> int:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        method = "GET" if path == "/v1/models" else "POST"
        async with session.request(method, router.url + path, data=chat(alias), headers=headers) as response:
            return response.status

    assert [await status(token) for token in ("sk-plain", "sk-hashed", "", "sk-other")] == [
        200,
        200,
        401,
        401,
    ]
    hashed = f"sha256:{credentials.hash_key('sk-hashed')}"
    assert await status(hashed) == 401
    assert [await status("", path) for path in ("/v1/models", "/v1/feedback")] == [401, 401]
    keys.write_text("sk-new\n")
    await asyncio.sleep(2.5)
    assert [await status("sk-plain"), await status("sk-new")] == [401, 200]
    keys.write_text("sha256:nonsense\n")
    await asyncio.sleep(2.5)
    assert await status("sk-new") == 200
    assert "former API keys stay in force" in router.log.read_text()


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_body"),
        (b'{"model": "x"', "invalid_body"),
        (b'{"model": "x", "messages": [tru]}', "invalid_body"),
        ('{"model": "x"}'.encode("utf-16"), "invalid_body"),
        (b"[1]", "invalid_body"),
        (b'{"messages": []}', "missing_model"),
        (b'{"model": 7}', "missing_model"),
        (b'{"model": null}', "missing_model"),
        (b'{"messages": "' + b"x" * 50_000 + b'"', "invalid_body"),
    ],
)
async def test_broken_bodies_are_400_in_openais_shape(
    ready: Router, session: aiohttp.ClientSession, body: bytes, code: str
) -> None:
    async with session.post(ready.url + CHAT, data=body) as response:
        assert response.status == 400
        error = (await response.json())["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", code)


async def test_a_whole_url_is_a_path_too(ready: Router, engine: Engine, alias: str) -> None:
    """RFC 9112, section 3.2.2."""
    body = chat(alias)
    head = f"POST http://router{CHAT}?a=b HTTP/1.1\r\nHost: router\r\nContent-Length: {len(body)}\r\n\r\n"
    assert b" 200 " in await raw(ready, head.encode() + body, until=b"\r\n")
    assert engine.seen[-1].path == CHAT + "?a=b"


async def test_a_stream_to_a_client_of_http_1_0_ends(ready: Router, alias: str) -> None:
    """Also to one that would keep the connection, as ab -k: no chunk tells it where the stream ends."""
    body = chat(alias, stream=True)
    head = f"POST {CHAT} HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: {len(body)}\r\n\r\n"
    assert (await raw(ready, head.encode() + body)).endswith(b"data: [DONE]\n\n")


async def test_unknown_models_paths_and_methods(
    ready: Router, engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    async with session.post(ready.url + CHAT, data=chat("nobody")) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (404, "model_not_found")
    for path in (
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
        "/v1/../v1/load_lora_adapter",
        "/",
        "/metrics",
    ):
        async with session.post(ready.url + path, data=chat(alias)) as response:
            assert response.status == 404
    assert not engine.seen
    async with session.get(ready.url + CHAT) as response:
        assert (response.status, response.headers["allow"]) == (405, "POST, OPTIONS")
    async with session.options(ready.url + CHAT) as response:
        assert (response.status, response.headers["allow"]) == (204, "POST, OPTIONS")
    async with session.head(ready.url + "/v1/models") as response:
        assert (response.status, await response.read()) == (200, b"")
        assert response.headers["x-request-id"]
    async with session.get(ready.url + "/v1/models/nobody") as response:
        assert response.status == 404


async def test_bodies_that_are_too_large(ready: Router, session: aiohttp.ClientSession, alias: str) -> None:
    """The limit is three million bytes here. Declared, in chunks, and unpacked."""
    large = chat(alias, pad="x" * 3_000_000)

    async def pieces() -> object:
        for start in range(0, len(large), 100_000):
            yield large[start : start + 100_000]

    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(large)}\r\n\r\n".encode()
    assert b" 413 " in await raw(ready, head, until=b"\r\n")
    async with session.post(ready.url + CHAT, data=pieces()) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (413, "request_too_large")
    async with session.post(
        ready.url + CHAT, data=gzip.compress(large), headers={"Content-Encoding": "gzip"}
    ) as response:
        assert response.status == 413


async def test_bodies_in_chunks_and_packed(
    ready: Router, engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    async def pieces() -> object:
        yield b'{"messages": [], "mod'
        await asyncio.sleep(0.05)
        yield b'el": "' + alias.encode() + b'"}'

    expected = b'{"messages": [], "model": "base-model"}'
    async with session.post(ready.url + CHAT, data=pieces()) as response:
        assert response.status == 200
    assert engine.seen[-1].body == expected
    assert engine.seen[-1].headers["content-length"] == str(len(expected))
    packed = gzip.compress(b'{"messages": [], "model": "' + alias.encode() + b'"}')
    async with session.post(ready.url + CHAT, data=packed, headers={"Content-Encoding": "gzip"}) as response:
        assert response.status == 200
    assert engine.seen[-1].body == expected
    assert "content-encoding" not in engine.seen[-1].headers


@pytest.mark.parametrize(
    ("encoding", "pack"),
    [("deflate", zlib.compress), ("X-GZIP", gzip.compress), ("UTF-8", bytes)],
)
async def test_the_names_of_packings(
    ready: Router, engine: Engine, session: aiohttp.ClientSession, alias: str, encoding: str, pack: Any
) -> None:
    """A charset there is a mistake that harms nobody."""
    headers = {"Content-Encoding": encoding}
    async with session.post(ready.url + CHAT, data=pack(chat(alias)), headers=headers) as response:
        assert response.status == 200
    assert engine.seen[-1].body == chat("base-model")
    async with session.post(ready.url + CHAT, data=b"\x1f\x8bno", headers=headers) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (400, "invalid_body")


async def test_what_unpacks_to_a_hundred_times_its_size_holds_up_nobody(
    ready: Router, session: aiohttp.ClientSession, alias: str
) -> None:
    """Also where it is not even wanted: on a path that there is not."""
    bomb = gzip.compress(bytes(2**28), compresslevel=1)
    head = f"HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Length: {len(bomb)}\r\n\r\n"
    asked = [
        asyncio.create_task(raw(ready, f"POST {path} {head}".encode() + bomb, until=b"\r\n"))
        for path in (CHAT, "/nowhere", CHAT, "/nowhere")
    ]
    clock = asyncio.get_running_loop().time
    waits: list[float] = []
    while not waits or not all(task.done() for task in asked):
        started = clock()
        async with session.post(ready.url + CHAT, data=chat(alias)) as response:
            assert response.status == 200
        waits.append(clock() - started)
    assert [task.result()[9:12] for task in asked] == [b"413", b"404"] * 2
    assert max(waits) < 1.0


async def test_expect_100_continue(ready: Router, alias: str) -> None:
    body = chat(alias)
    reader, writer = await asyncio.open_connection("127.0.0.1", ready.port)
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode())
    async with asyncio.timeout(5):
        assert (await reader.readline()) == b"HTTP/1.1 100 Continue\r\n"
        await reader.readline()
        writer.write(body)
        assert b"200" in await reader.readline()
    writer.close()
    refused = await raw(ready, head.replace("100-continue", "a-pony").encode(), until=b"\r\n")
    assert b" 417 " in refused


async def test_an_expectation_of_http_1_0_is_none(ready: Router, alias: str) -> None:
    """RFC 9110, section 10.1.1: such a client would take the 100 for the answer."""
    body = chat(alias)
    reader, writer = await asyncio.open_connection("127.0.0.1", ready.port)
    head = f"POST {CHAT} HTTP/1.0\r\nExpect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode())
    await asyncio.sleep(0.05)
    writer.write(body)
    async with asyncio.timeout(5):
        assert b" 200 " in await reader.readline()
    writer.close()


@pytest.mark.parametrize(
    "head",
    [
        "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        "Content-Length: 5\r\nContent-Length: 6\r\n",
        "Content-Length: +5\r\n",
        "Transfer-Encoding: xchunked\r\n",
        "Transfer-Encoding : chunked\r\n",
        "X: a\r\n folded\r\nContent-Length: 0x5\r\n",
    ],
)
async def test_requests_with_two_meanings_are_refused(ready: Router, engine: Engine, head: str) -> None:
    smuggled = "0\r\n\r\nPOST /v1/load_lora_adapter HTTP/1.1\r\nHost: x\r\n\r\n"
    answer = await raw(ready, f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n{head}\r\n{smuggled}".encode())
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.0 400"))
    assert answer.count(b"HTTP/1.1 ") <= 1
    assert not engine.seen


async def test_what_cannot_be_read_is_400_in_openais_shape_too(ready: Router, alias: str) -> None:
    before = unread(await ready.metrics())
    for line, reason in (
        ("Host x", "Invalid header token"),
        (f"X-Long: {'a' * 20_000}", "Got more than 16384 bytes"),
        ("Transfer-Encoding: chunked\r\n\r\nZZ", "Invalid character in chunk size"),
        ("Content-Type: a/b\r\nContent-Type: c/d", "Duplicate 'Content-Type' header found"),
    ):
        answer = await raw(ready, f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n{line}\r\n\r\n".encode())
        head, _, body = answer.partition(b"\r\n\r\n")
        assert b" 400 " in head
        assert b"x-request-id: " in head
        assert b"aiohttp" not in head
        error = json.loads(body)["error"]
        assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_request")
        assert error["message"].startswith(f"the request cannot be read: {reason}")
    assert unread(await ready.metrics()) == before + 4

    client = openai.AsyncOpenAI(base_url=f"{ready.url}/v1", api_key="k", max_retries=0)
    with pytest.raises(openai.BadRequestError, match="Got more than 16384 bytes"):
        await client.chat.completions.create(model=alias, messages=[], extra_headers={"X-Long": "a" * 20_000})
    await client.close()


def unread(metrics: str) -> float:
    """How many answers of the router itself were 400."""
    found = re.search(r'requests_total\{alias="",arm="",code="400",revision=""\} (\S+)', metrics)
    return float(found[1]) if found else 0.0


async def test_requests_in_a_row_on_one_connection(ready: Router, engine: Engine, alias: str) -> None:
    body = chat(alias)
    one = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    last = one.replace(b"Host: x", b"Host: x\r\nConnection: close")
    answer = await raw(ready, one + one + last)
    assert answer.count(b"HTTP/1.1 200") == 3
    assert len(engine.seen) == 3


async def test_an_http_1_0_client_gets_a_stream_without_chunks(ready: Router, alias: str) -> None:
    body = chat(alias, stream=True)
    answer = await raw(ready, f"POST {CHAT} HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    head, _, content = answer.partition(b"\r\n\r\n")
    assert b"chunked" not in head.lower()
    assert content.endswith(b"data: [DONE]\n\n")


async def test_a_silent_engine_is_a_504(
    ready: Router, engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    """First byte of a stream: 1 s here; a whole answer: 4 s; silence inside a stream: 1 s, which breaks it."""
    engine.behaviours["base-model"] = Behaviour(delay=2.0)
    async with session.post(ready.url + CHAT, data=chat(alias, stream=True)) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (504, "engine_timeout")
    async with session.post(ready.url + CHAT, data=chat(alias)) as response:
        assert response.status == 200
    engine.behaviours["base-model"] = Behaviour(delay=10.0)
    async with session.post(ready.url + CHAT, data=chat(alias)) as response:
        assert response.status == 504
    engine.behaviours["base-model"] = Behaviour(chunk_delay=3.0)
    async with session.post(ready.url + CHAT, data=chat(alias, stream=True)) as response:
        assert response.status == 200
        with pytest.raises(aiohttp.ClientPayloadError):
            await response.read()
    counted = await ready.arm(alias, Arm.STABLE)
    assert (counted.requests, counted.events["errors"]) == (4, 3)
    assert engine.cancelled >= 2


async def test_nobody_listens(ready: Router, session: aiohttp.ClientSession, alias: str) -> None:
    await ready.push(route(alias, target("base", "http://127.0.0.1:9")))
    async with session.post(ready.url + CHAT, data=chat(alias)) as response:
        assert (response.status, (await response.json())["error"]["code"]) == (502, "engine_unreachable")
        assert "retry-after" in response.headers
        request_id = response.headers["x-request-id"]
    assert f"answered 502 engine_unreachable, request {request_id}" in ready.log.read_text()
    assert (await ready.arm(alias, Arm.STABLE)).events["errors"] == 1


async def test_a_client_that_goes_away_ends_the_engines_work_and_is_nobodys_error(
    ready: Router, engine: Engine, alias: str
) -> None:
    for how, stream in (
        (Behaviour(delay=3.0), False),
        (Behaviour(text="word " * 100, chunk_delay=0.05), True),
    ):
        engine.behaviours["base-model"] = how
        body = chat(alias, stream=stream)
        _, writer = await asyncio.open_connection("127.0.0.1", ready.port)
        writer.write(
            f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
        )
        await asyncio.sleep(0.3)
        assert engine.open == 1
        writer.close()
        await asyncio.sleep(0.3)
        assert engine.open == 0
    assert engine.cancelled == 2
    # Only what they had to wait for (a first byte after 0.25 s) is held against the revision.
    assert (await ready.arm(alias, Arm.STABLE)).events in ({}, {"slow": 1})
    assert (
        f'adapter_router_requests_total{{alias="{alias}",arm="Stable",code="499",revision="base"}} 2.0'
        in (await ready.metrics())
    )


async def test_too_many_requests_are_429_and_the_place_is_given_back(
    own_router: Callable[..., Router], engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    router = own_router("--max-concurrency", "3")
    await asyncio.to_thread(router.start)
    await router.push(route(alias, target("base", engine.url)))
    engine.behaviours["base-model"] = Behaviour(delay=0.5)

    async def one() -> tuple[int, str | None]:
        async with session.post(router.url + CHAT, data=chat(alias)) as response:
            return response.status, response.headers.get("retry-after")

    for _ in range(2):
        answers = await asyncio.gather(*(one() for _ in range(5)))
        assert sorted(answers, key=str) == [(200, None)] * 3 + [(429, "1")] * 2


async def test_large_bodies_that_are_still_coming_take_room(
    own_router: Callable[..., Router], engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    """None of them is complete; together they are too much."""
    router = own_router("--max-buffered-bytes", "1000000", "--max-body-bytes", "900000")
    await asyncio.to_thread(router.start)
    await router.push(route(alias, target("base", engine.url)))
    writers = []
    answers: list[asyncio.Task[bytes]] = []
    for _ in range(5):
        reader, writer = await asyncio.open_connection("127.0.0.1", router.port)
        writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 800000\r\n\r\n".encode())
        writer.write(b" " * 300_000)
        writers.append(writer)
        answers.append(asyncio.create_task(reader.readuntil(b"\r\n")))
    done, waiting = await asyncio.wait(answers, timeout=1.0)
    assert [task.result() for task in done] == [b"HTTP/1.1 429 Too Many Requests\r\n"] * 2
    for task in waiting:
        task.cancel()
    for writer in writers:
        writer.close()
    await asyncio.sleep(0.2)
    async with session.post(router.url + CHAT, data=chat(alias, pad="x" * 800_000)) as response:
        assert response.status == 200, "the room was given back"


async def test_slow_senders_are_told_so(
    own_router: Callable[..., Router], engine: Engine, alias: str
) -> None:
    router = own_router("--body-timeout", "0.3")
    await asyncio.to_thread(router.start)
    await router.push(route(alias, target("base", engine.url)))
    answer = await raw(
        router,
        f'POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 50\r\n\r\n{{"model"'.encode(),
        until=b"}}",
    )
    assert b"408" in answer


async def test_a_slow_reader_takes_bounded_memory_and_holds_up_nobody(
    ready: Router, engine: Engine, session: aiohttp.ClientSession, alias: str
) -> None:
    engine.behaviours["base-model"] = Behaviour(chunks=(b"data: " + b"x" * 65_536 + b"\n\n",) * 600)  # 39 MB
    reader, writer = await asyncio.open_connection("127.0.0.1", ready.port, limit=1024)
    body = chat(alias, stream=True)
    writer.write(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    assert b"200" in await reader.readline()
    await asyncio.sleep(0.5)
    assert engine.open == 1, "the engine wrote everything: somebody keeps it all"
    engine.behaviours["base-model"] = Behaviour()
    clock = asyncio.get_running_loop().time
    for _ in range(20):
        started = clock()
        async with session.post(ready.url + CHAT, data=chat(alias)) as response:
            assert response.status == 200
        assert clock() - started < 0.3
    writer.close()


async def test_an_engine_behind_tls_and_a_path(
    own_router: Callable[..., Router],
    session: aiohttp.ClientSession,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    alias: str,
) -> None:
    certificate = certificates.write(tmp_path)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate.file, certificate.key)
    async with engines.running(context=context) as engine:
        untrusting = own_router()
        await asyncio.to_thread(untrusting.start)
        await untrusting.push(route(alias, target("base", engine.url + "/prefix")))
        async with session.post(untrusting.url + CHAT, data=chat(alias)) as response:
            assert response.status == 502
        assert await asyncio.to_thread(untrusting.stop) == 0
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate.file))
        router = own_router()
        await asyncio.to_thread(router.start)
        for stream in (False, True):
            async with session.post(router.url + CHAT, data=chat(alias, stream=stream)) as response:
                assert response.status == 200
                assert b"base-model" in await response.read()
        assert engine.seen[-1].path == "/prefix" + CHAT

"""The agent beside a vLLM: what it reports is what the engine really serves, whatever the engine says."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from finetune_server import agent_app
from finetune_server.agent import Settings
from finetune_server.ports import listen
from tests.adapters import commit_artifact, write_adapter
from tests.integration.server.vllm_double import Engine

Published = dict[str, tuple[Path, str]]


@dataclass
class Agent:
    """A running agent, its engine, and a client of its API."""

    engine: Engine
    session: aiohttp.ClientSession
    url: str
    published: Published

    async def call(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, dict[str, Any]]:
        async with self.session.request(
            method, f"{self.url}/agent/v1/{path}", json=body, headers=headers
        ) as answer:
            return answer.status, await answer.json()

    async def put(self, served: str, artifact: str, **changes: str) -> int:
        folder, digest = self.published[artifact]
        body = {"uri": f"file://{folder}", "digest": digest, **changes}
        return (await self.call("PUT", f"adapters/{served}", body))[0]

    async def adapter(self, served: str) -> dict[str, Any]:
        adapters = (await self.call("GET", "status"))[1]["adapters"]
        return next((dict(one) for one in adapters if one["name"] == served), {})

    async def wait(self, served: str, state: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(200):
            found = await self.adapter(served)
            if found.get("state") == state:
                return found
            await asyncio.sleep(0.05)
        raise AssertionError(f"{served} did not become {state}: {found}")


Start = Callable[..., Awaitable[Agent]]


@pytest.fixture
async def start(published: Published, tmp_path: Path) -> AsyncIterator[Start]:
    async with contextlib.AsyncExitStack() as stack:

        async def begin(
            engine: Engine | None = None, token_file: Path | None = None, **settings: Any
        ) -> Agent:
            engine = engine or Engine()
            host, port = await stack.enter_async_context(listen(engine.application(), "127.0.0.1", 0))
            options: dict[str, Any] = {
                "cache": tmp_path / "cache",
                "state_file": tmp_path / "state.json",
                **settings,
            }
            address = await stack.enter_async_context(
                agent_app.serve(
                    engine_url=f"http://{host}:{port}",
                    api_key=None,
                    settings=Settings(**options),
                    token_file=token_file,
                    host="127.0.0.1",
                    port=0,
                )
            )
            session = await stack.enter_async_context(aiohttp.ClientSession())
            return Agent(engine, session, f"http://{address[0]}:{address[1]}", published)

        yield begin


async def test_an_adapter_is_downloaded_verified_loaded_and_probed(start: Start, tmp_path: Path) -> None:
    agent = await start()
    assert await agent.put("a--1", "first") == 202
    loaded = await agent.wait("a--1", "Loaded")
    assert loaded["reason"] == ""
    assert agent.engine.adapters["a--1"].startswith(str(tmp_path / "cache"))
    assert await agent.put("a--1", "first") == 200
    status = (await agent.call("GET", "status"))[1]
    assert status["apiVersion"] == "agent/v1"
    assert status["engine"] == {
        "ready": True,
        "instance": "1",
        "baseModel": "base",
        "baseModels": ["base"],
        "message": "",
    }
    assert status["capacity"] == {"maxLoras": 2, "loadedLoras": 1, "maxLoraRank": None}


async def test_limits_that_nobody_told_are_null(start: Start) -> None:
    """vLLM exports `vllm:lora_requests_info` late, and its largest rank nowhere; 0 would refuse every adapter."""
    agent = await start(Engine(tells_places=False))
    assert await agent.put("a--1", "first") == 202
    await agent.wait("a--1", "Loaded")
    capacity = (await agent.call("GET", "status"))[1]["capacity"]
    assert capacity == {"maxLoras": None, "loadedLoras": 1, "maxLoraRank": None}


async def test_limits_of_the_command_line_are_told(start: Start) -> None:
    agent = await start(Engine(tells_places=False), max_loras=3, max_lora_rank=16)
    capacity = (await agent.call("GET", "status"))[1]["capacity"]
    assert capacity == {"maxLoras": 3, "loadedLoras": 0, "maxLoraRank": 16}


async def test_a_name_is_never_given_to_another_artifact(start: Start) -> None:
    agent = await start()
    await agent.put("a--1", "first")
    await agent.wait("a--1", "Loaded")
    assert await agent.put("a--1", "second") == 409


async def test_a_wrong_digest_is_refused_before_the_engine_hears_of_it(start: Start) -> None:
    agent = await start()
    await agent.put("a--1", "first", digest="sha256:" + "0" * 64)
    failed = await agent.wait("a--1", "Failed")
    assert failed["reason"] == "DigestMismatch"
    assert agent.engine.calls == []
    assert await agent.put("a--1", "first") == 202  # a failed name may be tried with the right one
    await agent.wait("a--1", "Loaded")


async def test_a_missing_artifact_names_its_place(start: Start, tmp_path: Path) -> None:
    agent = await start()
    await agent.put("a--1", "first", uri=f"file://{tmp_path}/nowhere")
    failed = await agent.wait("a--1", "Failed")
    assert failed["reason"] == "DownloadFailed"
    assert f"{tmp_path}/nowhere" in failed["message"]


@pytest.mark.parametrize(
    ("flaw", "reason", "message"),
    [
        ({"lies": True}, "ProbeFailed", "/v1/models does not list it"),
        ({"mute": True}, "ProbeFailed", "illegal memory access"),
        ({"refuses": "LoRA rank 64 is greater than max_lora_rank 16."}, "RankTooLarge", "max_lora_rank 16"),
        ({"refuses": "size mismatch for q_proj"}, "IncompatibleBase", "size mismatch"),
        ({"refuses": "out of memory"}, "LoadFailed", "out of memory"),
        ({"load_seconds": 30}, "LoadFailed", "within 0.5 s"),
    ],
)
async def test_an_engine_that_lies_refuses_or_hangs_is_not_believed(
    start: Start, flaw: dict[str, Any], reason: str, message: str
) -> None:
    agent = await start(Engine(**flaw), load_timeout=0.5)
    await agent.put("a--1", "first")
    failed = await agent.wait("a--1", "Failed")
    assert failed["reason"] == reason
    assert message in failed["message"]
    assert "a--1" not in agent.engine.adapters  # nothing is left half loaded


async def test_what_a_hanging_load_leaves_behind_is_cleaned_up(start: Start) -> None:
    agent = await start(Engine(load_seconds=1.0), load_timeout=0.2)
    await agent.put("a--1", "first")
    await agent.wait("a--1", "Failed")
    agent.engine.adapters["a--1"] = "late"  # the engine went on although nobody waited
    for _ in range(100):
        if not agent.engine.adapters:
            return
        await asyncio.sleep(0.05)
    raise AssertionError("the late adapter is still loaded")


async def test_no_more_adapters_than_places(start: Start) -> None:
    agent = await start(Engine(max_lora=1))
    await agent.put("a--1", "first")
    await agent.wait("a--1", "Loaded")
    await agent.put("b--2", "second")
    failed = await agent.wait("b--2", "Failed")
    assert failed["reason"] == "CapacityFull"
    assert "a--1" in failed["message"]

    assert (await agent.call("DELETE", "adapters/a--1"))[0] == 202
    for _ in range(100):
        if "a--1" not in agent.engine.adapters:
            break
        await asyncio.sleep(0.05)
    assert await agent.put("b--2", "second") == 202
    await agent.wait("b--2", "Loaded")
    assert (await agent.call("DELETE", "adapters/a--1"))[0] == 200


async def test_a_rank_above_the_limit_is_not_even_tried(start: Start) -> None:
    agent = await start(max_lora_rank=4)
    await agent.put("a--1", "first")
    failed = await agent.wait("a--1", "Failed")
    assert failed["reason"] == "RankTooLarge"
    assert "rank 8" in failed["message"]
    assert agent.engine.calls == []


async def test_an_adapter_of_another_base_is_refused(start: Start, tmp_path: Path) -> None:
    from tests import tiny

    sister = tiny.build_model(tmp_path / "sister", seed=5)
    agent = await start(base_uri=f"file://{sister}")
    await agent.put("a--1", "first")
    failed = await agent.wait("a--1", "Failed")
    assert failed["reason"] == "IncompatibleBase"
    assert "weights in model.safetensors differ" in failed["message"]


async def test_after_a_restart_of_the_engine_everything_is_loaded_again(start: Start) -> None:
    agent = await start()
    for served, artifact in (("a--1", "first"), ("b--2", "second")):
        await agent.put(served, artifact)
        await agent.wait(served, "Loaded")

    agent.engine.up = False
    for _ in range(100):
        status = (await agent.call("GET", "status"))[1]
        if not status["engine"]["ready"]:
            break
        await asyncio.sleep(0.05)
    assert {one["state"] for one in status["adapters"]} == {"Loading"}
    agent.engine.restart()
    agent.engine.up = True

    await agent.wait("a--1", "Loaded")
    await agent.wait("b--2", "Loaded")
    assert agent.engine.adapters.keys() == {"a--1", "b--2"}
    assert (await agent.call("GET", "status"))[1]["engine"]["instance"] == "2"


async def test_an_adapter_that_vanishes_is_never_reported_as_loaded(start: Start) -> None:
    agent = await start()
    await agent.put("a--1", "first")
    await agent.wait("a--1", "Loaded")
    agent.engine.load_seconds = 0.3
    del agent.engine.adapters["a--1"]
    assert (await agent.adapter("a--1"))["state"] == "Loading"
    await agent.wait("a--1", "Loaded")


async def test_an_adapter_that_somebody_exchanged_is_loaded_again(start: Start) -> None:
    agent = await start()
    await agent.put("a--1", "first")
    await agent.wait("a--1", "Loaded")
    ours = agent.engine.adapters["a--1"]
    agent.engine.load_seconds = 0.3
    agent.engine.adapters["a--1"] = "/somewhere/else"
    found = await agent.adapter("a--1")
    assert found["state"] == "Loading"
    assert "/somewhere/else" in found["message"]
    await agent.wait("a--1", "Loaded")
    assert agent.engine.adapters["a--1"] == ours


@pytest.mark.parametrize("cards", [["base"], "base", [None], [{"root": "org/base"}], {"id": "base"}])
async def test_a_list_of_models_that_is_none_is_an_engine_that_is_not_well(start: Start, cards: Any) -> None:
    engine = Engine(cards=cards)
    agent = await start(engine)
    status, document = await agent.call("GET", "status")
    assert status == 200
    assert not document["engine"]["ready"]
    assert "/v1/models" in document["engine"]["message"]
    engine.cards = None  # the agent goes on where it was
    assert await agent.put("a--1", "first") == 202
    await agent.wait("a--1", "Loaded")


async def test_a_list_from_before_the_load_does_not_undo_it(start: Start) -> None:
    engine = Engine(loading=asyncio.Event())
    agent = await start(engine)
    await agent.put("a--1", "first")
    while not engine.calls:
        await asyncio.sleep(0.01)
    engine.listing = asyncio.Event()
    looks = [asyncio.create_task(agent.adapter("a--1")) for _ in range(3)]
    while engine.held < len(looks):
        await asyncio.sleep(0.01)
    assert engine.loading is not None
    engine.loading.set()
    await agent.wait("a--1", "Loaded")
    engine.listing.set()
    assert [(await look)["state"] for look in looks] == ["Loaded"] * len(looks)
    assert engine.calls == ["load a--1"]


async def test_a_new_agent_knows_what_the_old_one_was_to_load(start: Start) -> None:
    first = await start()
    await first.put("a--1", "first")
    await first.wait("a--1", "Loaded")
    second = await start(Engine())  # the same state file
    await second.wait("a--1", "Loaded")
    assert "a--1" in second.engine.adapters


async def test_what_somebody_else_loaded_under_the_name_is_replaced(start: Start) -> None:
    agent = await start(Engine(adapters={"a--1": "/somewhere/else"}))
    await agent.put("a--1", "first")
    await agent.wait("a--1", "Loaded")
    assert agent.engine.calls == ["load a--1", "unload a--1", "load a--1"]


async def test_what_cannot_be_written_down_is_refused_and_not_done(start: Start, tmp_path: Path) -> None:
    state = tmp_path / "state" / "adapters.json"
    agent = await start(state_file=state)
    assert await agent.put("a--1", "first") == 202
    await agent.wait("a--1", "Loaded")
    state.parent.rename(tmp_path / "away")
    state.parent.write_text("no folder")
    assert await agent.put("b--2", "second") == 503
    status, document = await agent.call("DELETE", "adapters/a--1")
    assert (status, f"--state-dir {state.parent} cannot be written" in document["error"]) == (503, True)
    assert await agent.adapter("b--2") == {}
    assert (await agent.adapter("a--1"))["state"] == "Loaded"
    state.parent.unlink()
    assert await agent.put("b--2", "second") == 202
    await agent.wait("b--2", "Loaded")
    assert (await agent.call("DELETE", "adapters/a--1"))[0] == 202


async def test_parts_of_downloads_that_were_killed_do_not_stay(start: Start, tmp_path: Path) -> None:
    old, young = tmp_path / "cache" / ".part-old", tmp_path / "cache" / ".part-young"
    for part in (old, young):
        (part / "artifact").mkdir(parents=True)
        (part / "artifact" / "adapter_model.safetensors").write_text("half")
    begun = time.time() - 3600
    os.utime(old, (begun, begun))
    await start()
    for _ in range(100):
        if not old.exists():
            break
        await asyncio.sleep(0.05)
    assert [part.name for part in young.parent.iterdir()] == [young.name]  # another agent may be at it


async def test_a_delete_while_it_loads_leaves_nothing(start: Start) -> None:
    agent = await start(Engine(load_seconds=0.3))
    await agent.put("a--1", "first")
    while not agent.engine.calls:
        await asyncio.sleep(0.01)
    assert (await agent.call("DELETE", "adapters/a--1"))[0] == 202
    await asyncio.sleep(1.5)
    assert await agent.adapter("a--1") == {}
    assert agent.engine.adapters == {}


async def test_callers_need_the_token_that_the_file_holds_now(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("old\n")
    agent = await start(token_file=file)
    assert (await agent.call("GET", "status"))[0] == 401
    assert (await agent.call("GET", "status", Authorization="Bearer old"))[0] == 200
    file.write_text("new\n")
    assert (await agent.call("GET", "status", Authorization="Bearer old"))[0] == 401
    assert (await agent.call("GET", "status", Authorization="Bearer new"))[0] == 200


async def test_what_was_to_go_goes_when_the_engine_is_back_whoever_restarted(
    start: Start, tmp_path: Path
) -> None:
    engine = Engine(up=False, adapters={"a--1": "/somewhere", "b--2": "/else"})
    agent = await start(engine)
    assert (await agent.call("DELETE", "adapters/a--1"))[0] == 202  # who knows what the engine has?
    another = await start(engine, cache=tmp_path / "other")  # reads what the first one wrote
    engine.up = True
    unloads = ["unload a--1", "unload a--1"]  # one of each
    for _ in range(100):
        if engine.calls == unloads and not json.loads((tmp_path / "state.json").read_text())["leaving"]:
            break
        await asyncio.sleep(0.05)
    assert (engine.adapters, engine.calls) == ({"b--2": "/else"}, unloads)
    await another.call("GET", "status")  # looks at the engine
    assert (await another.call("DELETE", "adapters/a--1"))[0] == 200


async def test_nobody_is_let_in_without_a_token_to_compare_with(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "token"
    agent = await start(token_file=file)
    status, document = await agent.call("GET", "status", Authorization="Bearer old")
    assert (status, "token file" in document["error"]) == (503, True)
    file.write_text("old")
    assert (await agent.call("GET", "status", Authorization="Bearer old"))[0] == 200
    host, _, port = agent.url.removeprefix("http://").partition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /agent/v1/status HTTP/1.0\r\nAuthorization: Bearer \xff\xfe\r\n\r\n")
    assert (await reader.readline()).split()[1] == b"401"
    writer.close()


async def test_storage_that_hangs_holds_up_nobody_else(start: Start, tmp_path: Path) -> None:
    agent = await start(Engine(max_lora=50), download_timeout=0.3)
    pipe = tmp_path / "hangs" / "manifest.json"
    pipe.parent.mkdir()
    os.mkfifo(pipe)  # opening it waits for a writer, as a lost network volume waits for its server
    try:
        for number in range(40):
            await agent.put(f"h--{number}", "first", uri=f"file://{pipe.parent}")
        await agent.wait("h--39", "Failed")
        await agent.put("a--1", "first")
        await agent.wait("a--1", "Loaded")
    finally:
        os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK))  # lets go of whoever waits


async def test_a_base_model_that_hangs_holds_up_nobody_else(
    start: Start, tiny_model: Path, tmp_path: Path
) -> None:
    for name in ("engine", "trained"):
        (tmp_path / name).mkdir()
        shutil.copy(tiny_model / "config.json", tmp_path / name)
    pipe = tmp_path / "engine" / "model.safetensors"
    os.mkfifo(pipe)
    (tmp_path / "trained" / pipe.name).symlink_to(pipe)
    base = f"file://{tmp_path}/engine"
    agent = await start(Engine(max_lora=50), download_timeout=0.3, base_uri=base)
    made = write_adapter(tiny_model, tmp_path / "adapter", seed=1)
    digest = commit_artifact(made, tmp_path / "hangs", base_uri=f"file://{tmp_path}/trained")
    try:
        for number in range(40):
            await agent.put(f"h--{number}", "first", uri=f"file://{tmp_path}/hangs", digest=digest)
        failed = await agent.wait("h--39", "Failed")
        assert f"{base} or the adapter's own base model was not read within" in failed["message"]
        # The engine beside it encodes prompts there.
        await asyncio.wait_for(asyncio.to_thread(lambda: None), timeout=5)
    finally:
        os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK))


@pytest.mark.parametrize(
    ("name", "body", "message"),
    [
        ("a--1", {"digest": "sha256:" + "0" * 64}, "uri"),
        ("a--1", {"uri": "file:///x", "digest": "md5:0"}, "digest"),
        ("a--1", {"uri": "/x", "digest": "sha256:" + "0" * 64}, "uri"),
        ("-a", {"uri": "file:///x", "digest": "sha256:" + "0" * 64}, "name"),
        ("a--1", [], "body: Input should be an object"),
    ],
)
async def test_bad_requests_name_the_field(start: Start, name: str, body: Any, message: str) -> None:
    agent = await start()
    status, document = await agent.call("PUT", f"adapters/{name}", body)
    assert status == 400
    assert message in document["error"]


async def evaluate(agent: Agent, **task: Any) -> dict[str, Any]:
    assert (await agent.call("POST", "evaluations", task))[0] == 202
    found: dict[str, Any] = {}
    for _ in range(100):
        found = (await agent.call("GET", f"evaluations/{task['id']}"))[1]
        if found["state"] != "Running":
            return found
        await asyncio.sleep(0.05)
    raise AssertionError(f"still running: {found}")


async def test_golden_rows_are_scored_for_each_model(start: Start, tmp_path: Path) -> None:
    agent = await start()
    await agent.put("a--1", "first")
    await agent.wait("a--1", "Loaded")
    # The double repeats the question, so half of these references are right.
    rows = [{"prompt": f"q{n}", "completion": f"q{n}" if n % 2 else "other"} for n in range(20)]
    file = tmp_path / "golden.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"models": ["a--1", "base"], "dataset": f"file://{file}", "scorer": "ExactMatch", "maxRows": 10}

    found = await evaluate(agent, id="e1", **task)

    assert found["state"] == "Done"
    assert found["scores"] == {"a--1": {"score": 0.5, "rows": 10}, "base": {"score": 0.0, "rows": 10}}


async def test_an_evaluation_that_cannot_be_done_says_why_and_may_be_posted_again(
    start: Start, tmp_path: Path
) -> None:
    agent = await start()
    file = tmp_path / "golden.jsonl"
    file.write_text('{"prompt": "q", "completion": "a"}\n')
    task = {"models": ["nobody--1"], "dataset": f"file://{file}", "scorer": "Contains"}
    found = await evaluate(agent, id="e1", **task)
    assert found["state"] == "Failed"
    assert "nobody--1" in found["message"]
    found = await evaluate(agent, id="e1", **{**task, "models": ["base"]})
    assert found["state"] == "Done"
    assert (await agent.call("GET", "evaluations/unknown"))[0] == 404


async def test_an_answer_without_choices_ends_the_evaluation(start: Start, tmp_path: Path) -> None:
    agent = await start(Engine(choices=[]))
    file = tmp_path / "golden.jsonl"
    file.write_text('{"prompt": "q", "completion": "a"}\n' * 100)
    task = {"models": ["base"], "dataset": f"file://{file}", "scorer": "Contains"}
    found = await evaluate(agent, id="e1", **task)
    assert found["state"] == "Failed"
    assert "/v1/chat/completions" in found["message"]
    await asyncio.sleep(0.2)
    assert agent.engine.questions < 20, "the other rows were asked although no score can come of them"

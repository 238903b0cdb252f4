"""Whole processes: the engine with its agent, killed and started again, and the ends that it may have."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from finetune_local.ports import pick
from finetune_server import server
from finetune_server.__main__ import main, make_parser
from tests import tiny
from tests.integration.server.processes import COMMAND, Process, call, engine
from tests.waiting import wait_until

QUESTION = [{"role": "user", "content": "What colour is cup 3?"}]


HEADERS = {"Authorization": "Bearer secret"}


def ask_agent(process: Process, method: str, path: str, body: Any = None) -> tuple[int, dict[str, Any]]:
    return call(method, f"{process.agent}/agent/v1/{path}", body, headers=HEADERS)


def adapter_state(process: Process, name: str) -> dict[str, Any]:
    adapters = ask_agent(process, "GET", "status")[1]["adapters"]
    return next((dict(one) for one in adapters if one["name"] == name), {})


def wait_loaded(process: Process, name: str) -> None:
    wait_until(lambda: adapter_state(process, name).get("state") == "Loaded", what=f"{name} loaded")


def ask(process: Process, model: str) -> str:
    body = {"model": model, "messages": QUESTION, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    status, document = call("POST", f"{process.url}/v1/chat/completions", body, headers=HEADERS)
    assert status == 200, document
    return str(document["choices"][0]["message"]["content"])


def evaluate(process: Process, task: dict[str, Any]) -> dict[str, Any]:
    assert ask_agent(process, "POST", "evaluations", task)[0] == 202

    def finished() -> dict[str, Any] | None:
        found = ask_agent(process, "GET", f"evaluations/{task['id']}")[1]
        return None if found["state"] == "Running" else found

    return dict(wait_until(finished))


def test_a_killed_engine_comes_back_with_its_adapters(
    tiny_model: Path, published: dict[str, tuple[Path, str]], tmp_path: Path
) -> None:
    token = tmp_path / "token"
    token.write_text("secret\n")
    options = ["--state-dir", str(tmp_path / "state"), "--max-loras", "2"]
    options += ["--agent-token-file", str(token), "--api-key-file", str(token)]
    with engine(tiny_model, tmp_path, *options) as process:
        # Before the model is loaded, the agent says so and takes orders.
        status = wait_until(lambda: ask_agent(process, "GET", "status")[1])
        assert status["engine"]["ready"] is False
        assert status["capacity"]["maxLoras"] == 2
        names = {}
        for artifact in ("first", "second"):
            folder, digest = published[artifact]
            names[artifact] = f"{artifact}--{digest[7:15]}"
            body = {"uri": f"file://{folder}", "digest": digest}
            assert ask_agent(process, "PUT", f"adapters/{names[artifact]}", body)[0] == 202
        for name in names.values():
            wait_loaded(process, name)
        models = ["tiny", *names.values()]
        answers = [ask(process, model) for model in models]
        assert len(set(answers)) == 3
        before = ask_agent(process, "GET", "status")[1]["engine"]
        assert before["baseModel"] == "tiny"
        check_keys(process)
        check_capacity(process, published)
        check_golden_rows(process, answers[0], tmp_path / "golden.jsonl")

        beside = start_sidecar(process, token)
        told = wait_until(lambda: sidecar_status(beside, ready=True))
        assert told["capacity"] == {"maxLoras": 2, "loadedLoras": 2, "maxLoraRank": None}
        assert told["engine"] == before

        process.kill()
        assert wait_until(lambda: sidecar_status(beside, ready=False))["engine"]["message"]
        process.start()
        process.wait_healthy()
        for name in names.values():
            wait_loaded(process, name)
        assert [ask(process, model) for model in models] == answers
        after = ask_agent(process, "GET", "status")[1]["engine"]
        assert after["instance"] != before["instance"]

        assert wait_until(lambda: sidecar_status(beside, ready=True))["engine"] == after
        assert beside.stop() == 0
        assert process.stop() == 0
        log = process.log.read_text()
        assert "What colour" not in log  # no prompt, ever
        assert "Traceback" not in log


def start_sidecar(process: Process, token: Path) -> Process:
    """Starts an agent of its own beside the engine, as in a pod of vLLM."""
    (port,) = pick(1)
    arguments = ["agent", "--engine", process.url, "--port", str(port), "--token-file", str(token)]
    beside = Process([*arguments, "--api-key-file", str(token)], process.log.with_name("agent.log"), 0, port)
    beside.start()
    return beside


def sidecar_status(beside: Process, *, ready: bool) -> dict[str, Any] | None:
    status = ask_agent(beside, "GET", "status")[1]
    return status if status["engine"]["ready"] is ready else None


def check_keys(process: Process) -> None:
    """Whoever has no key hears nothing but whether the engine is well."""
    assert call("GET", f"{process.url}/v1/models")[0] == 401
    assert call("GET", f"{process.agent}/agent/v1/status")[0] == 401
    assert call("GET", f"{process.url}/health")[0] == 200


def check_capacity(process: Process, published: dict[str, tuple[Path, str]]) -> None:
    """One adapter too many is refused, and takes nobody's place."""
    folder, digest = published["third"]
    ask_agent(process, "PUT", "adapters/third--3", {"uri": f"file://{folder}", "digest": digest})
    assert wait_until(lambda: adapter_state(process, "third--3").get("reason")) == "CapacityFull"
    body = {"lora_name": "third--3", "lora_path": str(folder)}
    status, document = call("POST", f"{process.url}/v1/load_lora_adapter", body, headers=HEADERS)
    assert (status, document["error"]["type"]) == (400, "LoRACapacityError")
    ask_agent(process, "DELETE", "adapters/third--3")


def check_golden_rows(process: Process, right: str, file: Path) -> None:
    # The base's own answer is right, the other row's is not; 12 tokens as in `ask`.
    rows: list[dict[str, Any]] = [{"messages": [*QUESTION, {"role": "assistant", "content": right}]}]
    rows += [{"prompt": tiny.question("hat", 1), "completion": "surely not this"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"id": "e1", "models": ["tiny"], "dataset": f"file://{file}", "maxTokens": 12}
    found = evaluate(process, task)
    assert (found["state"], found["message"]) == ("Done", "")
    assert found["scores"] == {"tiny": {"score": 0.5, "rows": 2}}


def end(*arguments: str) -> tuple[int, str]:
    """Runs a command that must end by itself; returns its exit code and the last line that it said."""
    ended = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=120, check=False)
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended.returncode, ended.stderr.strip().splitlines()[-1]


def test_bodies_that_are_broken_in_transfer_are_refused_and_not_in_the_log(
    tiny_model: Path, tmp_path: Path
) -> None:
    path = "/v1/chat/completions"
    body = json.dumps({"model": "tiny", "messages": QUESTION}).encode()
    with engine(tiny_model, tmp_path) as process:
        process.wait_healthy()
        status, document = call("POST", process.url + path, body, headers={"Content-Encoding": "gzip"})
        assert (status, document["error"]["code"]) == (400, 400)
        with socket.create_connection(("127.0.0.1", process.port), timeout=10) as connection:
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n"
            connection.sendall(head.encode() + body)
            assert b" 400 " in connection.recv(100)
        assert process.stop() == 0
        log = process.log.read_text()
        assert "What colour" not in log
        assert "Traceback" not in log


def test_what_unpacks_to_a_hundred_times_its_size_holds_up_nobody(tiny_model: Path, tmp_path: Path) -> None:
    """Packed bodies are not unpacked, as with vLLM: four gibibytes took seconds in which nothing else was answered."""
    bomb = gzip.compress(bytes(2**30), compresslevel=1)
    with engine(tiny_model, tmp_path) as process:
        process.wait_healthy()
        url = process.url + "/v1/chat/completions"
        waits: list[float] = []
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(call, "POST", url, bomb, headers={"Content-Encoding": "gzip"})
            while not waits or not asked.done():
                began = time.monotonic()
                assert call("GET", f"{process.url}/health")[0] == 200
                waits.append(time.monotonic() - began)
        status, document = asked.result()
        assert (status, document["error"]["code"]) == (400, 400)
        assert max(waits) < 1.0


def test_a_wrong_model_is_told_in_one_line(tmp_path: Path) -> None:
    code, told = end("--model", str(tmp_path), "--port", str(pick(1)[0]), "--agent-port", "0")
    assert code == 66
    assert told.startswith("ModelNotFound: --model: file://")


def test_a_disk_without_any_place_for_temporary_files_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", refuse)
    assert main(["--model", "/none", "--agent-port", "0"]) == 64
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("BadConfig: no folder for temporary files can be written")


def test_a_stop_does_not_wait_for_a_model_that_is_still_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class Left(BaseException):
        pass

    def hang(options: argparse.Namespace) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr(server, "build_engine", hang)
    monkeypatch.setattr(os, "_exit", leave)
    began = time.monotonic()
    with pytest.raises(Left, match="0"):
        server.run(make_parser().parse_args(["--model", "/none", "--agent-port", "0"]))
    assert time.monotonic() - began < 5


def test_a_key_file_of_no_use_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")  # every client would have the right key
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    commands = {"missing": ["--model", "/none"], "binary": ["--model", "/none"]}
    commands["empty"] = ["agent", "--engine", "http://127.0.0.1:1"]
    for name, command in commands.items():
        code, told = end(*command, "--port", "0", "--api-key-file", str(tmp_path / name))
        assert code == 64
        assert told.startswith(f"BadConfig: --api-key-file: {tmp_path / name} cannot be read (")


def test_an_address_that_cannot_be_had_is_told_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, told = end("agent", "--engine", "http://127.0.0.1:1", "--port", str(port))
    assert code == 64
    assert told.startswith(f"BadConfig: port {port} of 127.0.0.1 cannot be listened on (")
    code, told = end("agent", "--engine", "http://127.0.0.1:1", "--port", "99999")
    assert (code, "99999 is no port" in told) == (2, True)

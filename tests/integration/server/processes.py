"""Engine and agent processes on free ports."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_local.ports import pick
from tests.waiting import wait_until

COMMAND = [sys.executable, "-m", "finetune_server"]
TRAINER_IMAGE = Path(__file__).parents[3] / "trainer_image"


def call(
    method: str, url: str, body: Any = None, *, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, Any]]:
    """Returns status and JSON document of a request (an answer that is no JSON: under `text`)."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, method=method, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            status, content = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        status, content = error.code, error.read()
    try:
        return status, json.loads(content)
    except ValueError:
        return status, {"text": content.decode()}


@dataclass
class Process:
    """A finetune-server process with its ports."""

    arguments: list[str]
    log: Path
    port: int
    agent_port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def agent(self) -> str:
        return f"http://127.0.0.1:{self.agent_port}"

    def start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(TRAINER_IMAGE), "FINETUNE_VOLUMES": ""}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [*COMMAND, *self.arguments], stdout=log, stderr=log, env=environment
            )

    def wait_healthy(self) -> None:
        wait_until(self._is_healthy, what=lambda: f"health of {self.url}\n{self.log.read_text()[-3000:]}")

    def _is_healthy(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()[-3000:]
        return call("GET", f"{self.url}/health")[0] == 200

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self) -> int:
        """Ends the process as Kubernetes does; returns its exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(timeout=40)


@contextlib.contextmanager
def engine(model: Path, folder: Path, *more: str) -> Iterator[Process]:
    """An engine with its agent, started but not waited for."""
    port, agent_port = pick(2)
    arguments = ["--model", str(model), "--served-model-name", "tiny", "--port", str(port)]
    arguments += ["--agent-port", str(agent_port), "--cache-dir", str(folder / "cache"), *more]
    made = Process(arguments, folder / "engine.log", port, agent_port)
    made.start()
    try:
        yield made
    finally:
        made.kill()

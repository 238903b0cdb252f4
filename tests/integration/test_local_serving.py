"""Router and engine as the laptop cluster starts them, over the tiny model and without a control plane."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from finetune_local import errors, parts, processes
from finetune_local.cluster import Cluster, State
from tests.clusters import pid_of

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def laptop(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("files")
    (folder / "hello.txt").write_text("hello")
    one = Cluster(tmp_path_factory.mktemp("state") / "local", files=folder, engine_model=str(tiny_model))
    try:
        one.up(parts.SERVING)
        yield one
    finally:
        one.down(purge=True)


def ask(cluster: Cluster, port: str, path: str, *, token: str = "", body: Any = None) -> Any:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {token}"}
    request = urllib.request.Request(
        f"http://127.0.0.1:{cluster.ports[port]}{path}",
        data=None if body is None else json.dumps(body).encode(),
        headers=headers,
        method="GET" if body is None else "PUT",
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def publish(cluster: Cluster) -> None:
    """The tiny model as an alias, as the operator would route it."""
    upstreams = [f"http://127.0.0.1:{cluster.ports['engine']}"]
    target = {"revision": "base", "servedName": "tiny", "upstreams": upstreams}
    route = {"alias": "bot", "owner": "default/bot/u1", "stable": target}
    snapshot = {"apiVersion": "routes/v1", "version": 7, "routes": [route]}
    secret = cluster.layout.token("router").read_text()
    assert ask(cluster, "router-admin", "/admin/v1/routes", token=secret, body=snapshot)["version"] == 7


def complete(cluster: Cluster) -> dict[str, Any]:
    body = {"model": "bot", "prompt": "a red cup", "max_tokens": 3, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://127.0.0.1:{cluster.ports['router']}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        result: dict[str, Any] = json.load(answer)
    return result


def kill(cluster: Cluster, part: str) -> int:
    pid = pid_of(cluster, part)
    os.kill(pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=5)
    return pid


def states(cluster: Cluster) -> dict[str, State]:
    return {line.name: line.state for line in cluster.status() if line.name in parts.SERVING}


def test_a_request_goes_through_the_router_to_the_engine(laptop: Cluster) -> None:
    publish(laptop)
    assert complete(laptop)["usage"]["completion_tokens"] == 3


def test_admin_ports_want_their_tokens_and_the_tokens_are_private(laptop: Cluster) -> None:
    for port, path, name in (
        ("router-admin", "/admin/v1/routes", "router"),
        ("engine-agent", "/agent/v1/status", "agent"),
    ):
        with pytest.raises(urllib.error.HTTPError) as refusal:
            ask(laptop, port, path)
        assert refusal.value.code == 401
        file = laptop.layout.token(name)
        assert file.stat().st_mode & 0o777 == 0o600
        assert ask(laptop, port, path, token=file.read_text())


def test_they_listen_on_loopback_only(laptop: Cluster) -> None:
    identity = json.loads(laptop.layout.instance.read_text())["identity"]
    listening = {
        connection.laddr
        for process in processes.find_all(laptop.layout, identity, parts.SERVING)
        for connection in process.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert {address.ip for address in listening} == {"127.0.0.1"}
    names = ("router", "router-admin", "engine", "engine-agent")
    assert {laptop.ports[name] for name in names} <= {address.port for address in listening}


def test_a_second_up_changes_nothing(laptop: Cluster) -> None:
    before = {line.name: line.pid for line in laptop.status()}
    lines: list[str] = []
    laptop.up(parts.SERVING, report=lines.append)
    assert {line.name: line.pid for line in laptop.status()} == before
    assert lines == []


def test_the_engine_sees_the_folders_behind_the_claims(laptop: Cluster) -> None:
    assert (laptop.layout.volumes / "files" / "hello.txt").read_text() == "hello"
    assert {path.name for path in laptop.layout.volumes.iterdir()} == {"files", "models", "artifacts"}


def test_the_engine_stands_back_behind_trainings(laptop: Cluster) -> None:
    pid = pid_of(laptop, "engine")
    process = psutil.Process(pid)
    assert process.nice() == 5
    waiting = [Path(f"/proc/{pid}/task/{thread.id}/stat").read_text() for thread in process.threads()]
    assert {int(line.rpartition(")")[2].split()[16]) for line in waiting} == {5}, "each thread has its own"


@pytest.mark.parametrize("part", parts.SERVING)
def test_up_brings_a_killed_part_back_with_what_it_knew(laptop: Cluster, part: str) -> None:
    publish(laptop)
    pid = kill(laptop, part)
    assert states(laptop)[part] is State.CRASHED
    laptop.up(parts.SERVING)
    assert set(states(laptop).values()) == {State.RUNNING}
    assert pid_of(laptop, part) != pid
    assert complete(laptop)["usage"]["completion_tokens"] == 3, "the route was on disk"


def test_nothing_of_them_is_left_after_down(laptop: Cluster) -> None:
    running = laptop.down()
    assert set(running) == set(parts.SERVING)
    assert set(states(laptop).values()) == {State.STOPPED}
    laptop.up(parts.SERVING)


def test_up_tells_the_base_url(laptop: Cluster) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "finetune_cli",
            "local",
            "up",
            "--only",
            "serving",
            "--state",
            laptop.layout.root,
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"OpenAI base URL: http://127.0.0.1:{laptop.ports['router']}/v1" in done.stdout


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    one = Cluster(tmp_path, engine_model="no-such-model")
    with pytest.raises(errors.LocalClusterError, match="'no-such-model' is neither a folder nor a URI"):
        one.up(parts.SERVING)
    assert one.status()[-1].state is State.STOPPED

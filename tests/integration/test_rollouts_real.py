"""The main rows of a rollout with the real engine, real adapters, the real router and the official client."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from finetune_local.cluster import Cluster
from tests.adapters import commit_artifact, write_adapter
from tests.clients import Json, Kubectl
from tests.integration.rollout_operator import serves

pytestmark = pytest.mark.integration

PARTS = ("etcd", "kube-apiserver", "kube-controller-manager", "operator", "router", "engine")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Cluster]:
    running = Cluster(
        tmp_path_factory.mktemp("laptop"),
        engine_model=str(tiny_model),
        operator_environment={"FINETUNE_DRAIN_SECONDS": "1"},
    )
    try:
        running.up(PARTS)
        yield running
    finally:
        running.down()


class Users:
    """Requests all the time, from many users, through the official client."""

    def __init__(self, cluster: Cluster, model: str) -> None:
        self._client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{cluster.ports['router']}/v1", api_key="none", max_retries=0
        )
        self._model = model
        self.answers: Counter[str] = Counter()
        """By revision."""
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        number = 0
        while not self._stop.wait(0.05):
            number += 1
            try:
                answer = self._client.completions.with_raw_response.create(
                    model=self._model, prompt="a red cup", max_tokens=3, user=f"user {number % 101}"
                )
                self.answers[answer.headers["x-adapter-revision"]] += 1
            except openai.APIError as error:
                self.failures.append(repr(error))

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=30)
        self._client.close()


def deploy(kubectl: Kubectl, artifact: tuple[Path, str], *steps: Json) -> str:
    """Deploy it as `bot-<namespace>`; returns its revision."""
    folder, digest = artifact
    kubectl.apply(
        {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "AdapterDeployment",
            "metadata": {"name": "bot"},
            "spec": {
                "alias": f"bot-{kubectl.namespace}",
                "baseModelRef": {"name": "tiny"},
                "adapter": {"source": {"uri": f"file://{folder}", "digest": digest}},
                "strategy": {"canary": {"steps": list(steps)}},
                "analysis": {"interval": "1s"},
            },
        }
    )
    return digest.removeprefix("sha256:")[:8]


def publish(model: Path, folder: Path, *, seed: int) -> tuple[Path, str]:
    """A committed artifact of a random adapter; its folder and digest."""
    adapter = write_adapter(model, folder.with_suffix(".adapter"), seed=seed)
    return folder, commit_artifact(adapter, folder, base_uri=f"file://{model}")


def wait(kubectl: Kubectl, until: Callable[[Json], bool], *, seconds: float = 60) -> Json:
    deadline = time.monotonic() + seconds
    while True:
        status: Json = (kubectl.get("adep", "bot") or {}).get("status", {})
        if until(status):
            return status
        assert time.monotonic() < deadline, json.dumps(status, indent=1)
        time.sleep(0.2)


def pid_of(cluster: Cluster, part: str) -> int:
    (pid,) = [status.pid for status in cluster.status() if status.name == part]
    assert pid is not None
    return pid


def test_no_request_fails_while_a_better_adapter_takes_over_and_the_operator_dies(
    cluster: Cluster, kubectl: Kubectl, tiny_model: Path, tmp_path: Path
) -> None:
    first = deploy(kubectl, publish(tiny_model, tmp_path / "first", seed=1))
    wait(kubectl, serves(first))
    users = Users(cluster, f"bot-{kubectl.namespace}")
    try:
        steps: list[Json] = [{"setWeight": 30}, {"pause": {"duration": "8s"}}, {"setWeight": 70}]
        second = deploy(kubectl, publish(tiny_model, tmp_path / "second", seed=2), *steps)
        wait(kubectl, lambda s: s.get("weights", {}).get("candidate") == 30 and s["weights"]["verified"])
        os.kill(pid_of(cluster, "operator"), signal.SIGKILL)
        time.sleep(1)
        cluster.up(("operator",))
        status = wait(kubectl, serves(second), seconds=90)
        time.sleep(1)
    finally:
        users.close()
    assert users.failures == []
    assert min(users.answers[first], users.answers[second]) > 3, users.answers
    (guardrail,) = [check for check in status["analysis"] if check["kind"] == "Guardrail"]
    assert guardrail["n"]["candidate"] > 0

    kubectl("delete", "adep", "bot")
    engine = openai.OpenAI(base_url=f"http://127.0.0.1:{cluster.ports['engine']}/v1", api_key="none")
    deadline = time.monotonic() + 30
    while [model.id for model in engine.models.list() if model.id != "tiny"]:
        assert time.monotonic() < deadline, "adapters were left behind"
        time.sleep(0.5)


def test_a_router_and_an_engine_that_were_killed_serve_again(
    cluster: Cluster, kubectl: Kubectl, tiny_model: Path, tmp_path: Path
) -> None:
    revision = deploy(kubectl, publish(tiny_model, tmp_path / "only", seed=3))
    wait(kubectl, serves(revision))
    for part in ("router", "engine"):
        os.kill(pid_of(cluster, part), signal.SIGKILL)
        time.sleep(0.5)
        cluster.up((part,))
    deadline = time.monotonic() + 60
    while True:
        users = Users(cluster, f"bot-{kubectl.namespace}")
        time.sleep(1)
        users.close()
        if users.answers[revision] and not users.failures:
            break
        assert time.monotonic() < deadline, users.failures[-1:]

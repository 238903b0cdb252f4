"""The main rows of a rollout with the real engine, real adapters, the real router and the official client."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from finetune_local.cluster import Cluster
from finetune_trainer import lifecycle
from tests import tiny
from tests.adapters import commit_artifact, write_adapter
from tests.clients import Json, Kubectl
from tests.clusters import pid_of
from tests.integration.rollout_operator import serves

pytestmark = pytest.mark.integration

LONG_OUTAGE_SECONDS = float(os.environ.get("FINETUNE_OUTAGE_SECONDS") or 60)  # `make test-faults` sets 600
CONTROL_PLANE = ("etcd", "kube-apiserver", "kube-controller-manager")
PARTS = (*CONTROL_PLANE, "operator", "router", "engine")


@contextlib.contextmanager
def serving(folder: Path, model: Path) -> Iterator[Cluster]:
    """A cluster whose engine serves the model."""
    running = Cluster(folder, engine_model=str(model), operator_environment={"FINETUNE_DRAIN_SECONDS": "1"})
    try:
        running.up(PARTS)
        yield running
    finally:
        running.down()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Iterator[Cluster]:
    with serving(tmp_path_factory.mktemp("laptop"), tiny_model) as running:
        yield running


Ask = Callable[[openai.OpenAI, str, str], str]
"""Sends one request for a model as a user; returns the revision that answered."""


def complete(client: openai.OpenAI, model: str, user: str) -> str:
    answer = client.completions.with_raw_response.create(
        model=model, prompt="a red cup", max_tokens=3, user=user
    )
    return answer.headers["x-adapter-revision"]


def chat(client: openai.OpenAI, model: str, user: str) -> str:
    answer = client.chat.completions.with_raw_response.create(
        model=model,
        messages=[{"role": "user", "content": tiny.question("cup", 1)}],
        max_tokens=24,
        temperature=0,
        user=user,
    )
    return answer.headers["x-adapter-revision"]


class Users:
    """Requests all the time, from many users, through the official client."""

    def __init__(self, cluster: Cluster, model: str, *, ask: Ask = complete, pause: float = 0.05) -> None:
        self._client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{cluster.ports['router']}/v1", api_key="none", max_retries=0
        )
        self._model = model
        self._ask = ask
        self._pause = pause
        self.answers: Counter[str] = Counter()
        """By revision."""
        self.sides: dict[str, set[str]] = {}
        """Revisions that each user has met."""
        self.failures: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        number = 0
        while not self._stop.wait(self._pause):
            number += 1
            user = f"user {number % 101}"
            try:
                revision = self._ask(self._client, self._model, user)
                self.answers[revision] += 1
                self.sides.setdefault(user, set()).add(revision)
            except openai.APIError as error:
                self.failures.append(repr(error))

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=30)
        self._client.close()


def deploy(kubectl: Kubectl, artifact: tuple[Path, str], *steps: Json, **spec: Any) -> str:
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
                **spec,
            },
        }
    )
    return digest.removeprefix("sha256:")[:8]


def publish(model: Path, folder: Path, *, seed: int) -> tuple[Path, str]:
    """A committed artifact of a random adapter; its folder and digest."""
    adapter = write_adapter(model, folder.with_suffix(".adapter"), seed=seed)
    return folder, commit_artifact(adapter, folder, base_uri=f"file://{model}")


def train(model: Path, folder: Path, rows: list[Json]) -> tuple[Path, str]:
    """A committed artifact of a LoRA run over these rows; its folder and digest."""
    data = tiny.write_jsonl(folder.with_suffix(".jsonl"), rows, times=4)
    document = tiny.run_document(
        model,
        data,
        folder,
        job={"namespace": "default", "name": folder.name, "uid": folder.name, "attempt": 1},
        method={"type": "LoRA", "lora": {"r": 16, "alpha": 32, "dropout": 0, "targetModules": ["all-linear"]}},
        dataset={"sources": [{"uri": f"file://{data}"}], "split": {"eval": 0, "seed": 1}},
        hyperparameters={
            "maxSteps": 80, "globalBatchSize": 16, "microBatchSize": 16, "maxLength": 96, "learningRate": 1e-2,
        },
    )  # fmt: skip
    file = folder.with_suffix(".json")
    file.write_text(json.dumps(document))
    assert lifecycle.run_job(file) == 0
    return folder, "sha256:" + hashlib.sha256((folder / "manifest.json").read_bytes()).hexdigest()


def replies(reply: str) -> list[Json]:
    """Rows whose answers are all alike."""
    return [
        {"messages": [row["messages"][0], {"role": "assistant", "content": reply}]}
        for row in tiny.chat_rows()
    ]


def wait(kubectl: Kubectl, until: Callable[[Json], bool], *, seconds: float = 60) -> Json:
    deadline = time.monotonic() + seconds
    while True:
        status: Json = (kubectl.get("adep", "bot") or {}).get("status", {})
        if until(status):
            return status
        assert time.monotonic() < deadline, json.dumps(status, indent=1)
        time.sleep(0.2)


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


def test_an_adapter_that_was_trained_on_spoilt_data_is_rolled_back_by_itself(
    cluster: Cluster, kubectl: Kubectl, tiny_model: Path, tmp_path: Path
) -> None:
    analysis = {"interval": "1s", "guardrails": [{"name": "not-json", "event": "schema_invalid"}]}
    spec = {
        "analysis": analysis,
        "traffic": {"outputSchema": {"type": "object", "required": ["colour"]}},
    }
    good = deploy(kubectl, train(tiny_model, tmp_path / "good", replies('{"colour": "red"}')), **spec)
    wait(kubectl, serves(good))
    bad = train(tiny_model, tmp_path / "bad", replies("colour is red."))
    users = Users(cluster, f"bot-{kubectl.namespace}", ask=chat)
    try:
        steps: list[Json] = [{"setWeight": 30}, {"pause": {}}]
        spoilt = deploy(kubectl, bad, *steps, **spec)
        wait(kubectl, lambda s: s.get("weights", {}).get("candidate") == 30)
        began = time.monotonic()
        status = wait(kubectl, lambda s: s.get("stage") == "Failed")
        took = time.monotonic() - began
        users.answers.clear()
        time.sleep(2)
    finally:
        users.close()
    assert status["abort"]["reason"] == "GuardrailBreached"
    assert "not-json" in status["abort"]["message"]
    (guardrail,) = [check for check in status["analysis"] if check["name"] == "not-json"]
    n, failures = guardrail["n"], guardrail["failures"]
    print(f"rolled back {took:.1f} s after the weight, {n} answers of which {failures} were no JSON")
    assert failures["candidate"] > 0.9 * n["candidate"]
    assert failures["stable"] <= 0.1 * n["stable"]
    assert users.failures == []
    assert set(users.answers) == {good}, f"{spoilt} answers no more"


@pytest.mark.parametrize(
    "seconds",
    [16.0, pytest.param(LONG_OUTAGE_SECONDS, marks=pytest.mark.faults)],
    ids=["longer than a Lease lasts", "long"],
)
def test_no_request_fails_while_the_api_server_is_away(
    cluster: Cluster, kubectl: Kubectl, tiny_model: Path, tmp_path: Path, seconds: float
) -> None:
    first = deploy(kubectl, publish(tiny_model, tmp_path / "first", seed=4))
    wait(kubectl, serves(first))
    steps: list[Json] = [{"setWeight": 30}, {"pause": {"duration": "5s"}}, {"setWeight": 70}]
    second = deploy(kubectl, publish(tiny_model, tmp_path / "second", seed=5), *steps)
    wait(kubectl, lambda s: s.get("weights", {}).get("candidate") == 30 and s["weights"]["verified"])
    operator = pid_of(cluster, "operator")
    os.kill(pid_of(cluster, "kube-apiserver"), signal.SIGKILL)
    users = Users(cluster, f"bot-{kubectl.namespace}", pause=0.2)
    try:
        time.sleep(5)
        memory = resident(operator)
        time.sleep(seconds - 5)
        grown = resident(operator) - memory
        during, failed = Counter(users.answers), list(users.failures)
        both = [user for user, met in users.sides.items() if len(met) > 1]
        assert pid_of(cluster, "operator") == operator, "it is still the same process"
        cluster.up(CONTROL_PLANE)  # and nothing else: users must not notice
        began = time.monotonic()
        wait(kubectl, serves(second), seconds=120)
    finally:
        users.close()
    print(
        f"{seconds:.0f} s without an API server: {during.total()} requests answered, {len(failed)} failed, "
        f"{during[second]} by the candidate, {len(both)} users met both revisions; the operator's memory grew by "
        f"{grown / 2**20:.1f} MiB; {time.monotonic() - began:.1f} s afterwards the rollout had ended"
    )
    assert failed == []
    assert users.failures == []
    assert min(during[first], during[second]) > 0
    assert both == [], "nobody moves while nothing can be recorded"
    assert grown < 32 * 2**20


def resident(pid: int) -> int:
    """Memory of a process in bytes."""
    (line,) = [
        line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS")
    ]
    return int(line.split()[1]) * 1024

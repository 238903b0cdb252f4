"""Parts of the cluster die while a job runs; the job ends as if nothing had happened, or says what did."""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from finetune_local import parts
from finetune_local.cluster import Cluster
from tests import tiny, trainers
from tests.clients import Json, Kubectl, finetunejob
from tests.clusters import pid_of

pytestmark = pytest.mark.integration


@pytest.fixture
def whole(cluster: Cluster) -> Iterator[Cluster]:
    """The cluster, started again after a test that broke it."""
    yield cluster
    cluster.up(parts.TRAINING)


def is_training(status: Json) -> bool:
    return status.get("phase") == "Running" and status.get("progress", {}).get("step", 0) > 0


def has_reached(step: int) -> Callable[[Json], bool]:
    return lambda status: status.get("progress", {}).get("step") == step


def slow_job(name: str, model: Path, data: Path, *, steps: int = 300) -> Json:
    """About 10 s of training with 300 steps, where nothing else uses the cores."""
    hyperparameters = {"maxSteps": steps, "globalBatchSize": 16, "maxLength": 64, "learningRate": 0.01}
    return finetunejob(name, model, data, hyperparameters=hyperparameters)


KILLED = ("operator", "kuberay", "ray-gateway", "ray", "kube-apiserver", "etcd")
PACED = """
import os, time

calls = 0

def paced(prompts, completions):
    global calls
    calls += 1
    while len(os.listdir({folder!r})) < calls:
        time.sleep(0.05)
    return [float(len(text)) for text in completions]
"""


class Pace:
    """A reward function that lets a job make one step, or evaluation, for each permit, and wait without work."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._numbers = itertools.count()
        self.text = PACED.format(folder=str(folder))

    def permit(self, calls: int) -> None:
        for _ in range(calls):
            (self._folder / str(next(self._numbers))).touch()


def paced_job(name: str, model: Path, rows: Path, *, steps: int) -> Json:
    """The ConfigMap `pace` has the function of a Pace."""
    function = {"configMapRef": {"name": "pace", "key": "pace.py"}, "entry": "paced"}
    return finetunejob(
        name,
        model,
        rows,
        objective="RLOO",
        reward={"functions": [function]},
        generation={"numGenerations": 2, "maxCompletionLength": 8},
        hyperparameters={"maxSteps": steps, "globalBatchSize": 8, "maxLength": 64, "evalSteps": steps},
    )


def test_parts_that_are_killed_while_a_job_trains_cost_nothing(
    whole: Cluster, kubectl: Kubectl, tiny_model: Path, tmp_path: Path
) -> None:
    """One after the other under the same job, which trains a step without the part, and one with the next."""
    pace = Pace(tmp_path / "permits")
    rows = tiny.write_jsonl(tmp_path / "prompts.jsonl", tiny.prompt_rows())
    script = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "pace"},
        "data": {"pace.py": pace.text},
    }
    kubectl.apply(script)
    steps = 2 * len(KILLED) + 2
    kubectl.apply(paced_job("survivor", tiny_model, rows, steps=steps))
    pace.permit(1)
    uid = kubectl.wait_job("survivor", is_training, seconds=300)["status"]["attempts"][0]["uid"]
    for done, part in enumerate(KILLED, start=1):
        os.kill(pid_of(whole, part), signal.SIGKILL)
        pace.permit(1)
        time.sleep(1)
        whole.up(parts.TRAINING)
        pace.permit(1)
        status = kubectl.wait_job("survivor", has_reached(2 * done + 1))["status"]
        assert status["phase"] == "Running", f"{part}: {status}"
    pace.permit(100)
    status = kubectl.finished("survivor", seconds=300)  # most of it is start-up, where the cores are shared
    assert status["phase"] == "Succeeded", status["message"]
    assert status["progress"]["step"] == steps
    (attempt,) = status["attempts"]
    assert attempt["uid"] == uid, "the job ran twice"
    assert len(kubectl.items("rayjob")) == 1


def test_a_job_applied_while_the_operator_is_away_is_not_lost(
    whole: Cluster, kubectl: Kubectl, tiny_model: Path, tiny_rows: Path
) -> None:
    os.kill(pid_of(whole, "operator"), signal.SIGKILL)
    kubectl.apply(finetunejob("patient", tiny_model, tiny_rows))
    time.sleep(1)
    assert kubectl.job("patient")["status"] == {"observedGeneration": -1}
    whole.up(parts.TRAINING)
    assert kubectl.finished("patient")["phase"] == "Succeeded"


def test_a_trainer_that_is_killed_is_told_as_lost(
    kubectl: Kubectl, tiny_model: Path, tiny_rows: Path
) -> None:
    job = slow_job("killed", tiny_model, tiny_rows)
    job["spec"]["retry"] = {"maxInfraRetries": 0}
    kubectl.apply(job)
    kubectl.wait_job("killed", is_training)
    trainers.kill(kubectl.namespace, "killed")
    status = kubectl.finished("killed")
    assert (status["phase"], status["reason"]) == ("Failed", "Lost"), status["message"]
    assert "artifact" not in status


def test_an_artifact_counts_even_if_its_trainer_died_before_it_could_report(
    whole: Cluster, kubectl: Kubectl, tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    """The operator is away when the result is sent, and the trainer is killed before it comes back."""
    output = tmp_path / "artifact"
    job = slow_job("unheard", tiny_model, tiny_rows, steps=60)
    job["spec"]["output"] = {"uri": f"file://{output}"}
    operator = pid_of(whole, "operator")  # asked before: training must not be over when the operator dies
    kubectl.apply(job)
    kubectl.wait_job("unheard", lambda status: "progress" in status)  # it validates, then imports for seconds
    os.kill(operator, signal.SIGKILL)
    deadline = time.monotonic() + 240
    while not (output / "manifest.json").exists():
        assert time.monotonic() < deadline, "no manifest was written"
        time.sleep(0.01)
    trainers.kill(kubectl.namespace, "unheard")
    whole.up(parts.TRAINING)
    status = kubectl.finished("unheard")
    assert status["phase"] == "Succeeded", status["message"]
    assert status["attempts"][0]["inspection"] == "unheard-i1"
    assert status["artifact"]["uri"] == f"file://{output}"
    assert (status["progress"]["step"], status["progress"]["percent"]) == (60, 100)
    manifest = json.loads((output / "manifest.json").read_text())
    assert status["metrics"]["evalLoss"] == pytest.approx(manifest["metrics"]["evalLoss"], rel=1e-3)


def test_kuberay_may_be_installed_later(
    whole: Cluster, kubectl: Kubectl, tiny_model: Path, tiny_rows: Path
) -> None:
    """A cluster without KubeRay: the job says what is missing, nothing crashes, and it goes on when KubeRay comes."""
    definitions = kubectl("get", "crd", "-o", "name").split()
    kubectl("delete", *(name for name in definitions if name.endswith(".ray.io")))
    for part in ("kuberay", "operator"):
        os.kill(pid_of(whole, part), signal.SIGKILL)
    whole.up((*parts.CONTROL_PLANE, "operator"))
    kubectl.apply(finetunejob("early", tiny_model, tiny_rows))
    job = kubectl.wait_job("early", lambda s: s.get("reason") == "KubeRayUnavailable", seconds=30)
    assert job["status"]["phase"] == "Pending"
    assert "install 1.3 or newer" in job["status"]["message"]
    operator = pid_of(whole, "operator")
    whole.up(parts.TRAINING)
    status = kubectl.finished("early")
    assert status["phase"] == "Succeeded", status["message"]
    assert pid_of(whole, "operator") == operator, "the operator was restarted"

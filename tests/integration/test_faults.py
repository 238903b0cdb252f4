"""Parts of the cluster die while a job runs; the job ends as if nothing had happened, or says what did."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from finetune_local import parts
from finetune_local.cluster import Cluster
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


STEPS = 300


def slow_job(name: str, model: Path, data: Path, *, steps: int = STEPS) -> Json:
    """About 10 s of training with 300 steps, where nothing else uses the cores."""
    hyperparameters = {"maxSteps": steps, "globalBatchSize": 16, "maxLength": 64, "learningRate": 0.01}
    return finetunejob(name, model, data, hyperparameters=hyperparameters)


@pytest.mark.parametrize("part", ["operator", "kube-apiserver", "etcd", "kuberay", "ray-gateway", "ray"])
def test_a_part_that_is_killed_while_a_job_trains_costs_nothing(
    part: str, whole: Cluster, kubectl: Kubectl, tiny_model: Path, tiny_rows: Path
) -> None:
    kubectl.apply(slow_job("survivor", tiny_model, tiny_rows))
    uid = kubectl.wait_job("survivor", is_training)["status"]["attempts"][0]["uid"]
    os.kill(pid_of(whole, part), signal.SIGKILL)
    time.sleep(1)
    whole.up(parts.TRAINING)
    status = kubectl.finished("survivor", seconds=300)  # most of it is start-up, where the cores are shared
    assert status["phase"] == "Succeeded", status["message"]
    assert status["progress"]["step"] == STEPS
    (attempt,) = status["attempts"]
    assert attempt["uid"] == uid, "the job ran twice"
    assert len(kubectl.items("rayjob")) == 1


def test_a_job_applied_while_the_operator_is_away_is_not_lost(
    whole: Cluster, kubectl: Kubectl, tiny_model: Path, tiny_rows: Path
) -> None:
    os.kill(pid_of(whole, "operator"), signal.SIGKILL)
    kubectl.apply(finetunejob("patient", tiny_model, tiny_rows))
    time.sleep(1)
    assert "status" not in kubectl.job("patient")
    whole.up(parts.TRAINING)
    assert kubectl.finished("patient")["phase"] == "Succeeded"


def kill_trainer(job: str) -> None:
    """Kill a job's processes: Python and the shell that started it. Either alone would leave the other behind."""
    processes = [process for process in psutil.process_iter() if _works_for(process, job)]
    assert processes, f"no trainer of {job} runs"
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=10)


def _works_for(process: psutil.Process, job: str) -> bool:
    try:
        return f"/finetunejobs/{job}/" in process.environ().get("KUBEFLOW_TRAINER_SERVER_URL", "")
    except psutil.Error:  # it has just ended, or belongs to somebody else
        return False


def test_a_trainer_that_is_killed_is_told_as_lost(
    kubectl: Kubectl, tiny_model: Path, tiny_rows: Path
) -> None:
    job = slow_job("killed", tiny_model, tiny_rows)
    job["spec"]["retry"] = {"maxInfraRetries": 0}
    kubectl.apply(job)
    kubectl.wait_job("killed", is_training)
    kill_trainer("killed")
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
    kill_trainer("unheard")
    whole.up(parts.TRAINING)
    status = kubectl.finished("unheard")
    assert status["phase"] == "Succeeded", status["message"]
    assert status["attempts"][0]["inspection"] == "unheard-i1"
    assert status["artifact"]["uri"] == f"file://{output}"
    assert (status["progress"]["step"], status["progress"]["percent"]) == (60, 100)
    manifest = json.loads((output / "manifest.json").read_text())
    assert status["metrics"]["evalLoss"] == pytest.approx(manifest["metrics"]["evalLoss"], rel=1e-3)


def test_kuberay_may_be_installed_later(tmp_path: Path, tiny_model: Path, tiny_rows: Path) -> None:
    """A cluster without KubeRay: the job says what is missing, nothing crashes, and it goes on when KubeRay comes."""
    bare = Cluster(tmp_path / "bare", operator_environment={"FINETUNE_PROGRESS_SECONDS": "1"})
    try:
        bare.up((*parts.CONTROL_PLANE, "operator"))
        kubectl = Kubectl(bare.kubeconfig, "default")
        kubectl.apply(finetunejob("early", tiny_model, tiny_rows))
        job = kubectl.wait_job("early", lambda s: s.get("reason") == "KubeRayUnavailable", seconds=30)
        assert job["status"]["phase"] == "Pending"
        assert "install it" in job["status"]["message"]
        operator = pid_of(bare, "operator")
        bare.up(parts.TRAINING)
        status = kubectl.finished("early")
        assert status["phase"] == "Succeeded", status["message"]
        assert pid_of(bare, "operator") == operator, "the operator was restarted"
    finally:
        bare.down()

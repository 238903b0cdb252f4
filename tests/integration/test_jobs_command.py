"""`finetune jobs` as a user starts it, against a real API server; the statuses are written by the tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_local.cluster import Cluster
from tests.clients import Kubectl
from tests.clusters import API_SERVER, api_server, pid_of
from tests.commands import Command
from tests.integration.bad_jobs import GOOD

pytestmark = pytest.mark.integration

ARTIFACT = {
    "uri": "s3://b/good",
    "digest": "sha256:ab",
    "sizeBytes": 1500,
    "baseModel": "hf://a/b",
    "rank": 16,
}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An API server without the operator."""
    with api_server(tmp_path_factory.mktemp("api-server")) as running:
        yield running


class Jobs(Command):
    """Runs `finetune jobs` in the test's namespace, and plays the operator."""

    def set_status(self, **status: Any) -> None:
        patch = json.dumps({"status": status})
        self.kubectl("patch", "ftj", "good", "--subresource=status", "--type=merge", "-p", patch)

    def watch(self, *arguments: str) -> subprocess.Popen[str]:
        """A watch that has shown its first line."""
        process = self.start("watch", "good", *arguments)
        assert process.stdout is not None
        assert "Pending" in process.stdout.readline()
        return process


@pytest.fixture
def jobs(kubectl: Kubectl) -> Jobs:
    return Jobs("jobs", kubectl)


def progress(step: int) -> dict[str, Any]:
    return {"step": step, "totalSteps": 10, "percent": step * 10, "summary": f"{step * 10}%"}


def test_watch_follows_to_success(jobs: Jobs) -> None:
    jobs.kubectl.apply(GOOD)
    process = jobs.watch()
    jobs.set_status(phase="Running", progress=progress(3), metrics={"loss": 1.5})
    jobs.set_status(phase="Running", progress=progress(7), metrics={"loss": 0.5})
    jobs.set_status(phase="Succeeded", artifact=ARTIFACT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    lines = [line[10:] for line in out.splitlines()]
    assert "Running  3/10 30%  loss 1.5" in lines
    assert "Running  7/10 70%  loss 0.5" in lines
    assert "artifact  s3://b/good" in out
    assert "adapter of rank 16, 1.5 kB, sha256:ab" in out


def test_watch_of_a_failed_job_ends_with_1_and_the_message(jobs: Jobs) -> None:
    jobs.kubectl.apply(GOOD)
    jobs.set_status(phase="Failed", reason="BadData", message="line 17 is broken")
    text = jobs("watch", "good", code=1)
    assert "good: Failed (BadData)" in text
    assert "line 17 is broken" in text


def test_watch_as_json_prints_only_the_status(jobs: Jobs) -> None:
    jobs.kubectl.apply(GOOD)
    jobs.set_status(phase="Succeeded", artifact=ARTIFACT)
    process = jobs.start("watch", "good", "-o", "json")
    out, _ = process.communicate(timeout=60)
    assert json.loads(out)["artifact"] == ARTIFACT
    assert process.returncode == 0


def test_watch_gives_up_in_time(jobs: Jobs) -> None:
    jobs.kubectl.apply(GOOD)
    began = time.monotonic()
    assert "has not ended within 2s" in jobs("watch", "good", "--timeout", "2s", code=124)
    assert 2 <= time.monotonic() - began < 12


def test_watch_survives_the_api_server(jobs: Jobs, cluster: Cluster) -> None:
    jobs.kubectl.apply(GOOD)
    process = jobs.watch()
    os.kill(pid_of(cluster, "kube-apiserver"), signal.SIGKILL)
    time.sleep(2)
    assert process.poll() is None
    cluster.up(API_SERVER)
    jobs.set_status(phase="Succeeded", artifact=ARTIFACT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "the API server does not answer; the job goes on" in out
    assert "artifact  s3://b/good" in out


def test_watch_ends_when_the_job_is_deleted(jobs: Jobs) -> None:
    jobs.kubectl.apply(GOOD)
    process = jobs.watch()
    jobs.kubectl("delete", "ftj", "good")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "good was deleted" in err


def test_interrupting_a_watch_leaves_the_job_alone(jobs: Jobs) -> None:
    jobs.kubectl.apply(GOOD)
    process = jobs.watch()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "good goes on" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("command", ["watch", "describe"])
def test_job_that_does_not_exist(jobs: Jobs, command: str) -> None:
    assert f"no FineTuneJob nope in namespace {jobs.kubectl.namespace}" in jobs(command, "nope", code=2)


def test_list_as_table_and_json(jobs: Jobs) -> None:
    assert "No FineTuneJobs in namespace" in jobs("list")
    jobs.kubectl.apply(GOOD)
    jobs.set_status(phase="Running", progress=progress(3), metrics={"loss": 1.5})
    header, row = jobs("list").splitlines()
    assert header.split()[:3] == ["NAME", "PHASE", "METHOD"]
    assert row.split()[:6] == ["good", "Running", "LoRA", "hf://organization/model", "30%", "1.5"]
    (item,) = json.loads(jobs("list", "-o", "json"))
    assert item["metadata"]["name"] == "good"
    assert "managedFields" not in item["metadata"]
    assert jobs.kubectl.namespace in jobs("list", "-A")


@pytest.mark.parametrize("command", [["list"], ["watch", "good", "--timeout", "10s"]])
def test_output_to_a_full_disk_is_told_as_that(jobs: Jobs, command: list[str]) -> None:
    jobs.kubectl.apply(GOOD)
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        process = jobs.start(*command, stdout=full)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (2, "error: the output cannot be written: No space left on device\n")


def test_describe_shows_events(jobs: Jobs) -> None:
    jobs.kubectl.apply(GOOD)
    jobs.set_status(phase="Pending", reason="KubeRayUnavailable", message="KubeRay is not installed")
    uid = jobs.kubectl.job("good")["metadata"]["uid"]
    jobs.kubectl.apply(
        {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": "good.1"},
            "involvedObject": {
                "kind": "FineTuneJob",
                "name": "good",
                "uid": uid,
                "namespace": jobs.kubectl.namespace,
            },
            "type": "Warning",
            "reason": "KubeRayUnavailable",
            "message": "the CRD is missing",
            "lastTimestamp": "2026-01-01T00:00:00Z",
        }
    )
    page = jobs("describe", "good")
    assert "Pending (KubeRayUnavailable)" in page
    assert "Why\n  KubeRay is not installed" in page
    assert "Warning KubeRayUnavailable: the CRD is missing" in page


def test_validate_a_good_file_creates_nothing(jobs: Jobs, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(json.dumps(GOOD), encoding="utf-8")
    assert jobs("validate", "-f", str(file)) == f"{file}: FineTuneJob good: valid\n"
    assert jobs.kubectl.items("ftj") == []


def test_validate_says_spelling_and_values_at_once(jobs: Jobs) -> None:
    bad = {**GOOD, "spec": {**GOOD["spec"], "objective": "PPO", "hyperparameters": {"learning_rate": 1e-4}}}
    text = jobs("validate", "-f", "-", text=json.dumps(bad), code=1)
    assert "-: FineTuneJob good: not valid" in text
    assert "spec.hyperparameters.learning_rate: unknown field; did you mean learningRate?" in text
    assert 'spec.objective: "PPO": PPO was removed from TRL; use its successors RLOO or GRPO' in text


def test_validate_knows_what_a_started_job_forbids(jobs: Jobs) -> None:
    jobs.kubectl.apply(GOOD)
    attempt = {"number": 1, "rayJob": "good-a1", "startTime": "2026-01-01T00:00:00Z"}
    jobs.set_status(phase="Running", attempts=[attempt])
    assert ": valid" in jobs("validate", "-f", "-", text=json.dumps(GOOD))
    other = {**GOOD, "spec": {**GOOD["spec"], "method": {"type": "Full"}}}
    text = jobs("validate", "-f", "-", text=json.dumps(other), code=1)
    assert "spec: Forbidden: the spec cannot be changed once the first attempt was started" in text


@pytest.mark.parametrize(
    ("content", "problem"),
    [("kind: [", "not YAML"), ("kind: Secret", "holds no FineTuneJob"), (None, "No such file")],
)
def test_validate_of_a_file_that_cannot_be_read(
    jobs: Jobs, tmp_path: Path, content: str | None, problem: str
) -> None:
    file = tmp_path / "job.yaml"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    assert problem in jobs("validate", "-f", str(file), code=2)


def test_wrong_api_version(jobs: Jobs) -> None:
    text = jobs("validate", "-f", "-", text=json.dumps({**GOOD, "apiVersion": "finetune.dev/v1"}), code=1)
    assert "write finetune.dev/v1alpha1" in text


def test_no_cluster(jobs: Jobs, tmp_path: Path) -> None:
    assert "finetune local up" in jobs("list", "--kubeconfig", str(tmp_path / "none"), code=2)
    nowhere = json.loads(jobs.kubectl("config", "view", "--raw", "-o", "json"))
    nowhere["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:9"
    (tmp_path / "config").write_text(json.dumps(nowhere), encoding="utf-8")
    text = jobs("watch", "good", "--kubeconfig", str(tmp_path / "config"), code=2)
    assert "https://127.0.0.1:9 does not answer" in text

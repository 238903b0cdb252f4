"""The endpoint that trainers report to, with real tokens of a real API server."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_local.cluster import Cluster
from tests.clients import Kubectl, finetunejob

pytestmark = pytest.mark.integration

Post = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def waiting_job(kubectl: Kubectl, tiny_model: Path, tiny_rows: Path) -> str:
    """A job that waits for room for ever: its attempt is recorded, and nothing else reports for it."""
    resources = {"cpu": "1000", "memory": "1Gi"}
    kubectl.apply(finetunejob("waits", tiny_model, tiny_rows, resources=resources))
    kubectl.wait_job("waits", lambda s: bool(s.get("attempts", [{}])[-1].get("uid")), seconds=60)
    return "waits"


@pytest.fixture
def post(cluster: Cluster, namespace: str) -> Post:
    """Post a body for a job's attempt; returns the HTTP status and the answer."""
    port = cluster.ports["operator-status"]

    def send(
        job: str, token: str | None, body: bytes | dict[str, Any], *, attempt: int = 1
    ) -> tuple[int, Any]:
        url = (
            f"http://127.0.0.1:{port}/v1/namespaces/{namespace}/finetunejobs/{job}/attempts/{attempt}/status"
        )
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(url, data=data, method="POST")
        if token is not None:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    return send


def token(kubectl: Kubectl, job: str, *, audience: str | None = None) -> str:
    uid = kubectl.job(job)["metadata"]["uid"]
    return kubectl(
        "create", "token", "default", f"--audience={audience or f'finetune.dev/jobs/{uid}'}"
    ).strip()


PROGRESS = {
    "trainerStatus": {
        "progressPercentage": 40,
        "estimatedRemainingSeconds": 90,
        "metrics": [{"name": "loss", "value": "1.25"}],
    },
    "finetune": {"phase": "Training", "step": 4, "totalSteps": 10, "tokensPerSecond": 50.0},
}


def test_progress_reaches_the_status(kubectl: Kubectl, waiting_job: str, post: Post) -> None:
    assert post(waiting_job, token(kubectl, waiting_job), PROGRESS) == (200, {"accepted": True})
    status = kubectl.wait_job(waiting_job, lambda s: "progress" in s, seconds=30)["status"]
    assert (status["phase"], status["progress"]["summary"], status["progress"]["eta"]) == (
        "Running",
        "40%",
        "1m30s",
    )
    assert status["metrics"]["loss"] == 1.25


def test_what_kubeflows_callback_sends_is_understood(kubectl: Kubectl, waiting_job: str, post: Post) -> None:
    metrics = [{"name": "current_step", "value": "3"}, {"name": "total_steps", "value": "12"}]
    body = {
        "trainerStatus": {
            "progressPercentage": 25,
            "metrics": metrics,
            "lastUpdatedTime": "2026-01-01T00:00:00Z",
        }
    }
    assert post(waiting_job, token(kubectl, waiting_job), body)[0] == 200
    status = kubectl.wait_job(waiting_job, lambda s: "progress" in s, seconds=30)["status"]
    assert (status["progress"]["step"], status["progress"]["totalSteps"]) == (3, 12)


def test_a_result_is_stored_before_it_is_acknowledged_and_is_final(
    kubectl: Kubectl, waiting_job: str, post: Post
) -> None:
    result = {"class": "BadData", "exitCode": 65, "message": "train.jsonl line 17: not JSON", "step": 0}
    mine = token(kubectl, waiting_job)
    assert post(waiting_job, mine, {"finetune": {"result": result}})[0] == 200
    assert "line 17" in kubectl.job(waiting_job)["status"]["message"]
    # The pods never ran, so KubeRay waits: the RayJob is taken down first.
    status = kubectl.wait_job(waiting_job, lambda s: s["phase"] == "Failed", seconds=30)["status"]
    assert (status["reason"], "line 17" in status["message"]) == ("BadData", True)
    code, answer = post(
        waiting_job, mine, {"finetune": {"result": result | {"class": "Internal", "exitCode": 1}}}
    )
    assert (code, "over" in answer["error"]) == (409, True)
    assert kubectl.job(waiting_job)["status"]["reason"] == "BadData"


def test_only_the_jobs_own_token_is_good(kubectl: Kubectl, waiting_job: str, post: Post) -> None:
    for bad in (None, "nonsense", token(kubectl, waiting_job, audience="finetune.dev/jobs/other")):
        assert post(waiting_job, bad, PROGRESS)[0] == 401
    cluster_token = kubectl("create", "token", "default").strip()
    assert post(waiting_job, cluster_token, PROGRESS)[0] == 401
    assert "progress" not in kubectl.job(waiting_job)["status"]


def test_a_token_from_another_namespace_is_not_good(kubectl: Kubectl, waiting_job: str, post: Post) -> None:
    uid = kubectl.job(waiting_job)["metadata"]["uid"]
    audience = f"--audience=finetune.dev/jobs/{uid}"
    foreign = kubectl("create", "token", "default", "--namespace=kube-system", audience).strip()
    assert post(waiting_job, foreign, PROGRESS)[0] == 401


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"not json", 400),
        (b'{"trainerStatus": {"progressPercentage": 400}}', 400),
        (b'{"finetune": {"result": {"class": "Succeeded", "exitCode": 0}}}', 400),
        (b" " * 70_000, 413),
    ],
    ids=["not-json", "out-of-range", "success-without-artifact", "too-large"],
)
def test_a_bad_body_is_refused_with_a_reason(
    body: bytes, code: int, kubectl: Kubectl, waiting_job: str, post: Post
) -> None:
    answered, answer = post(waiting_job, token(kubectl, waiting_job), body)
    assert answered == code
    assert answer["error"]


def test_an_unknown_job_is_not_found(kubectl: Kubectl, waiting_job: str, post: Post) -> None:
    assert post("nobody", token(kubectl, waiting_job), PROGRESS)[0] == 404


def test_the_operator_tells_prometheus_about_the_job(
    cluster: Cluster, kubectl: Kubectl, waiting_job: str, post: Post
) -> None:
    post(waiting_job, token(kubectl, waiting_job), PROGRESS)
    kubectl.wait_job(waiting_job, lambda s: "progress" in s, seconds=30)
    series = f'{{finetunejob="{waiting_job}",namespace="{kubectl.namespace}"}}'
    text = scrape(cluster, "/metrics")
    assert f"finetune_job_loss{series} 1.25" in text
    assert f"finetune_job_progress_ratio{series} 0.4" in text
    assert scrape(cluster, "/healthz") == "ok\n"
    kubectl("delete", "ftj", waiting_job)
    assert series not in eventually_without(cluster, series)


def scrape(cluster: Cluster, path: str) -> str:
    with urllib.request.urlopen(
        f"http://127.0.0.1:{cluster.ports['operator-metrics']}{path}", timeout=10
    ) as answer:
        return str(answer.read().decode())


def eventually_without(cluster: Cluster, series: str) -> str:
    for _ in range(50):
        text = scrape(cluster, "/metrics")
        if series not in text:
            break
    return text

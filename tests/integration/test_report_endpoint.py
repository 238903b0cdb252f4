"""The endpoint for reports over TLS, with real tokens: what a job may do, how often, and what it may not."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.rayjob_player import progress
from finetune_local import certificates
from finetune_local.cluster import Cluster
from tests import namespaces
from tests.clients import Kubectl
from tests.integration.operators import Operator, played_cluster, small_job
from tests.waiting import wait_until

pytestmark = pytest.mark.integration


class Endpoint:
    """An operator that speaks TLS, and a job of it whose attempt is recorded and never runs."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.kubectl = Kubectl(cluster.kubeconfig, "reports")
        self.kubectl("create", "namespace", "reports")
        # Its tokens are the trainers'.
        wait_until(lambda: self.kubectl.get("serviceaccount", "default") is not None, seconds=60)
        self.folder = folder
        certificates.ensure(folder)
        pair = certificates.pair(folder, "kube-apiserver")
        self.operator = Operator(
            folder / "operator",
            cluster.layout.user_kubeconfig("operator"),
            "reports",
            FINETUNE_TLS_CERT_FILE=str(pair.certificate),
            FINETUNE_TLS_KEY_FILE=str(pair.key),
            FINETUNE_TLS_CA_FILE=str(folder / "ca.crt"),
            FINETUNE_STATUS_URL="https://127.0.0.1:1",
            HOME="/",
        )
        if namespaces.are_allowed():  # as in a pod, whose user has no name
            self.operator.program[:0] = ["unshare", "--user", "--map-user=65532"]
        self.operator.start()
        wait_until(lambda: self.operator.get("/healthz") == "ok\n", seconds=30)

    def apply(self, name: str) -> str:
        """The job's UID, once its RayJob is there."""
        self.kubectl.apply(small_job(name))
        wait_until(lambda: self.kubectl.get("rayjob", f"{name}-a1") is not None, seconds=30)
        return str(self.kubectl.job(name)["metadata"]["uid"])

    def token(self, uid: str, *, namespace: str = "reports") -> str:
        audience = f"--audience=finetune.dev/jobs/{uid}"
        return self.kubectl("create", "token", "default", f"--namespace={namespace}", audience).strip()

    def post(
        self, job: str, token: str, body: Any, *, ca: Path | None = None
    ) -> tuple[int, dict[str, str], Any]:
        port = self.operator.ports["status"]
        url = f"https://127.0.0.1:{port}/v1/namespaces/reports/finetunejobs/{job}/attempts/1/status"
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            url, data=data, method="POST", headers={"Authorization": f"Bearer {token}"}
        )
        context = ssl.create_default_context(cafile=str(ca or self.folder / "ca.crt"))
        try:
            with urllib.request.urlopen(request, timeout=30, context=context) as answer:
                return answer.status, dict(answer.headers), json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers), json.loads(error.read())


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    with played_cluster(tmp_path_factory.mktemp("api")) as cluster:
        running = Endpoint(cluster, tmp_path_factory.mktemp("endpoint"))
        yield running
        running.operator.kill()


def test_a_jobs_pod_gets_the_authority_that_proves_the_endpoint(endpoint: Endpoint, tmp_path: Path) -> None:
    uid = endpoint.apply("trusting")
    settings = endpoint.kubectl.get("configmap", "trusting-a1") or {}
    authority = tmp_path / "from-the-config-map.crt"
    authority.write_text(settings["data"]["ca.crt"])
    rayjob = endpoint.kubectl.get("rayjob", "trusting-a1") or {}
    head = rayjob["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    environment = {item["name"]: item["value"] for item in head["env"]}
    assert environment["KUBEFLOW_TRAINER_SERVER_CA_CERT"] == "/etc/finetune/ca.crt"
    assert environment["KUBEFLOW_TRAINER_SERVER_URL"].startswith("https://")
    code, _, answer = endpoint.post("trusting", endpoint.token(uid), progress(1, 2), ca=authority)
    assert (code, answer) == (200, {"accepted": True})


def test_a_renewed_certificate_reaches_running_and_new_jobs(endpoint: Endpoint, tmp_path: Path) -> None:
    uid = endpoint.apply("before")
    old = (endpoint.folder / "ca.crt").read_text()
    certificates.ensure(tmp_path)
    pair = certificates.pair(tmp_path, "kube-apiserver")
    used = certificates.pair(endpoint.folder, "kube-apiserver")
    (endpoint.folder / "ca.crt").write_text(old + (tmp_path / "ca.crt").read_text())
    for source, target in ((pair.certificate, used.certificate), (pair.key, used.key)):
        fresh = target.with_suffix(".new")
        fresh.write_bytes(source.read_bytes())
        fresh.replace(target)

    def is_renewed() -> bool:
        try:
            return (
                endpoint.post("before", endpoint.token(uid), progress(1, 2), ca=tmp_path / "ca.crt")[0] == 200
            )
        except urllib.error.URLError:
            return False

    wait_until(is_renewed, seconds=30, what="the renewed certificate is not in use")
    endpoint.apply("after")
    settings = endpoint.kubectl.get("configmap", "after-a1") or {}
    assert settings["data"]["ca.crt"] == (endpoint.folder / "ca.crt").read_text()


def test_a_job_cannot_report_for_another(endpoint: Endpoint) -> None:
    mine, other = endpoint.apply("mine"), endpoint.apply("other")
    assert endpoint.post("other", endpoint.token(mine), progress(1, 2))[0] == 401
    assert endpoint.post("mine", endpoint.token(mine), progress(1, 2))[0] == 200
    assert endpoint.post("mine", endpoint.token(other), progress(1, 2))[0] == 401
    stranger = endpoint.token(mine, namespace="kube-system")
    assert endpoint.post("mine", stranger, progress(1, 2))[0] == 401
    forged = endpoint.token(mine)[:-8] + "AAAAAAAA"
    assert endpoint.post("mine", forged, progress(1, 2))[0] == 401
    assert "progress" not in endpoint.kubectl.job("other")["status"]


def test_a_trainer_of_a_deleted_job_says_nothing_about_its_namesake(endpoint: Endpoint) -> None:
    former = endpoint.token(endpoint.apply("again"))
    assert endpoint.post("again", former, progress(1, 2))[0] == 200
    endpoint.kubectl("delete", "ftj", "again")
    wait_until(lambda: endpoint.kubectl.get("rayjob", "again-a1") is None, seconds=30)
    uid = endpoint.apply("again")
    failed = {"finetune": {"result": {"class": "BadData", "exitCode": 65, "message": "from the grave"}}}
    assert endpoint.post("again", former, failed)[0] in (401, 409)
    endpoint.post("again", former, progress(1, 2))
    assert endpoint.post("again", endpoint.token(uid), progress(1, 4))[0] == 200
    found = endpoint.kubectl.wait_job("again", lambda s: "progress" in s, seconds=20)["status"]
    assert (found["phase"], found["progress"]["totalSteps"]) == ("Running", 4)


def test_connections_that_anybody_may_open_are_no_danger_to_the_memory(endpoint: Endpoint) -> None:
    """2,000 of them must fit into the chart's limit of 512 MiB."""
    assert endpoint.operator.process is not None
    process = psutil.Process(endpoint.operator.process.pid)
    context = ssl.create_default_context(cafile=str(endpoint.folder / "ca.crt"))
    address = ("127.0.0.1", endpoint.operator.ports["status"])
    before = process.memory_info().rss
    with contextlib.ExitStack() as stack:
        for _ in range(400):
            plain = stack.enter_context(socket.create_connection(address, timeout=30))
            stack.enter_context(context.wrap_socket(plain, server_hostname="127.0.0.1"))
        each = (process.memory_info().rss - before) / 400
    assert each < 180_000, "bytes of memory for each connection"


def test_a_job_that_talks_too_much_is_told_when_to_come_back_and_others_are_not_hurt(
    endpoint: Endpoint,
) -> None:
    loud, calm = endpoint.apply("loud"), endpoint.apply("calm")
    mine = endpoint.token(loud)
    answers = [endpoint.post("loud", mine, progress(1, 2)) for _ in range(40)]
    refused = [(headers, answer) for code, headers, answer in answers if code == 429]
    assert refused, "never told to slow down"
    assert {code for code, _, _ in answers} == {200, 429}
    assert refused[0][0]["Retry-After"] == "1"
    assert "reports per second" in refused[0][1]["error"]
    assert endpoint.post("calm", endpoint.token(calm), progress(1, 2))[0] == 200
    # Somebody without a token of the job cannot use up what the job may send.
    for _ in range(40):
        assert endpoint.post("calm", mine, progress(1, 2))[0] == 401
    assert endpoint.post("calm", endpoint.token(calm), progress(1, 2))[0] == 200
    time.sleep(1.5)
    assert endpoint.post("loud", mine, progress(1, 2))[0] == 200


@pytest.mark.parametrize(
    ("body", "named"),
    [
        (b"", "body"),
        (b"null", "body"),
        (b"[1]", "body"),
        (b"\xff\xfe", "body"),
        (b"[" * 5000, "body"),
        ({"finetune": {"step": -1}}, "finetune.step"),
        ({"finetune": {"step": 1e400}}, "finetune.step"),
        ({"finetune": {"phase": "Dreaming"}}, "finetune.phase"),
        ({"trainerStatus": {"progressPercentage": "many"}}, "trainerStatus.progressPercentage"),
        ({"trainerStatus": {"metrics": [{"name": "x" * 200, "value": "1"}]}}, "trainerStatus.metrics.0.name"),
        ({"trainerStatus": {"metrics": [{"name": "a", "value": "1"}] * 65}}, "trainerStatus.metrics"),
        ({"finetune": {"result": {"class": "Magic", "exitCode": 0}}}, "finetune.result.class"),
        # Each brought another attempt at once, out of no budget.
        (
            {"finetune": {"result": {"class": "Suspended", "exitCode": 75}}},
            "finetune.result.class: Suspended",
        ),
        ({"finetune": {"result": {"class": "Checked", "exitCode": 0}}}, "finetune.result.class: Checked"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_what_is_wrong_with_a_body_is_named(endpoint: Endpoint, body: Any, named: str) -> None:
    uid = getattr(endpoint, "named_uid", None) or endpoint.apply("named")
    endpoint.named_uid = uid  # type: ignore[attr-defined]
    code, _, answer = endpoint.post("named", endpoint.token(uid), body)
    if code == 429:
        time.sleep(1.0)
        code, _, answer = endpoint.post("named", endpoint.token(uid), body)
    assert code == 400, answer
    assert answer["error"].startswith(named)

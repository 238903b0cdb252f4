"""What a RayJob gets on the laptop cluster: environment, volumes, tokens, its exit code, and an end with its pod."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from finetune_local import kubeapi
from finetune_local.cluster import Cluster
from tests.integration.rayjobs import RAY_JOBS, rayjob, submit, wait_for_end
from tests.waiting import wait_until

pytestmark = pytest.mark.integration

BASE = "/api/v1/namespaces/default"
AUDIENCE = "finetune.dev/jobs/1234"
PASSWORD = "hidden-7391"
# Writes down what it sees, then waits for a file `go`.
PROGRAM = """
import json, os, pathlib, time
seen = dict(os.environ)
seen |= {"file": open(seen["RUN"]).read(), "token": open(seen["TOKEN"]).read(), "cwd": os.getcwd()}
seen["licence"] = open(seen["VOLUMES"] + "/files/LICENSE").read()
out = pathlib.Path(FOLDER)
(out / "part").write_text(json.dumps(seen))
(out / "part").rename(out / "seen.json")
while not (out / "go").exists():
    time.sleep(0.1)
"""


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> kubeapi.ApiClient:
    return cluster.client()


def review_token(client: kubeapi.ApiClient, token: str, audience: str) -> dict[str, Any]:
    body = {
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenReview",
        "spec": {"token": token, "audiences": [audience]},
    }
    status: dict[str, Any] = client.call("POST", "/apis/authentication.k8s.io/v1/tokenreviews", body)[
        "status"
    ]
    return status


@pytest.fixture
def promises(client: kubeapi.ApiClient, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A RayJob whose pod template asks for everything that a training pod gets, and the objects that it names."""
    meta = {"name": "promises", "namespace": "default"}
    config = {"run.json": '{"a": 1}', "word": "w1"}
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": meta, "stringData": {"PASSWORD": PASSWORD}}
    client.apply(
        f"{BASE}/configmaps/promises",
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": config},
    )
    client.apply(f"{BASE}/secrets/promises", secret)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace("FOLDER", repr(str(tmp_path))))
    token = {"serviceAccountToken": {"audience": AUDIENCE, "path": "token", "expirationSeconds": 3600}}
    job = rayjob(
        "promises",
        f"python {program}",
        container={
            "env": [
                {"name": "WORD", "valueFrom": {"configMapKeyRef": {"name": "promises", "key": "word"}}},
                {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
                {"name": "RUN", "value": "/etc/finetune/run.json"},
                {"name": "TOKEN", "value": "/var/run/secrets/finetune.dev/token"},
                {"name": "VOLUMES", "value": "/mnt/finetune"},
                {"name": "KEPT", "value": "from the pod"},
            ],
            "envFrom": [{"secretRef": {"name": "promises"}}],
            "volumeMounts": [
                {"name": "run", "mountPath": "/etc/finetune"},
                {"name": "token", "mountPath": "/var/run/secrets/finetune.dev"},
                {"name": "files", "mountPath": "/mnt/finetune/files"},
            ],
        },
        volumes=[
            {"name": "run", "configMap": {"name": "promises"}},
            {"name": "token", "projected": {"sources": [token]}},
            {"name": "files", "persistentVolumeClaim": {"claimName": "files"}},
        ],
    )
    job["spec"]["runtimeEnvYAML"] = "env_vars:\n  KEPT: from the submission\n"
    yield job
    for plural in ("configmaps", "secrets"):
        client.call("DELETE", f"{BASE}/{plural}/promises")


def test_a_job_gets_what_its_pod_template_promises(
    cluster: Cluster, client: kubeapi.ApiClient, promises: dict[str, Any], tmp_path: Path
) -> None:
    submit(client, promises)
    folder = wait_until(
        lambda: next(cluster.layout.pods.glob("default.promises-*"), None), what="the private folder"
    )
    assert folder.stat().st_mode & 0o777 == 0o700
    wait_until((tmp_path / "seen.json").exists, what="the job's output")
    seen = json.loads((tmp_path / "seen.json").read_text())
    assert (seen["WORD"], seen["PASSWORD"], seen["KEPT"]) == ("w1", PASSWORD, "from the submission")
    assert seen["file"] == '{"a": 1}'
    assert "Apache License" in seen["licence"]
    assert seen["POD"].startswith("promises-")
    assert seen["cwd"] == f"{folder}/work"
    assert Path(seen["RUN"]).relative_to(folder).parts == ("root", "etc", "finetune", "run.json")
    review = review_token(client, seen["token"], AUDIENCE)
    assert review["authenticated"] is True
    assert review["user"]["username"] == "system:serviceaccount:default:default"
    assert review["user"]["extra"]["authentication.kubernetes.io/pod-name"] == [seen["POD"]]
    assert not review_token(client, seen["token"], "finetune.dev/jobs/another").get("authenticated")

    (tmp_path / "go").touch()
    assert wait_for_end(client, "promises")["jobStatus"] == "SUCCEEDED"
    wait_until(lambda: not folder.exists(), what="the private folder goes")
    assert_in_no_log(cluster, PASSWORD)


def assert_in_no_log(cluster: Cluster, secret: str) -> None:
    identity = json.loads(cluster.layout.instance.read_text())["identity"]
    ray_logs = cluster.layout.ray_folder(identity) / "session_latest" / "logs"
    for path in (*ray_logs.rglob("*"), *cluster.layout.logs.iterdir()):
        if path.is_file():
            assert secret.encode() not in path.read_bytes(), path


def test_the_exit_code_reaches_the_status(client: kubeapi.ApiClient) -> None:
    submit(client, rayjob("exits", "echo broken data; exit 65"))
    status = wait_for_end(client, "exits")
    assert status["jobStatus"] == "FAILED"
    assert status["message"].startswith("Job entrypoint command failed with exit code 65")


def test_a_missing_secret_is_told_and_healed(client: kubeapi.ApiClient) -> None:
    submit(client, rayjob("waits", "true", container={"envFrom": [{"secretRef": {"name": "later"}}]}))

    def told() -> list[str]:
        events = client.call("GET", "/api/v1/namespaces/default/events")["items"]
        messages = [e["message"] for e in events if e["involvedObject"]["name"].startswith("waits-")]
        return [message for message in messages if "Secret later does not exist" in message]

    assert wait_until(told, what="a warning about the Secret")
    client.apply(
        "/api/v1/namespaces/default/secrets/later",
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "later"}, "stringData": {"A": "b"}},
    )
    assert wait_for_end(client, "waits")["jobStatus"] == "SUCCEEDED"


def test_deleting_a_running_job_ends_its_processes_before_its_pod(
    client: kubeapi.ApiClient, tmp_path: Path
) -> None:
    pid_file = tmp_path / "pid"
    # The program takes SIGTERM calmly and needs a second to go: the pod must wait for it.
    code = f"trap 'sleep 1; exit 0' TERM; echo $$ > {pid_file}; while true; do sleep 0.1; done"
    submit(client, rayjob("deleted", code))
    pid = int(wait_until(lambda: pid_file.read_text().strip(), what="the job's pid"))
    assert psutil.pid_exists(pid)
    client.call("DELETE", f"{RAY_JOBS}/deleted")

    def pods() -> list[Any]:
        items: list[Any] = client.call("GET", "/api/v1/namespaces/default/pods")["items"]
        return [pod for pod in items if pod["metadata"]["name"].startswith("deleted-")]

    wait_until(lambda: not pods(), seconds=20, what="the pods go")
    assert not psutil.pid_exists(pid)

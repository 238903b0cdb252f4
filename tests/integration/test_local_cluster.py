"""The laptop cluster as a user has it: real processes, real RayJobs, in a state folder of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from finetune_local import cluster as clusters
from finetune_local import kubeapi, parts, processes

pytestmark = pytest.mark.integration
RAY_JOBS = "/apis/ray.io/v1/namespaces/default/rayjobs"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[clusters.Cluster]:
    folder = tmp_path_factory.mktemp("files")
    (folder / "hello.txt").write_text("hello from the files volume")
    one = clusters.Cluster(tmp_path_factory.mktemp("state") / "local", files=folder)
    try:
        one.up()
        yield one
    finally:
        one.down(purge=True)


@pytest.fixture(scope="module")
def client(cluster: clusters.Cluster) -> kubeapi.ApiClient:
    return cluster.client()


def wait_for(what: str, check: Callable[[], Any], *, seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := check()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.2)
    return value


def rayjob(name: str, entrypoint: str, **pod: Any) -> dict[str, Any]:
    container = {
        "name": "ray-head",
        "image": "none",
        "resources": {"limits": {"cpu": "500m", "memory": "512Mi"}},
        **pod.pop("container", {}),
    }
    spec = {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 5,
        "containers": [container],
        **pod,
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "submissionMode": "HTTPMode",
            "entrypoint": entrypoint,
            "shutdownAfterJobFinishes": True,
            "backoffLimit": 0,
            "rayClusterSpec": {
                "rayVersion": "2.60.0",
                "headGroupSpec": {"rayStartParams": {}, "template": {"spec": spec}},
            },
        },
    }


def submit(client: kubeapi.ApiClient, job: dict[str, Any]) -> None:
    client.call("POST", RAY_JOBS, job)


def status_of(client: kubeapi.ApiClient, name: str) -> dict[str, Any]:
    found = client.get(f"{RAY_JOBS}/{name}") or {}
    status: dict[str, Any] = found.get("status", {})
    return status


def wait_for_end(client: kubeapi.ApiClient, name: str) -> dict[str, Any]:
    def ended() -> dict[str, Any] | None:
        status = status_of(client, name)
        return status if status.get("jobDeploymentStatus") in ("Complete", "Failed") else None

    ending: dict[str, Any] = wait_for(f"the end of RayJob {name}", ended, seconds=90)
    return ending


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


def our_processes(cluster: clusters.Cluster) -> list[psutil.Process]:
    identity = json.loads(cluster.layout.instance.read_text())["identity"]
    return processes.find_all(cluster.layout, identity, parts.ALL)


def test_everything_runs_and_listens_on_loopback_only(cluster: clusters.Cluster) -> None:
    assert {line.name: line.state for line in cluster.status()} == dict.fromkeys(
        parts.ALL, clusters.State.RUNNING
    )
    listening = [
        connection.laddr.ip
        for process in our_processes(cluster)
        for connection in process.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 15
    assert {address.removeprefix("::ffff:") for address in listening} == {"127.0.0.1"}


def test_secrets_of_the_cluster_are_private(cluster: clusters.Cluster) -> None:
    assert cluster.layout.root.stat().st_mode & 0o777 == 0o700
    for path in (*cluster.layout.pki.iterdir(), cluster.kubeconfig):
        assert path.stat().st_mode & 0o077 == 0, path


def test_a_second_up_changes_nothing(cluster: clusters.Cluster) -> None:
    before = {line.name: line.pid for line in cluster.status()}
    lines: list[str] = []
    cluster.up(report=lines.append)
    assert {line.name: line.pid for line in cluster.status()} == before
    assert lines == []


def test_the_operator_has_no_right_to_secrets(cluster: clusters.Cluster) -> None:
    server = f"https://127.0.0.1:{cluster.ports['kube-apiserver']}"
    operator = kubeapi.ApiClient(server, pki=cluster.layout.pki, user="operator")
    assert operator.call("GET", "/apis/finetune.dev/v1alpha1/finetunejobs")["kind"] == "FineTuneJobList"
    with pytest.raises(kubeapi.ApiError) as refusal:
        operator.call("GET", "/api/v1/namespaces/default/secrets")
    assert refusal.value.status == 403


def test_a_job_gets_what_its_pod_template_promises(
    cluster: clusters.Cluster, client: kubeapi.ApiClient, tmp_path: Path
) -> None:
    base = "/api/v1/namespaces/default"
    meta = {"name": "promises", "namespace": "default"}
    client.apply(
        f"{base}/configmaps/promises",
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": meta,
            "data": {"run.json": '{"a": 1}', "word": "w1"},
        },
    )
    client.apply(
        f"{base}/secrets/promises",
        {"apiVersion": "v1", "kind": "Secret", "metadata": meta, "stringData": {"PASSWORD": "hidden-7391"}},
    )
    out = tmp_path / "out.json"
    code = (
        "import os,json,time;"
        "e=os.environ;"
        f"json.dump(dict(word=e['WORD'],name=e['POD'],password=e['PASSWORD'],run=open(e['RUN']).read(),"
        "token=open(e['TOKEN']).read(),files=open(e['VOLUMES']+'/files/hello.txt').read(),cwd=os.getcwd(),"
        f"path=e['RUN'],kept=e['KEPT']),open({str(out)!r}+'.part','w'));os.rename({str(out)!r}+'.part',{str(out)!r})\n"
        f"while not os.path.exists({str(tmp_path / 'go')!r}): time.sleep(0.1)"
    )
    audience = "finetune.dev/jobs/1234"
    token = {"serviceAccountToken": {"audience": audience, "path": "token", "expirationSeconds": 3600}}
    job = rayjob(
        "promises",
        f'python -c "{code}"',
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
    submit(client, job)
    folder = wait_for(
        "the private folder", lambda: next(cluster.layout.pods.glob("default.promises-*"), None)
    )
    assert folder.stat().st_mode & 0o777 == 0o700
    wait_for("the job's output", out.exists)
    seen = json.loads(out.read_text())
    assert seen["word"] == "w1"
    assert seen["run"] == '{"a": 1}'
    assert seen["password"] == "hidden-7391"
    assert seen["files"] == "hello from the files volume"
    assert seen["kept"] == "from the submission"
    assert seen["name"].startswith("promises-")
    assert seen["cwd"] == f"{folder}/work"
    assert seen["path"].startswith(f"{folder}/root/")
    review = review_token(client, seen["token"], audience)
    assert review["authenticated"] is True
    assert review["user"]["username"] == "system:serviceaccount:default:default"
    assert review["user"]["extra"]["authentication.kubernetes.io/pod-name"] == [seen["name"]]
    assert not review_token(client, seen["token"], "finetune.dev/jobs/another").get("authenticated")

    (tmp_path / "go").touch()
    assert wait_for_end(client, "promises")["jobStatus"] == "SUCCEEDED"
    wait_for("the private folder to go", lambda: not folder.exists())
    ray = cluster.layout.ray_folder(json.loads(cluster.layout.instance.read_text())["identity"])
    for path in (*(ray / "session_latest" / "logs").rglob("*"), *cluster.layout.logs.iterdir()):
        if path.is_file():
            assert b"hidden-7391" not in path.read_bytes(), path


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

    assert wait_for("a warning about the Secret", told)
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
    pid = int(wait_for("the job's pid", lambda: pid_file.exists() and pid_file.read_text().strip()))
    assert psutil.pid_exists(pid)
    client.call("DELETE", f"{RAY_JOBS}/deleted")

    def pods() -> list[Any]:
        items: list[Any] = client.call("GET", "/api/v1/namespaces/default/pods")["items"]
        return [pod for pod in items if pod["metadata"]["name"].startswith("deleted-")]

    wait_for("the pods to go", lambda: not pods(), seconds=20)
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize("name", parts.ALL)
def test_up_brings_a_killed_part_back(
    cluster: clusters.Cluster, client: kubeapi.ApiClient, name: str
) -> None:
    base = "/api/v1/namespaces/default/configmaps/kept"
    meta = {"name": "kept", "namespace": "default"}
    client.apply(base, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {"before": name}})
    victim = next(line for line in cluster.status() if line.name == name)
    assert victim.pid is not None
    os.kill(victim.pid, signal.SIGKILL)

    def crashed() -> bool:
        return {line.name: line.state for line in cluster.status()}[name] is clusters.State.CRASHED

    wait_for("the crash to be seen", crashed, seconds=30)
    cluster.up()
    after = {line.name: line for line in cluster.status()}
    assert {line.state for line in after.values()} == {clusters.State.RUNNING}
    assert after[name].pid != victim.pid
    assert client.call("GET", base)["data"] == {"before": name}


@pytest.mark.parametrize("program", ["gcs_server", "raylet/raylet", "dashboard/dashboard.py"])
def test_up_brings_ray_back_when_one_of_its_processes_was_killed(
    cluster: clusters.Cluster, program: str
) -> None:
    victim = next(process for process in our_processes(cluster) if program in " ".join(process.cmdline()))
    victim.kill()
    cluster.up()
    assert {line.state for line in cluster.status()} == {clusters.State.RUNNING}
    fresh = [process for process in our_processes(cluster) if program in " ".join(process.cmdline())]
    assert fresh
    assert victim.pid not in {process.pid for process in fresh}


def test_jobs_run_after_all_that_killing(client: kubeapi.ApiClient) -> None:
    submit(client, rayjob("again", "echo fine"))
    assert wait_for_end(client, "again")["jobStatus"] == "SUCCEEDED"


def test_the_command_line_tells_what_runs(cluster: clusters.Cluster) -> None:
    state = ["--state", str(cluster.layout.root)]
    done = subprocess.run(
        [sys.executable, "-m", "finetune_cli", "local", "status", "--output", "json", *state],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = {line["name"]: line for line in json.loads(done.stdout)}
    assert set(lines) == set(parts.ALL)
    assert all(line["state"] == "Running" and line["uptime"] >= 0 for line in lines.values())
    log = subprocess.run(
        [sys.executable, "-m", "finetune_cli", "local", "logs", "ray-gateway", "--tail", "3", *state],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 1 <= len(log.stdout.splitlines()) <= 3


def test_down_leaves_no_process_and_keeps_the_data(cluster: clusters.Cluster) -> None:
    before = our_processes(cluster)
    assert len(before) >= len(parts.ALL)
    cluster.down()
    alive = [
        process for process in before if process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    ]
    assert alive == []
    assert our_processes(cluster) == []
    assert {line.state for line in cluster.status()} == {clusters.State.STOPPED}
    assert cluster.down() == []
    assert (cluster.layout.etcd / "member").is_dir()

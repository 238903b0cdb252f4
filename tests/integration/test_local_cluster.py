"""The laptop cluster's processes as a user has them: up, killed, up again, down; in a state folder of its own.

Only what trains: router and engine are in test_local_serving.py.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest

from finetune_local import cluster as clusters
from finetune_local import kubeapi, parts, processes
from tests.integration.rayjobs import rayjob, submit, wait_for_end
from tests.waiting import wait_until

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[clusters.Cluster]:
    one = clusters.Cluster(tmp_path_factory.mktemp("state") / "local")
    try:
        one.up(parts.TRAINING)
        yield one
    finally:
        one.down(purge=True)


@pytest.fixture(scope="module")
def client(cluster: clusters.Cluster) -> kubeapi.ApiClient:
    return cluster.client()


def our_processes(cluster: clusters.Cluster) -> list[psutil.Process]:
    identity = json.loads(cluster.layout.instance.read_text())["identity"]
    return processes.find_all(cluster.layout, identity, parts.ALL)


def states(cluster: clusters.Cluster) -> dict[str, clusters.State]:
    return {line.name: line.state for line in cluster.status() if line.name in parts.TRAINING}


def test_everything_runs_and_listens_on_loopback_only(cluster: clusters.Cluster) -> None:
    assert states(cluster) == dict.fromkeys(parts.TRAINING, clusters.State.RUNNING)
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
    cluster.up(parts.TRAINING, report=lines.append)
    assert {line.name: line.pid for line in cluster.status()} == before
    assert lines == []


def test_the_operator_has_no_right_to_secrets(cluster: clusters.Cluster) -> None:
    server = f"https://127.0.0.1:{cluster.ports['kube-apiserver']}"
    operator = kubeapi.ApiClient(server, pki=cluster.layout.pki, user="operator")
    assert operator.call("GET", "/apis/finetune.dev/v1alpha1/finetunejobs")["kind"] == "FineTuneJobList"
    with pytest.raises(kubeapi.ApiError) as refusal:
        operator.call("GET", "/api/v1/namespaces/default/secrets")
    assert refusal.value.status == 403


def processes_of_ray(cluster: clusters.Cluster, program: str) -> list[psutil.Process]:
    return [process for process in our_processes(cluster) if program in " ".join(process.cmdline())]


# Each kills parts that do not need one another, and one of Ray's processes: any of them alone brings Ray down.
ROUNDS = [
    (("etcd", "ray"), None),
    (("kube-apiserver",), "gcs_server"),
    (("kube-controller-manager", "kube-scheduler", "kwok"), "raylet/raylet"),
    (("ray-gateway", "kuberay", "operator"), "dashboard/dashboard.py"),
]


@pytest.mark.parametrize(("names", "program"), ROUNDS)
def test_up_brings_killed_parts_and_processes_of_ray_back(
    cluster: clusters.Cluster, client: kubeapi.ApiClient, names: tuple[str, ...], program: str | None
) -> None:
    base = "/api/v1/namespaces/default/configmaps/kept"
    meta = {"name": "kept", "namespace": "default"}
    kept = {"before": "-".join(names)}
    client.apply(base, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": kept})
    victims = {line.name: line.pid for line in cluster.status() if line.name in names}
    for pid in victims.values():
        assert pid is not None
        os.kill(pid, signal.SIGKILL)

    def crashed() -> bool:
        found = states(cluster)
        return all(found[name] is clusters.State.CRASHED for name in names)

    wait_until(crashed, seconds=30, what="the crash is seen")
    of_ray = processes_of_ray(cluster, program)[0] if program else None
    if of_ray is not None:
        of_ray.kill()
    cluster.up(parts.TRAINING)
    assert set(states(cluster).values()) == {clusters.State.RUNNING}
    now = {line.name: line.pid for line in cluster.status()}
    assert all(now[name] != pid for name, pid in victims.items())
    assert client.call("GET", base)["data"] == kept
    if program is not None:
        fresh = processes_of_ray(cluster, program)
        assert fresh
        assert of_ray not in fresh


def test_the_rounds_kill_every_part() -> None:
    assert {name for names, _ in ROUNDS for name in names} == set(parts.TRAINING)


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
    ours = [lines[name] for name in parts.TRAINING]
    assert all(line["state"] == "Running" and line["uptime"] >= 0 for line in ours)
    log = subprocess.run(
        [sys.executable, "-m", "finetune_cli", "local", "logs", "ray-gateway", "--tail", "3", *state],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 1 <= len(log.stdout.splitlines()) <= 3


def test_down_leaves_no_process_and_keeps_the_data(cluster: clusters.Cluster) -> None:
    before = our_processes(cluster)
    assert len(before) >= len(parts.TRAINING)
    cluster.down()
    alive = [
        process for process in before if process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    ]
    assert alive == []
    assert our_processes(cluster) == []
    assert set(states(cluster).values()) == {clusters.State.STOPPED}
    assert cluster.down() == []
    assert (cluster.layout.etcd / "member").is_dir()

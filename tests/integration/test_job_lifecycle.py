"""A FineTuneJob on the laptop cluster: real API server, real KubeRay, real Ray, real training of a tiny model."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from urllib.parse import urlparse

import pytest

from finetune_local.cluster import Cluster
from finetune_operator.adapters import kube
from tests.buckets import open_bucket, serve_bucket
from tests.clients import FINAL, Json, Kubectl, finetunejob

pytestmark = pytest.mark.integration


def watched_phases(kubectl: Kubectl, name: str, stop: threading.Event) -> list[str]:
    """Every phase that the job's status goes through until `stop`, in order, by polling."""
    phases: list[str] = []
    while not stop.is_set():
        phase = kubectl.job(name).get("status", {}).get("phase")
        if phase and (not phases or phases[-1] != phase):
            phases.append(phase)
        if phase in FINAL:
            return phases
        stop.wait(0.1)
    return phases


def condition(status: Json, kind: str) -> tuple[str, str] | None:
    return next(((c["status"], c["reason"]) for c in status["conditions"] if c["type"] == kind), None)


def test_apply_trains_and_publishes_an_artifact(kubectl: Kubectl, tiny_model: Path, tiny_rows: Path) -> None:
    hyperparameters = {"maxSteps": 250, "globalBatchSize": 16, "maxLength": 64, "learningRate": 0.005}
    job = finetunejob(
        "learns", tiny_model, tiny_rows, hyperparameters=hyperparameters, method={"type": "Full"}
    )
    kubectl.apply(job)
    phases = watched_phases(kubectl, "learns", threading.Event())
    status = kubectl.job("learns")["status"]
    assert phases[-1] == "Succeeded", status
    assert [p for p in phases if p in ("Provisioning", "Running", "Succeeded")] == [
        "Provisioning",
        "Running",
        "Succeeded",
    ]

    assert status["progress"]["step"] == status["progress"]["totalSteps"] == 250
    assert status["progress"]["summary"] == "100%"
    assert status["metrics"]["evalLoss"] < 0.5, "the tiny model did not learn the rule"
    assert condition(status, "Complete") == ("True", "ArtifactPublished")
    assert condition(status, "Failed") is None
    assert status["effective"]["trainRows"] + status["effective"]["evalRows"] == 320
    (attempt,) = status["attempts"]
    assert (attempt["rayJob"], attempt["class"], attempt["exitCode"]) == ("learns-a1", "Succeeded", 0)

    folder = Path(urlparse(status["artifact"]["uri"]).path)
    manifest_bytes = (folder / "manifest.json").read_bytes()
    manifest = json.loads(manifest_bytes)
    assert status["artifact"]["digest"] == "sha256:" + hashlib.sha256(manifest_bytes).hexdigest()
    for file in manifest["files"]:
        content = (folder / file["path"]).read_bytes()
        assert (file["sha256"], file["size"]) == (hashlib.sha256(content).hexdigest(), len(content))
    assert {"config.json", "model.safetensors", "README.md"} <= {f["path"] for f in manifest["files"]}

    reasons = [
        event["reason"]
        for event in sorted(kubectl.events("learns"), key=lambda e: int(e["metadata"]["resourceVersion"]))
    ]
    assert reasons[0] == "Provisioning"
    assert reasons[-1] == "ArtifactPublished"
    assert len(reasons) == len(set(reasons)), "each transition is told once"


def test_a_user_sees_progress_in_kubectl_get(kubectl: Kubectl, tiny_model: Path, tiny_rows: Path) -> None:
    qlora = {"type": "QLoRA", "lora": {"r": 8}, "quantization": {}}
    kubectl.apply(finetunejob("columns", tiny_model, tiny_rows, method=qlora))
    kubectl.finished("columns")
    header, row = kubectl("get", "ftj", "columns", "-o", "wide").splitlines()
    assert (
        " ".join(header.split())
        == "NAME PHASE METHOD MODEL PROGRESS LOSS AGE STEP ETA REASON MESSAGE ARTIFACT"
    )
    cells = row.split()
    assert cells[1:3] == ["Succeeded", "QLoRA"]
    assert cells[4] == "100%"
    assert float(cells[5]) > 0
    assert kubectl.job("columns")["status"]["artifact"]["rank"] == 8
    assert kubectl("wait", "--for=condition=Complete", "ftj/columns", "--timeout=5s")


def test_a_finished_job_releases_its_cluster(kubectl: Kubectl, tiny_model: Path, tiny_rows: Path) -> None:
    kubectl.apply(finetunejob("releases", tiny_model, tiny_rows))
    kubectl.finished("releases")
    kubectl("wait", "--for=delete", "raycluster", "--all", "--timeout=60s")
    kubectl("wait", "--for=delete", "pod", "--all", "--timeout=60s")
    assert kubectl.job("releases")["status"]["phase"] == "Succeeded"


def test_deleting_a_running_job_leaves_nothing_behind(
    kubectl: Kubectl, tiny_model: Path, tiny_rows: Path
) -> None:
    long = {"maxSteps": 100_000, "globalBatchSize": 8, "maxLength": 64}
    kubectl.apply(finetunejob("deleted", tiny_model, tiny_rows, hyperparameters=long))
    kubectl.wait_job("deleted", lambda s: s.get("phase") == "Running")
    kubectl("delete", "ftj", "deleted", "--timeout=60s")
    for kind in ("rayjob", "raycluster", "pod"):
        kubectl("wait", "--for=delete", kind, "--all", "--timeout=60s")
    assert [c["metadata"]["name"] for c in kubectl.items("configmap")] == ["kube-root-ca.crt"]


def test_a_deleted_rayjob_fails_the_job_without_retries_and_is_not_created_again(
    kubectl: Kubectl, tiny_model: Path, tiny_rows: Path
) -> None:
    long = {"maxSteps": 100_000, "globalBatchSize": 8, "maxLength": 64}
    never = {"maxInfraRetries": 0}
    kubectl.apply(finetunejob("orphaned", tiny_model, tiny_rows, hyperparameters=long, retry=never))
    kubectl.wait_job("orphaned", lambda s: s.get("phase") == "Running")
    kubectl("delete", "rayjob", "orphaned-a1", "--timeout=60s")
    status = kubectl.finished("orphaned", seconds=90)  # an inspection looks for an artifact first
    assert (status["phase"], status["reason"]) == ("Failed", "Lost")
    assert "RayJob orphaned-a1 was deleted" in status["message"]
    assert {job["metadata"]["name"] for job in kubectl.items("rayjob")} <= {"orphaned-i1"}


def test_a_rayjob_of_somebody_else_with_our_name_is_left_alone(
    kubectl: Kubectl, tiny_model: Path, tiny_rows: Path
) -> None:
    foreign = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": "taken-a1"},
        "spec": {
            "suspend": True,
            "entrypoint": "true",
            "rayClusterSpec": {
                "headGroupSpec": {
                    "rayStartParams": {},
                    "template": {"spec": {"containers": [{"name": "ray-head", "image": "x"}]}},
                }
            },
        },
    }
    kubectl.apply(foreign)
    before = kubectl.get("rayjob", "taken-a1")
    kubectl.apply(finetunejob("taken", tiny_model, tiny_rows))
    status = kubectl.finished("taken", seconds=30)
    assert (status["reason"], "taken-a1" in status["message"]) == ("BadConfig", True)
    after = kubectl.get("rayjob", "taken-a1")
    assert before is not None
    assert after is not None
    assert after["spec"] == before["spec"]


def test_the_reason_why_a_job_waits_is_in_its_status(
    kubectl: Kubectl, tiny_model: Path, tiny_rows: Path
) -> None:
    resources = {"cpu": "1000", "memory": "1Gi"}
    kubectl.apply(finetunejob("hungry", tiny_model, tiny_rows, resources=resources))
    job = kubectl.wait_job("hungry", lambda s: s.get("reason") == "Unschedulable", seconds=40)
    assert "cpu" in job["status"]["message"]
    assert condition(job["status"], "ResourcesReady") == ("False", "Unschedulable")


def test_credentials_of_the_users_secret_reach_the_trainer_and_nobody_else(
    cluster: Cluster, kubectl: Kubectl, tiny_model: Path, tiny_rows: Path
) -> None:
    with serve_bucket("training") as environment:
        bucket = open_bucket(environment)
        bucket.put_file(str(tiny_rows), "training/rows.jsonl")
        kubectl.apply(
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "store"}, "stringData": environment}
        )
        dataset = {"sources": [{"uri": "s3://training/rows.jsonl"}], "secretRef": {"name": "store"}}
        output = {"uri": "s3://training/artifact", "secretRef": {"name": "store"}}
        kubectl.apply(finetunejob("stored", tiny_model, tiny_rows, dataset=dataset, output=output))
        status = kubectl.finished("stored")
        assert status["phase"] == "Succeeded", status["message"]
        manifest = bucket.cat_file("training/artifact/manifest.json")
    assert status["artifact"]["digest"] == "sha256:" + hashlib.sha256(manifest).hexdigest()
    secret = environment["AWS_SECRET_ACCESS_KEY"]
    for kind in ("ftj", "rayjob", "configmap", "pod", "event"):
        assert secret not in kubectl("get", kind, "-o", "yaml")
    logs = [path for path in cluster.layout.logs.rglob("*") if path.is_file()]
    assert [path.name for path in logs if secret in path.read_text(errors="replace")] == []


async def test_names_are_listed_page_by_page_without_the_rest(
    kubectl: Kubectl, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kube, "PAGE", 2)
    monkeypatch.setattr(
        "kubernetes.aio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(cluster.kubeconfig)
    )
    names = [f"one-{number}" for number in range(5)]
    for name in names:
        body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"a": "b"}}
        kubectl.apply(body)
    client = await kube.Kube.connect()
    try:
        found = await client.list_names("v1", "ConfigMap", [kubectl.namespace])
        assert {(kubectl.namespace, name) for name in names} <= found
        pages = client._pages("v1", "ConfigMap", [kubectl.namespace], accept=kube.METADATA_ONLY)
        assert not [body for body in [body async for body in pages] if "data" in body]
        assert await client.list_names("v1", "Pod", [kubectl.namespace]) == set(), "it comes as null"
    finally:
        await client.close()

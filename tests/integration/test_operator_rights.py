"""The operator runs under the chart's rules, and needs every one of them: the API server's audit log says so.

A verb without which nothing would be refused does not belong in helm/finetune-operator/files/operator-rules.yaml.
Nobody runs the RayJobs here: what counts is what the operator asks the API server for.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from finetune_local import binaries, certificates
from finetune_local.cluster import Cluster
from finetune_operator.manifests import naming
from tests.clients import Json, Kubectl, finetunejob
from tests.clusters import API_SERVER
from tests.integration.rollout_operator import BETTER, GOOD, Lab, serves
from tools import chart_pages

pytestmark = pytest.mark.integration

OPERATOR = certificates.USERS["operator"][0]
POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata", "users": [OPERATOR]}, {"level": "None"}],
}
PATIENCE = 120.0  # seconds
Request = tuple[str, str, str]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An API server that has KubeRay's CRDs, and records what our operator asks for."""
    running = Cluster(tmp_path_factory.mktemp("audited"))
    running.layout.create()
    running.layout.audit_policy.write_text(yaml.safe_dump(POLICY))
    try:
        running.up((*API_SERVER, "kube-controller-manager"))
        found = binaries.obtain(
            ["kuberay-operator"], sources=binaries.Sources.from_environment(), announce=print
        )
        kubectl = Kubectl(running.kubeconfig, "default")
        for kind in ("rayjobs", "rayclusters"):
            kubectl("apply", "--server-side", "-f", f"{found.crds}/ray.io_{kind}.yaml")
        yield running
    finally:
        running.down()


@pytest.fixture
def lab(cluster: Cluster, kubectl: Kubectl, tmp_path: Path) -> Iterator[Lab]:
    """One operator that serves one namespace: it asks for all that an operator of all namespaces asks for, and more."""
    made = Lab(cluster, kubectl, tmp_path)
    made.environment = {
        "FINETUNE_NAMESPACE": chart_pages.NAMESPACE,
        "FINETUNE_LEADER_ELECTION": "true",
        "FINETUNE_OUTPUT_URI": f"file://{tmp_path / 'artifacts'}",
        "FINETUNE_STATUS_HOST": "127.0.0.1",
        "FINETUNE_STATUS_URL": f"http://127.0.0.1:{made.ports['status']}",
        "FINETUNE_PROGRESS_SECONDS": "1",
    }
    made.start()
    try:
        yield made
    finally:
        made.close()


def audited(cluster: Cluster) -> list[tuple[Request, int]]:
    """Every request of the operator for a resource, with the status of the answer."""
    found = []
    for line in cluster.layout.log("audit").read_text().splitlines():
        event: Json = json.loads(line)
        reference = event.get("objectRef", {})
        if "resource" in reference:
            resource = "/".join(filter(None, (reference["resource"], reference.get("subresource"))))
            request = (event["verb"], reference.get("apiGroup", ""), resource)
            found.append((request, event["responseStatus"]["code"]))
    return found


def report(lab: Lab, name: str, body: Json) -> int:
    """Post a report for the first attempt of a job as its trainer would; the HTTP status."""
    kubectl = lab.kubectl
    audience = naming.audience(kubectl.job(name)["metadata"]["uid"])
    token = kubectl("create", "token", "default", f"--audience={audience}").strip()
    path = naming.status_path(kubectl.namespace, name, 1)
    request = urllib.request.Request(
        f"http://127.0.0.1:{lab.ports['status']}{path}",
        data=json.dumps(body).encode(),
        headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        status: int = answer.status
        return status


def test_every_rule_is_used_and_none_is_missing(lab: Lab, cluster: Cluster, tmp_path: Path) -> None:
    kubectl = lab.kubectl
    for name in ("ends", "cancelled"):
        lifetime: Json = {"ttlSecondsAfterFinished": 1} if name == "ends" else {}
        kubectl.apply(finetunejob(name, tmp_path, tmp_path / "rows.jsonl", **lifetime))
    lab.deploy(GOOD)
    lab.wait(serves(GOOD), seconds=PATIENCE)
    lab.send()
    lab.deploy(BETTER)
    lab.annotate("dance")  # no verb of ours: the operator answers with an event and takes it away
    lab.wait(serves(BETTER), seconds=PATIENCE)

    for name in ("ends", "cancelled"):
        kubectl.wait_job(name, lambda s: bool((s.get("attempts") or [{}])[-1].get("uid")), seconds=PATIENCE)
    result = {"class": "BadData", "exitCode": 65, "message": "line 1: not JSON", "step": 0}
    assert report(lab, "ends", {"finetune": {"result": result}}) == 200
    lab.eventually(lambda: kubectl.get("ftj", "ends") is None, seconds=PATIENCE)
    kubectl("annotate", "ftj", "cancelled", "finetune.dev/action=cancel")
    assert kubectl.finished("cancelled")["phase"] == "Cancelled"
    lab.eventually(lambda: kubectl.items("rayjobs") == [], seconds=PATIENCE)

    requests = audited(cluster)
    assert [request for request, code in requests if code == 403] == []
    used = {request for request, code in requests if code < 500}
    rules = chart_pages.read_rules()
    allowed = {request for rule in rules for request in rule.requests()}
    needed = {request for rule in rules if rule.audited for request in rule.requests()}
    assert needed - used == set(), "the operator asks for these in no case: remove them from the rules"
    assert used - allowed == set(), "allowed by something else than the operator's rules"

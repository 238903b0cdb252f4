"""The operator runs under the chart's rules, and needs every one of them: the API server's audit log says so.

A verb without which nothing would be refused does not belong in helm/finetune-operator/files/operator-rules.yaml.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from finetune_local import certificates, parts
from finetune_local.cluster import Cluster
from tests.clients import Json, Kubectl, finetunejob
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
Request = tuple[str, str, str]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A laptop cluster without its own operator, that records what ours asks for."""
    running = Cluster(tmp_path_factory.mktemp("audited"), files=Path(__file__).parents[2])
    running.layout.create()
    running.layout.audit_policy.write_text(yaml.safe_dump(POLICY))
    try:
        running.up(tuple(name for name in parts.TRAINING if name != "operator"))
        crds = running.layout.run / "crds"
        Kubectl(running.kubeconfig, "default")("apply", "--server-side", "-f", str(_crds(crds)))
        yield running
    finally:
        running.down()


def _crds(folder: Path) -> Path:
    from finetune_local import contents

    if not folder.exists():
        contents.write_crds(folder)
    return folder


@pytest.fixture
def lab(cluster: Cluster, kubectl: Kubectl, tmp_path: Path) -> Iterator[Lab]:
    """One operator that serves one namespace: it asks for all that an operator of all namespaces asks for, and more."""
    made = Lab(cluster, kubectl, tmp_path)
    made.environment = {
        "FINETUNE_NAMESPACE": chart_pages.NAMESPACE,
        "FINETUNE_LEADER_ELECTION": "true",
        "FINETUNE_SUBMISSION_MODE": "HTTPMode",
        "FINETUNE_OUTPUT_URI": f"file://{tmp_path / 'artifacts'}",
        "FINETUNE_STATUS_HOST": "127.0.0.1",
        "FINETUNE_STATUS_URL": f"http://127.0.0.1:{made.ports['status']}",
        "FINETUNE_TERMINATION_GRACE_SECONDS": "5",
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


def test_every_rule_is_used_and_none_is_missing(
    lab: Lab, cluster: Cluster, tiny_model: Path, tiny_rows: Path
) -> None:
    kubectl = lab.kubectl
    # The namespace of the jobs enforces `restricted`: KubeRay's pods pass with what it adds to our template.
    kubectl("label", "namespace", kubectl.namespace, "pod-security.kubernetes.io/enforce=restricted")
    kubectl.apply(finetunejob("short", tiny_model, tiny_rows, ttlSecondsAfterFinished=1))
    lab.deploy(GOOD)
    lab.wait(serves(GOOD), seconds=60)
    lab.send()
    lab.deploy(BETTER)
    lab.annotate("dance")  # no verb of ours: the operator answers with an event and takes it away
    lab.wait(serves(BETTER), seconds=60)

    lab.eventually(lambda: kubectl.get("ftj", "short") is None, seconds=180)
    kubectl.apply(finetunejob("cancelled", tiny_model, tiny_rows, hyperparameters={"maxSteps": 100_000}))
    kubectl.wait_job("cancelled", lambda status: status.get("phase") == "Running")
    kubectl("annotate", "ftj", "cancelled", "finetune.dev/action=cancel")
    assert kubectl.finished("cancelled")["phase"] == "Cancelled"
    lab.eventually(lambda: kubectl.items("rayjobs") == [], seconds=60)

    requests = audited(cluster)
    assert [request for request, code in requests if code == 403] == []
    used = {request for request, code in requests if code < 500}
    rules = chart_pages.read_rules()
    allowed = {request for rule in rules for request in rule.requests()}
    needed = {request for rule in rules if rule.audited for request in rule.requests()}
    assert needed - used == set(), "the operator asks for these in no case: remove them from the rules"
    assert used - allowed == set(), "allowed by something else than the operator's rules"

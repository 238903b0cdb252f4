"""The operator runs under the chart's rules, and needs every one of them: the API server's audit log says so.

A verb without which nothing would be refused does not belong in helm/finetune-operator/files/operator-rules.yaml.
The roles are those of a chart that serves one named namespace: there no rule is contained in another.
Nobody runs the RayJobs here: what counts is what the operator asks the API server for.
"""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml

from finetune_local import binaries, certificates
from finetune_local.cluster import Cluster
from finetune_operator.manifests import naming
from tests.clients import Json, Kubectl, KubectlError, finetunejob
from tests.clusters import API_SERVER
from tests.integration.chart.helm import render
from tests.integration.rollout_operator import BETTER, GOOD, Lab, serves
from tests.integration.test_queues import Kueue, condition
from tests.waiting import wait_until
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
MINE = f"metadata.name={chart_pages.NAME}"
ROLES = (chart_pages.NAME, f"{chart_pages.NAME}-own")


@dataclass(frozen=True)
class Request:
    """What the operator asked for; also, as a grant, what it may: then an empty namespace is every one."""

    namespace: str
    verb: str
    group: str
    resource: str

    def allows(self, other: Request) -> bool:
        return self.namespace in ("", other.namespace) and replace(other, namespace=self.namespace) == self


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An API server that has the CRDs of KubeRay and Kueue, and records what our operator asks for."""
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
        wait_until(lambda: has_kueue(kubectl), what="the CRD of Kueue's Workloads")
        yield running
    finally:
        running.down()


def has_kueue(kubectl: Kubectl) -> bool:
    try:
        Kueue(kubectl, "").install()
    except KubectlError:  # a busy API server does not know yet what it has just been given
        return False
    return True


@pytest.fixture
def grants(cluster: Cluster, namespace: str) -> list[Request]:
    """Makes the chart's roles for one named namespace the only ones of the operator: each rule where it belongs, and
    nothing that another rule allows as well."""
    system = Kubectl(cluster.kubeconfig, chart_pages.NAMESPACE)
    system("delete", "clusterrolebinding,clusterrole,rolebinding,role", "--field-selector", MINE)
    system("delete", "rolebinding,role", "--field-selector", f"metadata.name={chart_pages.NAME}-own")
    found = []
    for document in render({"watchNamespaces": [namespace]}):
        metadata = document["metadata"]
        if not document["kind"].startswith(("Role", "ClusterRole")) or metadata["name"] not in ROLES:
            continue
        where = metadata.get("namespace", "")
        Kubectl(cluster.kubeconfig, where or "default").apply(document)
        found += [
            Request(where, verb, group, resource)
            for rule in document.get("rules", [])
            for group in rule["apiGroups"]
            for resource in rule["resources"]
            for verb in rule["verbs"]
        ]
    return found


@pytest.fixture
def lab(cluster: Cluster, kubectl: Kubectl, grants: list[Request], tmp_path: Path) -> Iterator[Lab]:
    """One operator that serves one namespace: it asks for all that an operator of all namespaces asks for, and more."""
    del grants  # before it starts
    made = Lab(cluster, kubectl, tmp_path)
    made.environment = {
        "FINETUNE_NAMESPACE": chart_pages.NAMESPACE,
        "FINETUNE_LEADER_ELECTION": "true",
        "FINETUNE_OUTPUT_URI": f"file://{tmp_path / 'artifacts'}",
        "FINETUNE_STATUS_HOST": "127.0.0.1",
        "FINETUNE_STATUS_URL": f"http://127.0.0.1:{made.ports['status']}",
        "FINETUNE_PROGRESS_SECONDS": "1",
    }
    with made.running():
        yield made


def audited(cluster: Cluster) -> list[tuple[Request, int]]:
    """Every request of the operator for a resource, with the status of the answer."""
    found = []
    for line in cluster.layout.log("audit").read_text().splitlines():
        event: Json = json.loads(line)
        reference = event.get("objectRef", {})
        if "resource" in reference:
            resource = "/".join(filter(None, (reference["resource"], reference.get("subresource"))))
            asked = Request(
                reference.get("namespace", ""), event["verb"], reference.get("apiGroup", ""), resource
            )
            found.append((asked, event["responseStatus"]["code"]))
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


def hold_in_queue(kubectl: Kubectl, name: str) -> None:
    """Plays Kueue for a job: its RayJob waits, and nobody serves the list that tells its place."""
    kubectl.wait_job(name, lambda s: bool((s.get("attempts") or [{}])[-1].get("uid")), seconds=PATIENCE)
    Kueue(kubectl, name).queue(condition("QuotaReserved", False, "Pending", "no quota is left"))
    kubectl.wait_job(name, lambda s: "no quota" in s.get("message", ""), seconds=PATIENCE)


def get_stuck(kubectl: Kubectl, name: str) -> None:
    """Plays a kubelet that cannot mount a volume of the job's pod, and tells so by an event alone."""
    container = {"name": "ray-head", "image": "trainer:1"}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"{name}-head", "labels": naming.labels(name, 1)},
        "spec": {"nodeName": "node-1", "containers": [container]},
    }
    wait_until(lambda: kubectl.get("serviceaccount", "default"), what="the service account that pods get")
    kubectl.apply(pod)
    began = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    scheduled = {"type": "PodScheduled", "status": "True", "lastTransitionTime": began}
    status = json.dumps({"status": {"phase": "Pending", "conditions": [scheduled]}})
    kubectl("patch", "pod", f"{name}-head", "--subresource=status", "--type=merge", "-p", status)
    uid = (kubectl.get("pod", f"{name}-head") or {})["metadata"]["uid"]
    about = {"kind": "Pod", "name": f"{name}-head", "namespace": kubectl.namespace, "uid": uid}
    kubectl.apply(
        {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": f"{name}-head.1"},
            "involvedObject": about,
            "type": "Warning",
            "reason": "FailedMount",
            "message": "MountVolume.SetUp failed: the claim is elsewhere",
            "lastTimestamp": began,
        }
    )
    kubectl.wait_job(name, lambda s: "the claim is elsewhere" in s.get("message", ""), seconds=PATIENCE)


def test_every_rule_is_used_where_it_is_given_and_none_is_missing(
    lab: Lab, cluster: Cluster, grants: list[Request], tmp_path: Path
) -> None:
    kubectl = lab.kubectl
    for name in ("ends", "cancelled", "stuck"):
        lifetime: Json = {"ttlSecondsAfterFinished": 1} if name == "ends" else {}
        kubectl.apply(finetunejob(name, tmp_path, tmp_path / "rows.jsonl", **lifetime))
    kubectl.apply(
        finetunejob("queued", tmp_path, tmp_path / "rows.jsonl", scheduling={"queueName": "team-a"})
    )
    lab.deploy(GOOD)
    lab.wait(serves(GOOD), seconds=PATIENCE)
    lab.send()
    lab.deploy(BETTER)
    lab.annotate("dance")  # no verb of ours: the operator answers with an event and takes it away
    lab.wait(serves(BETTER), seconds=PATIENCE)
    hold_in_queue(kubectl, "queued")

    for name in ("ends", "cancelled", "stuck"):
        kubectl.wait_job(name, lambda s: bool((s.get("attempts") or [{}])[-1].get("uid")), seconds=PATIENCE)
    get_stuck(kubectl, "stuck")
    result = {"class": "BadData", "exitCode": 65, "message": "line 1: not JSON", "step": 0}
    assert report(lab, "ends", {"finetune": {"result": result}}) == 200
    lab.eventually(lambda: kubectl.get("ftj", "ends") is None, seconds=PATIENCE)
    for name in ("cancelled", "queued", "stuck"):
        kubectl("annotate", "ftj", name, "finetune.dev/action=cancel")
    kubectl("delete", "pod", "--all", "--force")
    assert kubectl.finished("cancelled")["phase"] == "Cancelled"
    lab.eventually(lambda: kubectl.items("rayjobs") == [], seconds=PATIENCE)

    requests = audited(cluster)
    assert [request for request, code in requests if code == 403] == []
    used = {request for request, code in requests if code < 500}
    allowed_by = {request: [grant for grant in grants if grant.allows(request)] for request in used}
    alone = {found[0] for found in allowed_by.values() if len(found) == 1}
    assert [grant for grant in grants if grant not in alone] == [], (
        "no request of the operator needs these, or another rule allows them as well: remove them from the rules"
    )
    assert [request for request, found in allowed_by.items() if not found] == [], (
        "allowed by something else than the operator's rules"
    )
    assert {(g.verb, g.group, g.resource) for g in grants} == {
        request for rule in chart_pages.read_rules() for request in rule.requests()
    }

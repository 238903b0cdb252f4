"""Jobs in a queue, with the real KubeRay.

Kueue's part (its Workloads and their conditions) is played by the tests, word for word as Kueue 0.15 writes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from finetune_local.cluster import Cluster
from tests.clients import Json, Kubectl
from tests.clusters import WITHOUT_RAY, started
from tests.integration.test_waits import job

pytestmark = pytest.mark.integration

VERSION = "v1beta2"
QUOTA = "couldn't assign flavors to pod set head: insufficient unused quota for cpu in flavor default, 100m more needed"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with started(tmp_path_factory.mktemp("queues"), WITHOUT_RAY) as running:
        yield running


class Kueue:
    """What Kueue does for one RayJob."""

    def __init__(self, kubectl: Kubectl, name: str, *, attempt: int = 1) -> None:
        self.kubectl, self.rayjob = kubectl, f"{name}-a{attempt}"
        self.workload = f"rayjob-{self.rayjob}-1a2b3"

    def install(self) -> None:
        """Its Workloads; the fields that are not ours to know are kept as they come."""
        anything = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
        names = {
            "kind": "Workload",
            "listKind": "WorkloadList",
            "plural": "workloads",
            "singular": "workload",
        }
        version = {
            "name": VERSION,
            "served": True,
            "storage": True,
            "subresources": {"status": {}},
            "schema": {
                "openAPIV3Schema": {"type": "object", "properties": {"spec": anything, "status": anything}}
            },
        }
        self.kubectl.apply(
            {
                "apiVersion": "apiextensions.k8s.io/v1",
                "kind": "CustomResourceDefinition",
                "metadata": {
                    "name": "workloads.kueue.x-k8s.io",
                    "annotations": {"api-approved.kubernetes.io": "https://github.com/kubernetes-sigs/kueue"},
                },
                "spec": {
                    "group": "kueue.x-k8s.io", "names": names, "scope": "Namespaced", "versions": [version],
                },
            }
        )  # fmt: skip
        self.kubectl("wait", "--for=condition=Established", "crd/workloads.kueue.x-k8s.io", "--timeout=20s")

    def queue(self, *conditions: Json) -> None:
        """Make the Workload, or change its conditions."""
        owner = self.kubectl.get("rayjob", self.rayjob)
        assert owner is not None
        uid = owner["metadata"]["uid"]
        reference = {"apiVersion": "ray.io/v1", "kind": "RayJob", "name": self.rayjob, "uid": uid}
        self.kubectl.apply(
            {
                "apiVersion": f"kueue.x-k8s.io/{VERSION}",
                "kind": "Workload",
                "metadata": {
                    "name": self.workload,
                    "labels": {"kueue.x-k8s.io/job-uid": uid},
                    "ownerReferences": [reference | {"controller": True}],
                },
                "spec": {"queueName": "team-a", "active": True},
            }
        )
        status = json.dumps({"status": {"conditions": list(conditions)}})
        self.kubectl("patch", "workload", self.workload, "--subresource=status", "--type=merge", "-p", status)

    def suspend(self, value: bool) -> None:
        patch = json.dumps({"spec": {"suspend": value}})
        self.kubectl("patch", "rayjob", self.rayjob, "--type=merge", "-p", patch)


def condition(kind: str, status: bool, reason: str, message: str) -> Json:
    return {
        "type": kind, "status": str(status), "reason": reason, "message": message,
        "lastTransitionTime": "2026-01-01T12:00:00Z",
    }  # fmt: skip


def conditions(status: Json) -> dict[str, Any]:
    return {one["type"]: (one["status"], one["reason"]) for one in status["conditions"]}


def test_a_job_queues_is_suspended_is_let_in_and_is_preempted(kubectl: Kubectl) -> None:
    kubectl.apply(
        job("patient", scheduling={"queueName": "team-a"}, resources={"cpu": "100m", "memory": "64Mi"})
    )
    kueue = Kueue(kubectl, "patient")
    # Without Kueue it says so, and nothing runs.
    status = kubectl.wait_job("patient", lambda s: s.get("reason") == "KueueUnavailable", seconds=20)[
        "status"
    ]
    assert "Kueue is not installed" in status["message"]
    rayjob = kubectl.get("rayjob", "patient-a1")
    assert rayjob is not None
    assert rayjob["spec"]["suspend"] is True
    assert rayjob["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    assert kubectl.items("pod") == []

    kueue.install()
    kueue.queue(condition("QuotaReserved", False, "Pending", QUOTA))
    status = kubectl.wait_job("patient", lambda s: s.get("queue", {}).get("workload"), seconds=35)["status"]
    assert (status["phase"], status["reason"]) == ("Queued", "Queued")
    assert "100m more needed" in status["message"]
    assert status["queue"]["name"] == "team-a"
    assert conditions(status)["QuotaReserved"] == ("False", "Queued")

    # A change of the Workload alone arrives as a watch event, before the next look (30 s). The watch may begin 10 s
    # after the CRD came: test_late_resources.py.
    kueue.queue(condition("QuotaReserved", False, "Inadmissible", "LocalQueue team-a doesn't exist"))
    status = kubectl.wait_job("patient", lambda s: s.get("reason") == "QueueMissing", seconds=20)["status"]
    assert f"there is no LocalQueue team-a in namespace {kubectl.namespace}" in status["message"]

    # The user's own suspension takes the RayJob away; afterwards the next attempt queues.
    kubectl("patch", "ftj", "patient", "--type=merge", "-p", '{"spec":{"suspend":true}}')
    status = kubectl.wait_job("patient", lambda s: s.get("phase") == "Suspended", seconds=60)["status"]
    assert "queue" not in status
    assert kubectl.items("rayjob") == []
    kubectl("patch", "ftj", "patient", "--type=merge", "-p", '{"spec":{"suspend":false}}')
    kubectl.wait_job("patient", lambda s: s.get("phase") == "Queued", seconds=30)
    kueue = Kueue(kubectl, "patient", attempt=2)
    second = kubectl.get("rayjob", "patient-a2")
    assert second is not None
    assert second["spec"]["suspend"] is True

    kueue.queue(condition("QuotaReserved", True, "QuotaReserved", "Quota reserved in ClusterQueue all"))
    kueue.suspend(False)
    status = kubectl.wait_job(
        "patient",
        lambda s: conditions(s).get("ResourcesReady", ("",))[0] == "True" if s else False,
        seconds=60,
    )["status"]
    assert "queue" not in status
    assert conditions(status)["QuotaReserved"] == ("True", "QuotaReserved")

    told = "Preempted to accommodate a workload (UID: 1, JobUID: 2) due to prioritization in the ClusterQueue"
    kueue.queue(
        condition("QuotaReserved", False, "Pending", told),
        condition("Evicted", True, "Preempted", told),
        condition("Preempted", True, "InClusterQueue", told),
    )
    kueue.suspend(True)
    status = kubectl.wait_job("patient", lambda s: s.get("reason") == "Preempted", seconds=30)["status"]
    assert status["phase"] == "Queued"
    assert status["retries"]["preemption"] == 1
    assert len(status["attempts"]) == 2
    assert status["queue"]["reason"] == "Preempted"

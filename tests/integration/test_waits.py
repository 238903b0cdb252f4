"""Why a job waits, on a real API server with the real scheduler and the real KubeRay, within 15 seconds.

Ray is not needed: none of these jobs ever runs. A node that nobody manages stands in for one whose kubelet has trouble;
the tests write what that kubelet would.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_local.cluster import Cluster
from tests.clients import Json, Kubectl, KubectlError
from tests.clusters import WITHOUT_RAY, pid_of, started
from tests.waiting import wait_until

pytestmark = pytest.mark.integration

SECONDS = 15
NODE = "trouble"
GPU = "NVIDIA-L4"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with started(tmp_path_factory.mktemp("waits"), WITHOUT_RAY) as running:
        yield running


@pytest.fixture(scope="module")
def node(cluster: Cluster) -> None:
    """A node with a GPU that no KWOK plays: its pods stay as their kubelet leaves them."""
    kubectl = Kubectl(cluster.kubeconfig, "default")
    kubectl.apply(
        {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": NODE, "labels": {"nvidia.com/gpu.product": GPU}},
        }
    )
    room = {
        "cpu": "64",
        "memory": "256Gi",
        "pods": "110",
        "nvidia.com/gpu": "8",
        "ephemeral-storage": "100Gi",
    }
    now = time.strftime(
        "%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + 3600)
    )  # a heartbeat for the whole test
    ready = {
        "type": "Ready", "status": "True", "reason": "KubeletReady", "message": "", "lastHeartbeatTime": now,
        "lastTransitionTime": now,
    }  # fmt: skip
    status = {"status": {"capacity": room, "allocatable": room, "conditions": [ready]}}
    kubectl("patch", "node", NODE, "--subresource=status", "--type=merge", "-p", json.dumps(status))


def job(name: str, **spec: Any) -> Json:
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": {
            "model": {"uri": "file:///models/tiny"},
            "dataset": {"sources": [{"uri": "file:///data/train.jsonl"}]},
            "resources": {"cpu": "200m", "memory": "256Mi"},
            **spec,
        },
    }


def told(kubectl: Kubectl, name: str, reason: str, *parts: str) -> Json:
    """The status with this reason, within 15 seconds of the RayJob's creation; its message has these parts, and
    `kubectl get ftj` shows the reason."""
    began = time.monotonic()
    kubectl.wait_job(name, lambda status: bool(status.get("attempts")), seconds=30)
    status: Json = kubectl.wait_job(name, lambda s: s.get("reason") == reason, seconds=SECONDS)["status"]
    print(f"{name}: {reason} after {time.monotonic() - began:.1f} s: {status['message']}")
    for part in parts:
        assert part in status["message"]
    conditions = {condition["type"]: condition for condition in status["conditions"]}
    assert conditions["ResourcesReady"]["status"] == "False"
    assert conditions["ResourcesReady"]["message"] == status["message"]
    assert reason in kubectl("get", "ftj", name)
    return status


def test_a_quota(kubectl: Kubectl) -> None:
    kubectl("create", "quota", "small", "--hard=limits.memory=64Mi")
    # The API server enforces a quota from its own cache of them, which is behind for a moment.
    kubectl("wait", "quota", "small", "--for=jsonpath={.status.hard}", "--timeout=30s")
    kubectl.apply(job("limited"))
    told(kubectl, "limited", "QuotaExceeded", "exceeded quota: small", "ask for less in spec.resources")
    kubectl("delete", "quota", "small")
    kubectl.wait_job("limited", lambda status: status.get("reason") != "QuotaExceeded", seconds=60)


@pytest.mark.parametrize("resource", ["count/rayclusters.ray.io", "services"])
def test_a_quota_of_which_kuberay_tells_by_events_alone(kubectl: Kubectl, resource: str) -> None:
    kubectl("create", "quota", "none", f"--hard={resource}=0")
    kubectl("wait", "quota", "none", "--for=jsonpath={.status.used}", "--timeout=60s")
    kubectl.apply(job("unmade"))
    told(kubectl, "unmade", "QuotaExceeded", f"exceeded quota: none, requested: {resource}=1")


def test_a_limit_range(kubectl: Kubectl) -> None:
    limit = {"type": "Container", "max": {"memory": "128Mi"}}
    kubectl.apply(
        {"apiVersion": "v1", "kind": "LimitRange", "metadata": {"name": "low"}, "spec": {"limits": [limit]}}
    )
    kubectl.apply(job("large"))
    told(kubectl, "large", "LimitRangeExceeded", "128Mi", "LimitRange of the namespace")


def test_pods_to_which_a_policy_gives_another_manager(kubectl: Kubectl) -> None:
    """They are heard of all the same, and no other attempt begins while one of them is there."""
    relabel(kubectl, "relabelled")
    kubectl.apply(job("relabelled", resources={"cpu": "1000", "memory": "1Gi"}))
    told(kubectl, "relabelled", "Unschedulable", "Insufficient cpu")
    (pod,) = kubectl.items("pod", "-l", "finetune.dev/job=relabelled")
    assert pod["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "platform-team"
    name = pod["metadata"]["name"]
    kubectl("patch", "pod", name, "--type=merge", "-p", '{"metadata": {"finalizers": ["example.com/slow"]}}')
    kubectl("patch", "ftj", "relabelled", "--type=merge", "-p", '{"spec": {"suspend": true}}')
    try:
        kubectl.wait_job("relabelled", lambda s: s["message"].endswith(f"waits until pod {name} is gone"))
    finally:
        kubectl("patch", "pod", name, "--type=merge", "-p", '{"metadata": {"finalizers": null}}')
    kubectl.wait_job("relabelled", lambda s: s["phase"] == "Suspended")


def relabel(kubectl: Kubectl, name: str) -> None:
    """Have the pods of a job labelled by the platform, and wait until that is in force."""
    group = "admissionregistration.k8s.io/v1"
    path = "/metadata/labels/app.kubernetes.io~1managed-by"
    patch = f'[JSONPatch{{op: "replace", path: "{path}", value: "platform-team"}}]'
    rule = {"apiGroups": [""], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["pods"]}
    policy = {
        "reinvocationPolicy": "Never",
        "matchConstraints": {"resourceRules": [rule]},
        "matchConditions": [
            {
                "name": "its",
                "expression": f"object.metadata.?labels[?'finetune.dev/job'].orValue('') == '{name}'",
            }
        ],
        "mutations": [{"patchType": "JSONPatch", "jsonPatch": {"expression": patch}}],
    }
    for kind, spec in (
        ("MutatingAdmissionPolicy", policy),
        ("MutatingAdmissionPolicyBinding", {"policyName": name}),
    ):
        kubectl.apply({"apiVersion": group, "kind": kind, "metadata": {"name": name}, "spec": spec})
    labels = {"finetune.dev/job": name, "app.kubernetes.io/managed-by": "x"}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "probe", "labels": labels},
        "spec": {"containers": [{"name": "probe", "image": "none"}]},
    }

    def is_in_force() -> bool:
        try:
            return "platform-team" in kubectl("create", "--dry-run=server", "-o", "json", "-f", "-", body=pod)
        except KubectlError:  # a namespace gets its service account a moment after it is made
            return False

    wait_until(is_in_force, what="the policy is not in force")


def test_no_room(kubectl: Kubectl) -> None:
    kubectl.apply(job("hungry", resources={"cpu": "1000", "memory": "1Gi"}))
    told(kubectl, "hungry", "Unschedulable", "Insufficient cpu", "1000 CPU", "ask for less in spec.resources")


def test_no_node_of_the_kind(kubectl: Kubectl) -> None:
    kubectl.apply(
        job("picky", resources={"gpusPerWorker": 1, "acceleratorType": "NVIDIA-B200", "fitCheck": "Skip"})
    )
    told(kubectl, "picky", "NoMatchingNode", "NVIDIA-B200", "spec.resources.acceleratorType")


def test_a_missing_volume_claim(kubectl: Kubectl) -> None:
    kubectl.apply(job("unplugged", dataset={"sources": [{"uri": "pvc://nowhere/train.jsonl"}]}))
    told(kubectl, "unplugged", "VolumeClaimMissing", "PersistentVolumeClaim nowhere is missing", "create it")


# ---------------------------------------------------------------- what a kubelet says


def head(kubectl: Kubectl, name: str) -> Json:
    """The job's pod on the node with trouble, once it has one."""
    deadline = time.monotonic() + 30
    while True:
        pods = kubectl.items("pod", "-l", f"finetune.dev/job={name}")
        if pods and pods[0]["spec"].get("nodeName"):
            return pods[0]
        assert time.monotonic() < deadline, f"{name} got no pod on a node"
        time.sleep(0.2)


def say(kubectl: Kubectl, pod: Json, reason: str, message: str) -> None:
    """The container waits, says the kubelet."""
    state = {"name": "ray-head", "image": "x", "imageID": "", "ready": False, "restartCount": 0}
    waiting = {"state": {"waiting": {"reason": reason, "message": message}}}
    status = {"status": {"containerStatuses": [state | waiting]}}
    name = pod["metadata"]["name"]
    kubectl("patch", "pod", name, "--subresource=status", "--type=strategic", "-p", json.dumps(status))


ON_TROUBLE = {
    "gpusPerWorker": 1,
    "acceleratorType": GPU,
    "fitCheck": "Skip",
    "cpu": "200m",
    "memory": "256Mi",
}


@pytest.mark.parametrize(
    ("name", "said", "reason", "parts"),
    [
        ("pull", ("ErrImagePull", 'failed to pull "trainer:9"'), "ErrImagePull", ("trainer:9", "pull secret")),
        (
            "secret", ("CreateContainerConfigError", 'secret "hf-token" not found'),
            "SecretMissing", ("Secret hf-token is missing", "secretRef"),
        ),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("node")
def test_a_container_that_cannot_be_made(
    kubectl: Kubectl, name: str, said: tuple[str, str], reason: str, parts: tuple[str, ...]
) -> None:
    kubectl.apply(job(name, resources=ON_TROUBLE))
    say(kubectl, head(kubectl, name), *said)
    told(kubectl, name, reason, *parts)


@pytest.mark.usefixtures("node")
def test_a_volume_that_cannot_be_mounted_is_told_by_an_event(kubectl: Kubectl) -> None:
    kubectl.apply(job("mount", resources=ON_TROUBLE))
    pod = head(kubectl, "mount")
    say(kubectl, pod, "ContainerCreating", "")
    kubectl.apply(
        {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": "mount.1"},
            "involvedObject": {
                "kind": "Pod",
                "name": pod["metadata"]["name"],
                "uid": pod["metadata"]["uid"],
                "namespace": kubectl.namespace,
            },
            "type": "Warning",
            "reason": "FailedMount",
            "message": 'MountVolume.SetUp failed for volume "run-file" : configmap "mount-a1" not found',
            "lastTimestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
    )
    told(kubectl, "mount", "ConfigMapMissing", "ConfigMap mount-a1 is missing")


def test_a_kuberay_that_is_away(cluster: Cluster, kubectl: Kubectl) -> None:
    pid = pid_of(cluster, "kuberay")
    os.kill(pid, signal.SIGKILL)
    try:
        kubectl.apply(job("alone"))
        told(kubectl, "alone", "KubeRayUnavailable", "see that its operator runs")
    finally:
        cluster.up(WITHOUT_RAY)
    kubectl.wait_job("alone", lambda status: status.get("reason") != "KubeRayUnavailable", seconds=60)


def test_the_page_of_a_job_says_what_to_do(kubectl: Kubectl, cluster: Cluster) -> None:
    from typer.testing import CliRunner

    from finetune_cli.__main__ import app

    kubectl.apply(job("asked", resources={"cpu": "1000", "memory": "1Gi"}))
    told(kubectl, "asked", "Unschedulable", "Insufficient cpu")
    arguments = [
        "jobs",
        "describe",
        "asked",
        "-n",
        kubectl.namespace,
        "--kubeconfig",
        str(Path(cluster.kubeconfig)),
    ]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "Provisioning (Unschedulable)" in done.output
    assert "Do\n  Do what the message says; the job goes on by itself then." in done.output

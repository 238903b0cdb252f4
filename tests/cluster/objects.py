"""What the tests on a real cluster create, and how they look at it."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from finetune_operator.manifests import naming, pods
from tests import tiny
from tests.clients import Json, Kubectl, KubectlError
from tools import chart_pages

SYSTEM = chart_pages.NAMESPACE
NAMESPACE = "finetune-e2e"
PREPARE_SECONDS = 240
JOB_SECONDS = 420  # two cores: starting Ray and importing PyTorch takes a minute
CPU = "450m"  # a node of two cores has room for three of these, or for two with KubeRay's sidecar of 500m
LONG: Json = {"maxSteps": 2000, "globalBatchSize": 8, "maxLength": 64, "learningRate": 0.01}
NOWHERE: Json = {"sources": [{"uri": "pvc://files/nowhere.jsonl"}]}
MANY_ROWS: Json = {"sources": [{"uri": "pvc://files/many.jsonl"}], "split": {"eval": 0.5}}
"""Their evaluation takes a while."""
KINDS = "rayjobs,rayclusters,jobs,pods,services,endpointslices,configmaps,secrets,serviceaccounts,roles,rolebindings"


@dataclass(frozen=True)
class Settings:
    """Where to test, and with which images."""

    kubeconfig: Path
    operator_image: str
    trainer_image: str
    host_path: Path | None
    kubelet: int | None
    """PID of the one node's kubelet, where it is a process of this machine."""
    ray_image: str | None
    """An image with Ray and without our trainer."""

    @classmethod
    def load(cls, environ: Mapping[str, str]) -> Self:
        """Raises KeyError for a variable that is missing."""
        host_path, kubelet = environ.get("FINETUNE_E2E_HOST_PATH"), environ.get("FINETUNE_E2E_KUBELET_PID")
        return cls(
            kubeconfig=Path(environ["KUBECONFIG"]),
            operator_image=environ["FINETUNE_E2E_OPERATOR_IMAGE"],
            trainer_image=environ["FINETUNE_E2E_TRAINER_IMAGE"],
            host_path=Path(host_path) if host_path else None,
            kubelet=int(kubelet) if kubelet else None,
            ray_image=environ.get("FINETUNE_E2E_RAY_IMAGE") or None,
        )

    @property
    def helm_flags(self) -> tuple[str, ...]:
        return (f"--kubeconfig={self.kubeconfig}",)

    def values(self, submission_mode: str) -> Json:
        """The chart's values: small, and otherwise what it installs by default."""
        repository, _, tag = self.operator_image.rpartition(":")
        return {
            "image": {"repository": repository, "tag": tag},
            "operator": {
                "progressSeconds": 1,
                "resources": {"requests": {"cpu": "20m", "memory": "128Mi"}, "limits": {"memory": "512Mi"}},
            },
            "router": {"replicas": 1, "resources": {"requests": {"cpu": "20m", "memory": "128Mi"}}},
            "trainer": {
                "image": self.trainer_image,
                "terminationGracePeriodSeconds": 60,
                "submissionMode": submission_mode,
            },
        }


def enforce(kubectl: Kubectl, namespace: str, standard: str) -> None:
    """Make the namespace, where it is not there yet, enforce this Pod Security Standard."""
    label = {"pod-security.kubernetes.io/enforce": standard}
    kubectl.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace, "labels": label}})


def volume(folder: Path) -> Json:
    """A folder of the one node as a volume. Kubernetes gives hostPath volumes no owner, so everybody may write."""
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o777)
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": NAMESPACE},
        "spec": {
            "capacity": {"storage": "5Gi"},
            "accessModes": ["ReadWriteMany"],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": "",
            "hostPath": {"path": str(folder)},
            "claimRef": {"namespace": NAMESPACE, "name": "files"},
        },
    }


def claim(host_path: bool) -> Json:
    spec: Json = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "5Gi"}}}
    if host_path:
        spec |= {"storageClassName": "", "volumeName": NAMESPACE}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": "files"},
        "spec": spec,
    }


def trainer_pod(name: str, image: str, script: str) -> Json:
    """A pod of the trainer's image with the claim `files` at /files that runs a Python script."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "securityContext": pods.POD_SECURITY,
            "containers": [
                {
                    "name": "main",
                    "image": image,
                    "command": ["python", "-c", script],
                    "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}],
                    "securityContext": pods.CONTAINER_SECURITY,
                    "volumeMounts": [{"name": "files", "mountPath": "/files"}],
                }
            ],
            "volumes": [{"name": "files", "persistentVolumeClaim": {"claimName": "files"}}],
        },
    }


def run_pod(kubectl: Kubectl, name: str, image: str, script: str, *, seconds: float) -> str:
    """What the script printed. Fails when it does not succeed in time."""
    kubectl("delete", "pod", name, "--ignore-not-found", "--wait")
    kubectl("create", "-f", "-", body=trainer_pod(name, image, script))
    phase = wait_for(
        f"pod {name}",
        lambda: phase_of(kubectl, name) if phase_of(kubectl, name) in ("Succeeded", "Failed") else None,
        seconds=seconds,
    )
    log = kubectl("logs", name)
    assert phase == "Succeeded", log
    kubectl("delete", "pod", name, "--wait=false")
    return log


def phase_of(kubectl: Kubectl, pod: str) -> str | None:
    found = kubectl.get("pod", pod)
    return found["status"]["phase"] if found else None


def prepare(kubectl: Kubectl, image: str) -> None:
    """The tiny model and its rows, made in the cluster, so that nothing has to be copied into a volume."""
    script = inspect.getsource(tiny) + (
        "\n\nbuild_model(Path('/files/tiny'))\n"
        "write_jsonl(Path('/files/chat.jsonl'), chat_rows(), times=8)\n"
        "write_jsonl(Path('/files/many.jsonl'), chat_rows(), times=50)\nprint('prepared')\n"
    )
    assert "prepared" in run_pod(kubectl, "prepare", image, script, seconds=PREPARE_SECONDS)


def job(name: str, /, **spec: Any) -> Json:
    """A FineTuneJob that trains the tiny model from the claim and saves checkpoints there."""
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": {
            "model": {"uri": "pvc://files/tiny"},
            "method": {"type": "LoRA", "lora": {"r": 8, "alpha": 16}},
            "dataset": {"sources": [{"uri": "pvc://files/chat.jsonl"}]},
            "hyperparameters": {"maxSteps": 20, "globalBatchSize": 8, "maxLength": 64, "learningRate": 0.01},
            "resources": {"cpu": CPU, "memory": "3Gi"},
            "checkpoint": {"uri": f"pvc://files/checkpoints/{name}", "everySteps": 20},
            "output": {"uri": f"pvc://files/artifacts/{name}-{int(time.time())}"},
            **spec,
        },
    }


def head_pod(kubectl: Kubectl, name: str) -> Json:
    """The one head pod of a job that is not being deleted."""
    found = kubectl.items("pods", "-l", f"finetune.dev/job={name}")
    (pod,) = [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]
    return pod


def at_work(kubectl: Kubectl) -> list[str]:
    """Pods that have not ended. KubeRay keeps submitters, which have, for their logs."""
    ended = ("Succeeded", "Failed")
    return [pod["metadata"]["name"] for pod in kubectl.items("pods") if pod["status"]["phase"] not in ended]


def left(kubectl: Kubectl, job: str) -> list[str]:
    """What is in the cluster of a job that was deleted."""
    names = kubectl("get", KINDS, "-o", "name").split()
    return [name for name in names if name.partition("/")[2].startswith(f"{job}-")]


def delete(kubectl: Kubectl, job: str) -> None:
    """Delete a job and see that nothing of it stays. A trainer may save a checkpoint first."""
    kubectl("delete", "ftj", job, "--wait", "--timeout=60s")
    wait_for(f"nothing left of {job}", lambda: not left(kubectl, job), seconds=150)


def run_in_head(kubectl: Kubectl, job: str, script: str) -> str:
    """What a Python script prints in the head pod's container."""
    pod = head_pod(kubectl, job)["metadata"]["name"]
    return kubectl("exec", pod, "-c", naming.HEAD_CONTAINER, "--", "python", "-c", script)


def leader(system: Kubectl) -> str:
    """Name of the pod that holds the Lease; empty where nobody does."""
    lease = system.get("lease", chart_pages.NAME) or {}
    identity: str = lease.get("spec", {}).get("holderIdentity", "")
    return identity.split("_")[0]


def wait_for(what: str, look: Callable[[], Any], *, seconds: float) -> Any:
    """The first true value of `look`. A request that fails on the way is asked again."""
    deadline = time.monotonic() + seconds
    last: object = None
    while time.monotonic() < deadline:
        try:
            if last := look():
                return last
        except KubectlError as error:
            last = error
        time.sleep(0.5)
    raise AssertionError(f"{what}: not within {seconds:.0f} s; last: {last}")

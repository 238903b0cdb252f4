"""What the cluster holds before a user comes: identities, CRDs, the node, three volumes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import psutil
import yaml

from finetune_local import kubeapi, layouts

NODE = "local"
MANIFESTS = Path(__file__).parent / "manifests"


def apply_file(client: kubeapi.ApiClient, path: Path) -> None:
    """Server-side apply every document of a small YAML file."""
    for document in yaml.safe_load_all(path.read_text()):
        if document:
            client.apply(kubeapi.path_of(document), document)


def apply_crds(client: kubeapi.ApiClient, files: Iterable[Path], *, memory: Path) -> list[str]:
    """Apply CRD files (one CRD each) and return their names.

    KubeRay's are up to 1.4 MB each: parsing them takes seconds, so the bytes are sent as they are, and a file that
    `memory` knows and the server still has is left out.
    """
    known: dict[str, str] = json.loads(memory.read_text()) if memory.exists() else {}
    names = []
    for path in files:
        content = path.read_bytes()
        name = _crd_name(content, path)
        names.append(name)
        digest = hashlib.sha256(content).hexdigest()
        api_path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}"
        if known.get(name) != digest or client.get(api_path) is None:
            client.apply(api_path, content)
            known[name] = digest
    for name in names:
        _await_established(client, name)
    layouts.write_private(memory, json.dumps(known))
    return names


def _await_established(client: kubeapi.ApiClient, name: str) -> None:
    """Until then its kind is not served, and who starts a watch fails. Raises ApiError after 20 s."""
    path = f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}"
    for _ in range(200):
        conditions = client.call("GET", path).get("status", {}).get("conditions") or []
        if any(item["type"] == "Established" and item["status"] == "True" for item in conditions):
            return
        time.sleep(0.1)
    raise kubeapi.ApiError(0, f"the CRD {name} was accepted but is not served: {conditions}")


def _crd_name(content: bytes, path: Path) -> str:
    """`metadata.name` without parsing the whole document: the lines of the metadata block end where `spec:` begins."""
    head = content.split(b"\nspec:", 1)[0]
    document = yaml.safe_load(head)
    if not isinstance(document, dict) or document.get("kind") != "CustomResourceDefinition":
        raise ValueError(f"{path} is not one CustomResourceDefinition with `spec:` after `metadata:`")
    return str(document["metadata"]["name"])


def apply_node(client: kubeapi.ApiClient) -> None:
    """The one node, with what this machine has. KWOK makes it Ready."""
    node: kubeapi.Object = {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": NODE,
            "labels": {"kubernetes.io/hostname": NODE, "kubernetes.io/os": "linux"},
        },
    }
    path = kubeapi.path_of(node)
    client.apply(path, node)
    resources = capacity()
    client.apply(f"{path}/status", {**node, "status": {"capacity": resources, "allocatable": resources}})


def node_is_ready(client: kubeapi.ApiClient) -> bool:
    node = client.get(f"/api/v1/nodes/{NODE}", timeout=2) or {}
    conditions = node.get("status", {}).get("conditions", [])
    ready = any(item["type"] == "Ready" and item["status"] == "True" for item in conditions)
    # The scheduler counts only what is allocatable, and places nothing while the not-ready taint is there.
    return ready and bool(node["status"].get("allocatable")) and not node.get("spec", {}).get("taints")


def capacity() -> dict[str, str]:
    """CPUs that we may use, memory, and NVIDIA GPUs where there are any, as Kubernetes quantities."""
    resources = {
        "cpu": str(usable_cpus()),
        "memory": f"{psutil.virtual_memory().total >> 20}Mi",
        "ephemeral-storage": f"{shutil.disk_usage('/').total >> 20}Mi",
        "pods": "110",
    }
    gpus = count_gpus()
    if gpus:
        resources["nvidia.com/gpu"] = str(gpus)
    return resources


def usable_cpus() -> int:
    """CPUs that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else (os.cpu_count() or 1)


def count_gpus() -> int:
    """NVIDIA GPUs according to the driver's own tool; 0 where there is no driver."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    try:
        done = subprocess.run([tool, "--list-gpus"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines()) if done.returncode == 0 else 0


def apply_volumes(client: kubeapi.ApiClient, folders: dict[str, Path]) -> None:
    """For each name a claim in namespace default that is bound to a hostPath volume of this machine.

    A volume whose folder changed is replaced: the source of a PersistentVolume cannot be edited.
    """
    for name, folder in folders.items():
        volume, claim = _volume(name, folder), _claim(name)
        existing = client.get(kubeapi.path_of(volume))
        if existing and existing["spec"].get("hostPath", {}).get("path") != str(folder):
            for manifest in (claim, volume):
                _delete_now(client, kubeapi.path_of(manifest))
        client.apply(kubeapi.path_of(volume), volume)
        client.apply(kubeapi.path_of(claim), claim)


def _delete_now(client: kubeapi.ApiClient, path: str) -> None:
    """Delete without the protection finalizer: nothing is lost, the folder stays."""
    if client.get(path) is None:
        return
    client.call("DELETE", path)
    if client.get(path) is not None:
        patch = {"metadata": {"finalizers": None}}
        client.call("PATCH", path, patch, content_type="application/merge-patch+json")


def _volume(name: str, folder: Path) -> kubeapi.Object:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": f"local-{name}"},
        "spec": {
            "capacity": {"storage": "1Ti"},
            "accessModes": ["ReadWriteMany"],
            "persistentVolumeReclaimPolicy": "Retain",
            "storageClassName": "",
            "hostPath": {"path": str(folder)},
            "claimRef": {"namespace": "default", "name": name},
        },
    }


def _claim(name: str) -> kubeapi.Object:
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "accessModes": ["ReadWriteMany"],
            "storageClassName": "",
            "volumeName": f"local-{name}",
            "resources": {"requests": {"storage": "1Ti"}},
        },
    }

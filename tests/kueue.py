"""The real Kueue beside a cluster of the tests.

Its webhooks are not registered: the API server would call them by a Service, which no network leads to here. So its
CRDs get only the version that it works with (the others need a webhook that converts), and what its webhooks would set
in a RayJob, our operator sets itself. The visibility API, which tells positions, is reached by a Service that is a
name: localhost. The API server has no certificate to show there, so it comes as nobody, who may read there.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import yaml

from finetune_local import binaries, certificates
from finetune_local.cluster import Cluster
from finetune_local.ports import pick
from tests.clients import Json, Kubectl
from tests.waiting import wait_until

GROUP, VERSION = "kueue.x-k8s.io", "v1beta2"
SYSTEM = "kueue-system"
VISIBILITY, VISIBILITY_PORT = f"visibility.{GROUP}", 8082  # the port is fixed
# So are the paths of its certificates, in a root of its own therefore.
START = "mount --bind {program} {root}/kueue && exec unshare --root={root} /kueue --config /kueue.yaml"


@contextlib.contextmanager
def started(cluster: Cluster, folder: Path) -> Iterator[None]:
    """Kueue with its CRDs, for RayJobs."""
    found = binaries.obtain(["kueue"], sources=binaries.Sources.from_environment(), announce=print)
    assert found.crds is not None
    kubectl = Kubectl(cluster.kubeconfig, SYSTEM)
    for crd in _crds(found.crds):
        kubectl("apply", "--server-side", "-f", "-", body=crd)
    kubectl("wait", "--for=condition=Established", "crd", "--all", "--timeout=30s")
    kubectl("create", "namespace", SYSTEM)
    kubectl("create", "serviceaccount", "kueue")
    kubectl(
        "create",
        "clusterrolebinding",
        "kueue",
        "--clusterrole=cluster-admin",
        f"--serviceaccount={SYSTEM}:kueue",
    )
    (health,) = pick(1)
    _show_positions(kubectl)
    root = _root(cluster, kubectl, folder, health)
    script = START.format(program=found.programs["kueue"], root=root)
    log = folder / "kueue.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
            env={
                "KUBERNETES_SERVICE_HOST": "127.0.0.1",
                "KUBERNETES_SERVICE_PORT": str(cluster.ports["kube-apiserver"]),
                "PATH": os.defpath,
            },
            stdout=stream,
            stderr=stream,
        )
    try:
        url = f"http://127.0.0.1:{health}/readyz"
        wait_until(lambda: _answers(url), what=lambda: log.read_text()[-4000:])
        yield
    finally:
        process.kill()
        process.wait(timeout=20)


def queue(kubectl: Kubectl, name: str, *, cpu: str) -> None:
    """A LocalQueue in the namespace, with a ClusterQueue of its own that has so much CPU."""
    resources = [{"name": "cpu", "nominalQuota": cpu}, {"name": "memory", "nominalQuota": "64Gi"}]
    flavors = {
        "coveredResources": ["cpu", "memory"],
        "flavors": [{"name": "default", "resources": resources}],
    }
    cluster_queue = f"{kubectl.namespace}-{name}"
    for kind, its_name, spec in (
        ("ResourceFlavor", "default", {}),
        ("ClusterQueue", cluster_queue, {"namespaceSelector": {}, "resourceGroups": [flavors]}),
        ("LocalQueue", name, {"clusterQueue": cluster_queue}),
    ):
        kubectl.apply(
            {
                "apiVersion": f"{GROUP}/{VERSION}",
                "kind": kind,
                "metadata": {"name": its_name},
                "spec": spec,
            }
        )


def _crds(folder: Path) -> Iterator[Json]:
    for file in sorted(folder.glob("*.yaml")):
        crd: Json = yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
        versions = {version["name"]: version for version in crd["spec"]["versions"]}
        if VERSION in versions:
            crd["spec"]["versions"] = [versions[VERSION] | {"storage": True}]
        yield crd


def _show_positions(kubectl: Kubectl) -> None:
    """Register the visibility API, as Kueue's manifests do."""
    name = "visibility"
    service = {"type": "ExternalName", "externalName": "localhost"}
    kubectl.apply({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": service})
    where = {"name": name, "namespace": SYSTEM, "port": VISIBILITY_PORT}
    spec = {"group": VISIBILITY, "version": VERSION, "service": where, "insecureSkipTLSVerify": True}
    kubectl.apply(
        {
            "apiVersion": "apiregistration.k8s.io/v1",
            "kind": "APIService",
            "metadata": {"name": f"{VERSION}.{VISIBILITY}"},
            "spec": {**spec, "groupPriorityMinimum": 100, "versionPriority": 100},
        }
    )
    rules = [
        {"apiGroups": [VISIBILITY], "resources": ["localqueues/pendingworkloads"], "verbs": ["get"]},
        {"nonResourceURLs": ["/apis", f"/apis/{VISIBILITY}/*", "/openapi/*"], "verbs": ["get"]},
    ]
    kubectl.apply(
        {
            "apiVersion": "rbac.authorization.k8s.io/v1",
            "kind": "ClusterRole",
            "metadata": {"name": name},
            "rules": rules,
        }
    )
    kubectl("create", "clusterrolebinding", name, f"--clusterrole={name}", "--user=system:anonymous")


def _root(cluster: Cluster, kubectl: Kubectl, folder: Path, health: int) -> Path:
    made = certificates.pair(cluster.layout.pki, "kube-apiserver")
    root = folder / "root"
    for place in (root / "etc/kueue/metrics/certs", root / "visibility"):
        place.mkdir(parents=True)
        shutil.copy(made.certificate, place / "tls.crt")
        shutil.copy(made.key, place / "tls.key")
    account = root / "var/run/secrets/kubernetes.io/serviceaccount"
    account.mkdir(parents=True)
    shutil.copy(cluster.layout.pki / "ca.crt", account)
    (account / "token").write_text(kubectl("create", "token", "kueue").strip())
    (root / "kueue").touch()
    (root / "kueue.yaml").write_text(_config(health))
    return root


def _config(health: int) -> str:
    (webhook,) = pick(1)
    config = {
        "apiVersion": f"config.{GROUP}/{VERSION}",
        "kind": "Configuration",
        "namespace": SYSTEM,
        "health": {"healthProbeBindAddress": f"127.0.0.1:{health}"},
        "metrics": {"bindAddress": "0"},
        "webhook": {"host": "127.0.0.1", "port": webhook, "certDir": "/visibility"},
        "leaderElection": {"leaderElect": False},
        "internalCertManagement": {"enable": False},
        "integrations": {"frameworks": ["ray.io/rayjob"]},
    }
    return json.dumps(config)


def _answers(url: str) -> bool:
    with urllib.request.urlopen(url, timeout=2) as response:
        return bool(response.status == 200)

"""The real Kueue beside a cluster of the tests.

Its webhooks are not registered: the API server would call them by a Service, which no network leads to here. So its
CRDs get only the version that it works with (the others need a webhook that converts), and what its webhooks would set
in a RayJob, our operator sets itself. The visibility API, which tells positions, is off for the same reason.
"""

from __future__ import annotations

import contextlib
import json
import os
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
# The path of its certificates is fixed; a private /etc needs no rights on this machine's.
START = (
    "mount -t tmpfs none /etc && mkdir -p /etc/kueue/metrics && ln -s {certificates} /etc/kueue/metrics/certs && "
    "exec {program} --config {config}"
)


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
    (health,) = pick(1)
    script = START.format(
        certificates=_certificates(cluster, folder),
        program=found.programs["kueue"],
        config=_config(folder, health),
    )
    log = folder / "kueue.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
            env={
                "KUBECONFIG": str(cluster.kubeconfig),
                "HOME": str(folder),
                "USER": "kueue",
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


def _certificates(cluster: Cluster, folder: Path) -> Path:
    made = certificates.pair(cluster.layout.pki, "kube-apiserver")
    place = folder / "certificates"
    place.mkdir()
    (place / "tls.crt").symlink_to(made.certificate)
    (place / "tls.key").symlink_to(made.key)
    return place


def _config(folder: Path, health: int) -> Path:
    (webhook,) = pick(1)
    config = {
        "apiVersion": f"config.{GROUP}/{VERSION}",
        "kind": "Configuration",
        "namespace": SYSTEM,
        "health": {"healthProbeBindAddress": f"127.0.0.1:{health}"},
        "metrics": {"bindAddress": "0"},
        "webhook": {"host": "127.0.0.1", "port": webhook, "certDir": str(folder / "certificates")},
        "leaderElection": {"leaderElect": False},
        "internalCertManagement": {"enable": False},
        "featureGates": {"VisibilityOnDemand": False},
        "integrations": {"frameworks": ["ray.io/rayjob"]},
    }
    path = folder / "kueue.yaml"
    path.write_text(json.dumps(config))
    return path


def _answers(url: str) -> bool:
    with urllib.request.urlopen(url, timeout=2) as response:
        return bool(response.status == 200)

"""Operators as processes of their own on a real API server, with KubeRay and the trainers played."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from benchmarks.rayjob_player import Player, Story, all_well
from finetune_local import binaries, kubeapi, objects
from finetune_local.cluster import Cluster
from finetune_local.ports import choose
from tests.clients import FINAL, Kubectl, KubectlError
from tests.clusters import api_server
from tests.waiting import wait_until

Json = dict[str, Any]
ROOT = Path(__file__).parents[2]
RIGHTS = ROOT / "operator" / "finetune_local" / "manifests" / "operator-rbac.yaml"
START_SECONDS = 120.0  # a moment, where nobody else needs the cores
PARTS = ("etcd", "kube-apiserver", "kube-controller-manager")


@contextlib.contextmanager
def played_cluster(folder: Path) -> Iterator[Cluster]:
    """An API server with its garbage collector and KubeRay's CRDs, and no KubeRay."""
    with api_server(folder, "kube-controller-manager") as running:
        apply_ray_crds(running)
        yield running


def apply_ray_crds(cluster: Cluster) -> None:
    def quiet(line: str) -> None:
        del line

    found = binaries.obtain(
        ["kuberay-operator"], sources=binaries.Sources.from_environment(), announce=quiet, detail=quiet
    )
    if found.crds is None:
        raise RuntimeError("KubeRay's CRDs come with its program")
    files = [
        path for path in found.crds.glob("*.yaml") if "rayjobs" in path.name or "rayclusters" in path.name
    ]
    objects.apply_crds(cluster.client(), files, memory=cluster.layout.run / "applied-ray.state")


def compact(cluster: Cluster) -> None:
    """Make etcd forget all revisions but the last one, through its JSON gateway."""
    server = f"https://127.0.0.1:{cluster.ports['etcd']}"
    etcd = kubeapi.ApiClient(server, pki=cluster.layout.pki, user="etcd-client")
    revision = etcd.call("POST", "/v3/maintenance/status", {})["header"]["revision"]
    etcd.call("POST", "/v3/kv/compaction", {"revision": revision, "physical": True})


def grant_own_rights(kubectl: Kubectl) -> None:
    """What the operator may do in its own namespace, in the test's: that is where its Lease and routes are here."""
    documents = yaml.safe_load_all(RIGHTS.read_text(encoding="utf-8"))
    for document in documents:
        if document["kind"] in ("Role", "RoleBinding"):
            kubectl.apply({**document, "metadata": {**document["metadata"], "namespace": kubectl.namespace}})


class Operator:
    """One replica. `kubeconfig` may lead to a proxy."""

    def __init__(self, folder: Path, kubeconfig: Path, namespace: str, /, **environment: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.ports = choose(("metrics", "status"), known={}, in_use_by_us=[])
        self.process: subprocess.Popen[bytes] | None = None
        self.program = [sys.executable, "-m", "finetune_operator"]
        self._environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT / "operator"),
            "KUBECONFIG": str(kubeconfig),
            "FINETUNE_NAMESPACES": namespace,
            "FINETUNE_NAMESPACE": namespace,
            "FINETUNE_LOG_FORMAT": "plain",
            "FINETUNE_OUTPUT_URI": "file:///artifacts",
            "FINETUNE_STATUS_HOST": "127.0.0.1",
            "FINETUNE_STATUS_PORT": str(self.ports["status"]),
            "FINETUNE_STATUS_URL": f"http://127.0.0.1:{self.ports['status']}",
            "FINETUNE_METRICS_HOST": "127.0.0.1",
            "FINETUNE_METRICS_PORT": str(self.ports["metrics"]),
            "FINETUNE_POD_IP": "127.0.0.1",
            "FINETUNE_PROGRESS_SECONDS": "1",
            **environment,
        }

    def start(self) -> None:
        """Start it; it is not waited for."""
        with (self.folder / "operator.log").open("ab") as log:
            self.process = subprocess.Popen(
                self.program,
                env=self._environment,
                stdout=log,
                stderr=log,
                cwd=ROOT,
            )

    def signal(self, number: int) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait for it."""
        self.signal(signal.SIGKILL)
        if self.process is not None:
            self.process.wait(timeout=10)

    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def log(self) -> str:
        return (self.folder / "operator.log").read_text()

    def get(self, path: str) -> str:
        """What the metrics port answers; empty where it does not, the status code first where it is no 200."""
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self.ports['metrics']}{path}", timeout=5
            ) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as error:
            return f"{error.code} {error.read().decode()}"
        except OSError:
            return ""

    def wait_healthy(self) -> None:
        """Wait until it answers; a machine that is busy takes its time to start it."""
        wait_until(
            lambda: self.get("/healthz") == "ok\n", seconds=START_SECONDS, what="the operator does not start"
        )

    def leads(self) -> bool:
        return "finetune_leader 1.0" in self.get("/metrics")


class Keeper:
    """Starts an operator again whenever it has ended, as a kubelet does, until `close`."""

    def __init__(self, operator: Operator) -> None:
        self.operator = operator
        self.starts = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            if not self.operator.is_alive():
                self.starts += 1
                self.operator.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=10)
        self.operator.kill()


class Stage:
    """KubeRay and the trainers, played in a thread, and the questions that tests ask about jobs."""

    def __init__(
        self, cluster: Cluster, kubectl: Kubectl, *, story: Story = all_well, pace: float = 0.05
    ) -> None:
        self.kubectl = kubectl
        grant_own_rights(kubectl)
        server = f"https://127.0.0.1:{cluster.ports['kube-apiserver']}"
        self.player = Player(
            server, kubeapi.client_context(cluster.layout.pki, "admin"), story=story, pace=pace
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._playing = asyncio.run_coroutine_threadsafe(self.player.run(), self._loop)

    def close(self) -> None:
        self._playing.cancel()
        time.sleep(0.1)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)

    def apply(self, *names: str, **spec: Any) -> None:
        items = [small_job(name, **spec) for name in names]
        self.kubectl("apply", "-f", "-", body={"apiVersion": "v1", "kind": "List", "items": items})

    def statuses(self) -> dict[str, Json]:
        """Job -> status; empty while the API server is away."""
        try:
            return {
                body["metadata"]["name"]: body.get("status", {})
                for body in self.kubectl.items("finetunejobs")
            }
        except (KubectlError, subprocess.TimeoutExpired):
            return {}

    def finished(self, *names: str, seconds: float = 60) -> dict[str, Json]:
        """The statuses of these jobs once all have ended."""
        deadline = time.monotonic() + seconds
        while True:
            if self._playing.done():
                self._playing.result()  # raises what ended it
            found = self.statuses()
            if all(found.get(name, {}).get("phase") in FINAL for name in names):
                return found
            late = {
                name: (found.get(name, {}).get("phase"), found.get(name, {}).get("message"))
                for name in names
                if found.get(name, {}).get("phase") not in FINAL
            }
            assert time.monotonic() < deadline, json.dumps(late, indent=1)
            time.sleep(0.2)

    def reached(self, name: str, phase: str, *, seconds: float = 60) -> Json:
        """The status of a job as soon as it is in this phase."""
        last: Json = {}

        def look() -> Json | None:
            nonlocal last
            last = self.statuses().get(name, last)
            return last if last.get("phase") == phase else None

        return wait_until(look, seconds=seconds, what=lambda: f"{name}: {last}")

    def suspend(self, name: str, wanted: bool) -> None:
        self.kubectl("patch", "ftj", name, "--type=merge", "-p", json.dumps({"spec": {"suspend": wanted}}))

    def created_twice(self) -> dict[tuple[str, str], int]:
        """UID of a job and name of a RayJob -> how often it was created, where that was more than once."""
        return {name: len(uids) for name, uids in self.player.seen.owned.items() if len(uids) > 1}

    def rayjobs_ever(self) -> dict[str, int]:
        """RayJob -> how often it was created. Only this test's namespace counts."""
        prefix = f"{self.kubectl.namespace}/"
        return {
            name.removeprefix(prefix): len(uids)
            for name, uids in self.player.seen.uids.items()
            if name.startswith(prefix)
        }


@contextlib.contextmanager
def staged(cluster: Cluster, namespace: str, *, story: Story = all_well) -> Iterator[Stage]:
    """A stage in a new namespace."""
    kubectl = Kubectl(cluster.kubeconfig, namespace)
    kubectl("create", "namespace", namespace)
    playing = Stage(cluster, kubectl, story=story)
    try:
        yield playing
    finally:
        playing.close()


def small_job(name: str, /, **spec: Any) -> Json:
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": {
            "model": {"uri": "file:///model"},
            "method": {"type": "LoRA"},
            "dataset": {"sources": [{"uri": "file:///data.jsonl"}]},
            "resources": {"cpu": "1", "memory": "1Gi"},
            **spec,
        },
    }

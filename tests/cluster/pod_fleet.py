"""A fleet of jobs in real pods, and what may happen to it and to the node under it."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import ClassVar

import psutil

from tests import trainers
from tests.chaos.fleets import Fleet, choose
from tests.clients import Json, Kubectl
from tests.cluster.conftest import install
from tests.cluster.objects import LONG, Settings, job

INTERVAL = 20  # steps between checkpoints
STEPS = 120
AWAY_SECONDS = 20  # less than what makes a node NotReady
FROZEN_SECONDS = 10


class PodFleet(Fleet):
    """Jobs in K8sJobMode and, after an upgrade of the chart, in SidecarMode."""

    WEIGHTS: ClassVar[dict[str, float]] = {
        "trainer killed": 4, "raylet killed": 2, "gcs killed": 2, "dashboard killed": 1, "pod deleted": 2,
        "pod torn away": 2, "pod evicted": 2, "submitter killed": 1, "rayjob deleted": 1, "raycluster deleted": 2,
        "suspend": 1.5, "resume": 4, "operator killed": 3, "kuberay killed": 2, "kubelet away": 1.5,
        "containerd away": 1, "apiserver frozen": 2, "coredns deleted": 1, "mode changed": 1.5,
    }  # fmt: skip

    def __init__(self, kubectl: Kubectl, settings: Settings, *, volume: Path, size: int) -> None:
        super().__init__(kubectl, size=size)
        self.settings = settings
        self.volume = volume
        self.mode = "K8sJobMode"

    def body(self, name: str) -> Json:
        checkpoint = {"uri": f"pvc://files/checkpoints/{name}", "everySteps": INTERVAL}
        hyper = {**LONG, "maxSteps": STEPS}
        return job(name, hyperparameters=hyper, checkpoint=checkpoint, retry=self.retry(name))

    # ------------------------------------------------------------ processes of a job

    def trainer_killed(self, pick: float) -> str:
        return self._kill("finetune-trainer", pick)

    def raylet_killed(self, pick: float) -> str:
        return self._kill("raylet", pick)

    def gcs_killed(self, pick: float) -> str:
        return self._kill("gcs_server", pick)

    def dashboard_killed(self, pick: float) -> str:
        return self._kill("dashboard.py", pick)

    def _kill(self, word: str, pick: float) -> str:
        found: dict[str, list[psutil.Process]] = {}
        for process in psutil.process_iter():
            work = trainers.work_of(process)
            if work is None or work[0] != self.kubectl.namespace:
                continue
            with contextlib.suppress(psutil.Error):
                if any(each.endswith(word) for each in process.cmdline()[:3]):
                    found.setdefault(f"{work[1]}-a{work[2]}", []).append(process)
        name = choose(list(found), pick)
        for process in found[name]:
            process.kill()
        return name

    # ------------------------------------------------------------ pods and what owns them

    def pod_deleted(self, pick: float) -> str:
        return self._delete_pod(self._pod(pick))

    def pod_torn_away(self, pick: float) -> str:
        return self._delete_pod(self._pod(pick), "--grace-period=0", "--force")

    def pod_evicted(self, pick: float) -> str:
        name = self._pod(pick)
        path = f"/api/v1/namespaces/{self.kubectl.namespace}/pods/{name}/eviction"
        metadata = {"name": name, "namespace": self.kubectl.namespace}
        body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": metadata}
        self.kubectl("create", "--raw", path, "-f", "-", body=body)
        return name

    def submitter_killed(self, pick: float) -> str:
        names = [
            pod["metadata"]["name"]
            for pod in self.kubectl.items("pods", "-l", "batch.kubernetes.io/job-name")
            if pod["status"]["phase"] in ("Pending", "Running")
        ]
        return self._delete_pod(choose(names, pick), "--grace-period=0", "--force")

    def raycluster_deleted(self, pick: float) -> str:
        name = choose(self._names_of("raycluster"), pick)
        self.kubectl("delete", "raycluster", name, "--wait=false")
        return name

    def _pod(self, pick: float) -> str:
        return choose(self._names_of("pod"), pick)

    def _delete_pod(self, name: str, *flags: str) -> str:
        self.kubectl("delete", "pod", name, "--wait=false", *flags)
        return name

    # ------------------------------------------------------------ the cluster

    def operator_killed(self, pick: float) -> str:
        """The one that leads, or the one that stands by."""
        return self._kill_elsewhere("finetune-operator", pick)

    def kuberay_killed(self, pick: float) -> str:
        return self._kill_elsewhere("kuberay-operator", pick)

    def coredns_deleted(self, pick: float) -> str:
        return self._kill_elsewhere("coredns", pick)

    def _kill_elsewhere(self, beginning: str, pick: float) -> str:
        """A pod of the platform, by how its name begins."""
        everywhere = [pod["metadata"] for pod in self.kubectl.items("pods", "--all-namespaces")]
        found = {pod["name"]: pod["namespace"] for pod in everywhere if pod["name"].startswith(beginning)}
        name = choose(list(found), pick)
        return self._delete_pod(name, f"--namespace={found[name]}", "--grace-period=0", "--force")

    def kubelet_away(self, pick: float) -> str:
        return self._stand_still("kubelet", AWAY_SECONDS)

    def containerd_away(self, pick: float) -> str:
        return self._stand_still("containerd", FROZEN_SECONDS)

    def apiserver_frozen(self, pick: float) -> str:
        return self._stand_still("kube-apiserver", FROZEN_SECONDS)

    def _stand_still(self, part: str, seconds: float) -> str:
        process = self._part(part)
        process.suspend()
        try:
            time.sleep(seconds)
        finally:
            process.resume()
        return part

    def _part(self, part: str) -> psutil.Process:
        """The program that lies beside the kubelet: another cluster may run on this machine."""
        program = str(Path(psutil.Process(self.settings.kubelet).exe()).with_name(part))
        return next(process for process in psutil.process_iter(["exe"]) if process.info["exe"] == program)

    def mode_changed(self, pick: float) -> str:
        """An upgrade of the chart: attempts that begin later are submitted the other way."""
        self.mode = "SidecarMode" if self.mode == "K8sJobMode" else "K8sJobMode"
        install(self.settings, submission_mode=self.mode)
        return self.mode

"""Fleets of jobs that chaos is let loose on; what a real one and a played one have in common."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

from finetune_local.cluster import Cluster
from finetune_local.errors import LocalClusterError
from finetune_operator.manifests import naming
from tests.clients import FINAL, Json, Kubectl, KubectlError
from tests.clusters import pid_of

BACKOFF = {"min": 0, "max": 2}
AMPLE = {
    "maxInfraRetries": 1000,
    "maxUserRetries": 1000,
    "preemptions": "Unlimited",
    "backoffSeconds": BACKOFF,
}
SMALL = (
    {"maxInfraRetries": 2, "maxUserRetries": 0, "preemptions": 2, "backoffSeconds": BACKOFF},
    {"maxInfraRetries": 1, "maxUserRetries": 1, "preemptions": 3, "backoffSeconds": BACKOFF},
)
ACTION = "finetune.dev/action"
TRIES = 5
HELD = '{"spec":{"suspend":true}}'
RELEASED = '{"spec":{"suspend":false}}'


class Fleet:
    """`size` jobs at any time; one that has ended is replaced until `closed`."""

    def __init__(self, kubectl: Kubectl, *, size: int) -> None:
        self.kubectl = kubectl
        self.size = size
        self.names: list[str] = []
        self.excused: set[str] = set()
        """Jobs that need not succeed: a person has ended them."""

    def body(self, name: str) -> Json:
        raise NotImplementedError

    def fill(self) -> None:
        missing = self.size - len(self.unfinished())
        for _ in range(missing):
            name = f"j{len(self.names) + 1}"
            self.kubectl.apply(self.body(name))
            self.names.append(name)

    @staticmethod
    def retry(name: str) -> Json:
        """Every third job may not fail as often as it likes."""
        number = int(name.removeprefix("j"))
        return AMPLE if number % 3 else SMALL[number // 3 % len(SMALL)]

    def jobs(self) -> list[Json]:
        """All jobs that exist; asked again for as long as the API server is away."""
        deadline = time.monotonic() + 60
        while True:
            try:
                return self.kubectl.items("ftj")
            except KubectlError:
                assert time.monotonic() < deadline, "the API server does not come back"
                time.sleep(0.3)

    def unfinished(self) -> list[str]:
        return [j["metadata"]["name"] for j in self.jobs() if j.get("status", {}).get("phase") not in FINAL]

    # ------------------------------------------------------------ faults that both know

    def happen(self, fault: str, pick: float) -> str:
        """Do it to somebody; returns to whom, or why to nobody."""
        act: Callable[[float], str] = getattr(self.actor(fault), fault.replace(" ", "_"))
        try:
            return act(pick)
        except KubectlError as error:  # gone meanwhile, or the API server is away: another fault is at work
            return str(error).splitlines()[0][:100]

    def actor(self, fault: str) -> object:
        """Whose method the fault is."""
        return self

    def suspend(self, pick: float) -> str:
        return self._patch_job(pick, suspend=True)

    def resume(self, pick: float) -> str:
        held = [j["metadata"]["name"] for j in self.jobs() if j["spec"].get("suspend")]
        return self._patch(choose(held, pick), suspend=False)

    def cancel(self, pick: float) -> str:
        name = choose(self.unfinished(), pick)
        self.excused.add(name)
        self.kubectl("annotate", "ftj", name, f"{ACTION}=cancel", "--overwrite")
        return name

    def job_deleted(self, pick: float) -> str:
        name = choose(self.unfinished(), pick)
        self.kubectl("delete", "ftj", name, "--wait=false")
        return name

    def job_replaced(self, pick: float) -> str:
        """Deleted, and there again under its name before what it started is gone."""
        name = choose(self.unfinished(), pick)
        self.kubectl("delete", "ftj", name, "--wait=false")
        self.kubectl.apply(self.body(name))
        return name

    def rayjob_deleted(self, pick: float) -> str:
        name = choose(self._names_of("rayjob"), pick)
        self.kubectl("delete", "rayjob", name, "--wait=false")
        return name

    def rayjob_held(self, pick: float) -> str:
        name = choose(self._names_of("rayjob"), pick)
        self.kubectl("patch", "rayjob", name, "--type=merge", "-p", HELD)
        return name

    def rayjob_released(self, pick: float) -> str:
        held = [b["metadata"]["name"] for b in self.kubectl.items("rayjob") if b["spec"].get("suspend")]
        self.kubectl("patch", "rayjob", choose(held, pick), "--type=merge", "-p", RELEASED)
        return choose(held, pick)

    def heal(self) -> None:
        """Nobody holds anything any more."""
        for body in self.jobs():
            if body["spec"].get("suspend"):
                self._patch(body["metadata"]["name"], suspend=False)
        for body in self.kubectl.items("rayjob"):
            if body["spec"].get("suspend"):
                self.kubectl("patch", "rayjob", body["metadata"]["name"], "--type=merge", "-p", RELEASED)

    def _patch_job(self, pick: float, **spec: Any) -> str:
        return self._patch(choose(self.unfinished(), pick), **spec)

    def _patch(self, name: str, **spec: Any) -> str:
        self.kubectl("patch", "ftj", name, "--type=merge", "-p", json.dumps({"spec": spec}))
        return name

    def _names_of(self, kind: str) -> list[str]:
        return [body["metadata"]["name"] for body in self.kubectl.items(kind, "-l", naming.LABEL_JOB)]


class LocalFleet(Fleet):
    """On the laptop cluster, whose parts are processes."""

    def __init__(self, cluster: Cluster, kubectl: Kubectl, parts: Sequence[str], *, size: int) -> None:
        super().__init__(kubectl, size=size)
        self.cluster = cluster
        self.parts = tuple(parts)

    def operator_killed(self, pick: float) -> str:
        return self._kill("operator")

    def operator_stands_still(self, pick: float) -> str:
        pid = pid_of(self.cluster, "operator")
        os.kill(pid, signal.SIGSTOP)
        time.sleep(1 + 3 * pick)
        os.kill(pid, signal.SIGCONT)
        return "operator"

    def apiserver_killed(self, pick: float) -> str:
        return self._kill("kube-apiserver")

    def _kill(self, part: str) -> str:
        os.kill(pid_of(self.cluster, part), signal.SIGKILL)
        up_again(self.cluster, self.parts)
        return part


def choose(names: Sequence[str], pick: float) -> str:
    """One of them. Raises KubectlError where there is none: nothing can happen then."""
    if not names:
        raise KubectlError("nobody")
    return sorted(names)[int(pick * len(names))]


def up_again(cluster: Cluster, parts: Sequence[str]) -> None:
    """What is missing is started, on a busy machine in several tries."""
    for _ in range(TRIES - 1):
        with contextlib.suppress(LocalClusterError):
            cluster.up(parts)
            return
    cluster.up(parts)

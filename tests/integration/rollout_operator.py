"""The operator as a process of its own, with simulated engines and routers, on a real API server."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Self

from finetune_local.cluster import Cluster
from finetune_local.ports import choose
from tests.clients import Json, Kubectl, KubectlError
from tests.clusters import API_SERVER, pid_of
from tests.integration.rollout_lab import AGENT_TOKEN, ROUTER_TOKEN, Engine, Loop, Router
from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
GOOD, BETTER, BAD = "a" * 8, "b" * 8, "c" * 8
COLLECTOR = "kube-controller-manager"  # of garbage


class Serving:
    """What an operator rolls out to: an engine, some routers, and users that send requests."""

    def __init__(self, folder: Path, *, routers: int = 2) -> None:
        self.folder = folder
        self.loop = Loop()
        self.engine = Engine(self.loop)
        self.engine.start()
        self.routers = [Router(self.loop) for _ in range(routers)]
        for router in self.routers:
            router.start()
        self._stop = threading.Event()
        self._traffic: list[threading.Thread] = []
        self.failed_requests = 0
        (folder / "router-token").write_text(ROUTER_TOKEN)
        (folder / "agent-token").write_text(AGENT_TOKEN)

    def operator_environment(self) -> dict[str, str]:
        return {
            "FINETUNE_ROUTER_ADMIN_URLS": ",".join(router.url for router in self.routers),
            "FINETUNE_ROUTER_TOKEN_FILE": str(self.folder / "router-token"),
            "FINETUNE_ENGINE_URL": "http://127.0.0.1:9",
            "FINETUNE_AGENT_URL": self.engine.url,
            "FINETUNE_AGENT_TOKEN_FILE": str(self.folder / "agent-token"),
            "FINETUNE_DRAIN_SECONDS": "1",
        }

    def send(
        self, fails: Callable[[str], bool] = lambda revision: False, *, alias: str = "bot", rate: float = 200
    ) -> None:
        """Traffic in the background until the lab closes: many users, spread over the routers."""

        def run() -> None:
            number = 0
            while not self._stop.wait(1 / rate):
                number += 1
                router = self.routers[number % len(self.routers)]
                if router.serve(alias, f"user {number % 997}", fails) is None:
                    self.failed_requests += 1

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self._traffic.append(thread)

    def close(self) -> None:
        self._stop.set()
        for thread in self._traffic:
            thread.join(timeout=10)
        for server in (self.engine, *self.routers):
            server.stop()
        self.loop.close()


class Lab(Serving):
    """The same with an operator of its own; `kubectl` speaks to the API server that they share."""

    def __init__(self, cluster: Cluster, kubectl: Kubectl, folder: Path, *, routers: int = 2) -> None:
        super().__init__(folder, routers=routers)
        self.cluster, self.kubectl = cluster, kubectl
        self._process: subprocess.Popen[bytes] | None = None
        self.environment: dict[str, str] = {}
        self.ports = choose(("metrics", "status"), known={})

    def start(self) -> None:
        """Start the operator; it is not waited for."""
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT / "operator"),
            "KUBECONFIG": str(self.cluster.layout.user_kubeconfig("operator")),
            "FINETUNE_NAMESPACES": self.kubectl.namespace,
            "FINETUNE_NAMESPACE": self.kubectl.namespace,
            "FINETUNE_LOG_FORMAT": "plain",
            "FINETUNE_STATUS_PORT": str(self.ports["status"]),
            "FINETUNE_METRICS_PORT": str(self.ports["metrics"]),
            **self.operator_environment(),
            **self.environment,
        }
        with (self.folder / "operator.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "finetune_operator"], env=environment, stdout=log, stderr=log, cwd=ROOT
            )

    @contextlib.contextmanager
    def running(self) -> Iterator[Self]:
        """Started; closed in the end, whatever becomes of the test."""
        self.start()
        try:
            yield self
        finally:
            self.close()

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait(timeout=10)
            self._process = None

    def stop_api_server(self) -> None:
        """SIGKILL; `start_api_server` brings it back with all that it stored."""
        os.kill(pid_of(self.cluster, "kube-apiserver"), signal.SIGKILL)

    def start_api_server(self) -> None:
        self.cluster.up((*API_SERVER, COLLECTOR))

    def close(self) -> None:
        self.kill()
        super().close()

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def log(self) -> str:
        return (self.folder / "operator.log").read_text()

    def log_time(self, pattern: str) -> float:
        """When the operator logged a line with the pattern, on the clock of time.monotonic."""
        line = next(line for line in self.log().splitlines() if re.search(pattern, line))
        stamp = datetime.strptime(line[1:24], "%Y-%m-%d %H:%M:%S,%f").astimezone()
        return time.monotonic() - (datetime.now().astimezone() - stamp).total_seconds()

    def told(self, name: str = "bot") -> list[str]:
        """Reasons of all Events of a deployment, each as often as there are Events."""
        return sorted(event["reason"] for event in self.kubectl.events(name))

    def metrics(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.ports['metrics']}/metrics", timeout=5) as answer:
            text: str = answer.read().decode()
        return text

    def candidate_requests(self, name: str = "bot") -> int:
        """Requests of the candidate that the evidence in the status counts."""
        checks = self.status(name).get("analysis", [])
        return max(
            (c.get("n", {}).get("candidate", 0) for c in checks if c["kind"] == "Guardrail"), default=0
        )

    # -- objects

    def deploy(self, revision: str, *, name: str = "bot", **spec: Any) -> None:
        self.kubectl.apply(deployment(name, revision, **spec))

    def status(self, name: str = "bot") -> Json:
        found = self.kubectl.get("adep", name) or {}
        status: Json = found.get("status", {})
        return status

    def wait(self, until: Callable[[Json], bool], *, name: str = "bot", seconds: float = 90) -> Json:
        """The status as soon as it satisfies `until`; fails with the last status when that takes too long."""
        deadline = time.monotonic() + seconds
        status: Json = {}
        while True:
            try:
                status = self.status(name)
            except (KubectlError, subprocess.TimeoutExpired):  # the API server is away
                status = {}
            if until(status):
                return status
            assert time.monotonic() < deadline, f"{json.dumps(status, indent=1)}\n{self.log()[-6000:]}"
            time.sleep(0.1)

    def eventually(self, holds: Callable[[], bool], *, seconds: float = 20) -> None:
        wait_until(holds, seconds=seconds, what=lambda: f"{self.status()}\n{self.log()[-6000:]}")

    def eventually_offline(self, holds: Callable[[], bool], *, seconds: float = 30) -> None:
        """The same while nothing can be asked of the API server."""
        wait_until(holds, seconds=seconds, what=lambda: self.log()[-6000:])

    def end_job(self, name: str, revision: str) -> None:
        """A FineTuneJob has succeeded, with an artifact of that revision."""
        digest = "sha256:" + revision.ljust(64, "0")
        artifact = {"uri": "file:///a", "digest": digest, "sizeBytes": 1, "baseModel": "m", "rank": 8}
        # With its time, or else the operator takes the phase back.
        status = {"phase": "Succeeded", "completionTime": "2026-11-01T12:00:00Z", "artifact": artifact}
        patch = json.dumps({"status": status})
        self.kubectl("patch", "ftj", name, "--subresource=status", "--type=merge", "-p", patch)

    def annotate(self, action: str, *, name: str = "bot") -> None:
        self.kubectl("annotate", "adep", name, f"finetune.dev/action={action}", "--overwrite")


def deployment(name: str, revision: str, /, **spec: Any) -> Json:
    """An AdapterDeployment of the artifact whose digest begins with `revision`; `spec` replaces or adds fields."""
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "AdapterDeployment",
        "metadata": {"name": name},
        "spec": {
            "baseModelRef": {"name": "base-model"},
            "adapter": {
                "source": {
                    "uri": f"file:///artifacts/{revision}",
                    "digest": "sha256:" + revision.ljust(64, "0"),
                }
            },
            "strategy": {"canary": {"steps": [{"setWeight": 50}, {"pause": {"duration": "2s"}}]}},
            "analysis": {"interval": "1s"},
            **spec,
        },
    }


def training(name: str) -> Json:
    """A FineTuneJob."""
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": {
            "model": {"uri": "file:///models/m"},
            "method": {"type": "LoRA"},
            "dataset": {"sources": [{"uri": "file:///data/d.jsonl"}]},
        },
    }


def serves(revision: str) -> Callable[[Json], bool]:
    """The revision is stable, every router says so, and nothing is under way."""
    return lambda s: (
        s.get("stableRevision") == revision and s.get("phase") == "Healthy" and s["weights"]["verified"]
    )

"""The peer of benchmarks.fleet: KubeRay, a Go operator, on the same API server and as many RayJobs at once.

What is compared is the first thing that either does with a new object: FineTuneJob → RayJob, RayJob → RayCluster. After
that KubeRay goes on to make a Service and a pod per cluster, which nothing runs here; its CPU time includes them, up to
the moment when the last RayCluster is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks.observers import peak_rss_of
from finetune_local import binaries, kubeapi
from finetune_local.cluster import Cluster
from finetune_local.ports import choose
from tests.integration.rayjobs import rayjob

Json = dict[str, Any]

CREATORS = 16
CONCURRENCY = 8  # passes at once, as our queue has them; its own default is 1


@dataclass(frozen=True)
class PeerFigures:
    """Times in seconds, memory in bytes."""

    jobs: int
    p50: float
    p99: float
    cpu: float
    peak_rss: int

    def row(self) -> str:
        return (
            f"| {self.jobs:,} | {self.p50:.2f} s | {self.p99:.2f} s | {1000 * self.cpu / self.jobs:.1f} ms | "
            f"{self.peak_rss / 2**20:.0f} MiB |"
        )


async def measure(cluster: Cluster, jobs: int, folder: Path) -> PeerFigures:
    namespace = f"peer-{jobs}-{int(time.time()) % 100_000}"
    server = f"https://127.0.0.1:{cluster.ports['kube-apiserver']}"
    tls = kubeapi.client_context(cluster.layout.pki, "admin")
    cluster.client().call("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
    process = _start(cluster, folder)
    try:
        await asyncio.sleep(8)  # its caches
        watched = psutil.Process(process.pid)
        before = watched.cpu_times()
        seen: dict[str, float] = {}
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls, limit=64)) as session:
            watching = asyncio.create_task(_watch(session, server, namespace, seen))
            created = await _create(session, server, namespace, jobs)
            async with asyncio.timeout(60 + jobs):
                while len(seen) < jobs:  # noqa: ASYNC110 - coarse on purpose
                    await asyncio.sleep(0.2)
            after = watched.cpu_times()
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
        ordered = sorted(seen[name] - at for name, at in created.items())
        return PeerFigures(
            jobs=jobs,
            p50=ordered[jobs // 2],
            p99=ordered[min(jobs - 1, int(jobs * 0.99))],
            cpu=after.user + after.system - before.user - before.system,
            peak_rss=peak_rss_of(process.pid),
        )
    finally:
        process.kill()
        process.wait()
        cluster.client().call("DELETE", f"/api/v1/namespaces/{namespace}")


def _start(cluster: Cluster, folder: Path) -> subprocess.Popen[bytes]:
    def quiet(line: str) -> None:
        del line

    found = binaries.obtain(
        ["kuberay-operator"], sources=binaries.Sources.from_environment(), announce=quiet, detail=quiet
    )
    ports = choose(("metrics", "health"), known={}, in_use_by_us=[])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "kuberay.log").open("wb") as log:
        return subprocess.Popen(
            [
                str(found.programs["kuberay-operator"]),
                f"--kubeconfig={cluster.layout.user_kubeconfig('kuberay')}",
                "--enable-leader-election=false",
                f"--metrics-addr=127.0.0.1:{ports['metrics']}",
                f"--health-probe-bind-address=127.0.0.1:{ports['health']}",
                f"--reconcile-concurrency={CONCURRENCY}",
            ],
            stdout=log,
            stderr=log,
        )


async def _create(session: aiohttp.ClientSession, server: str, namespace: str, jobs: int) -> dict[str, float]:
    created: dict[str, float] = {}
    numbers = iter(range(jobs))
    url = f"{server}/apis/ray.io/v1/namespaces/{namespace}/rayjobs"

    async def creator() -> None:
        for number in numbers:
            body = rayjob(f"job-{number}", "true")
            body["metadata"]["namespace"] = namespace
            async with session.post(url, json=body) as answer:
                if answer.status != 201:
                    raise RuntimeError(await answer.text())
            created[f"job-{number}"] = time.time()

    await asyncio.gather(*(creator() for _ in range(CREATORS)))
    return created


async def _watch(session: aiohttp.ClientSession, server: str, namespace: str, seen: dict[str, float]) -> None:
    """Note when the RayCluster of each RayJob is first seen."""
    async for body in _added(session, f"{server}/apis/ray.io/v1/namespaces/{namespace}/rayclusters?watch=1"):
        owners = body["metadata"].get("ownerReferences") or [{"name": ""}]
        seen.setdefault(owners[0]["name"], time.time())


async def _added(session: aiohttp.ClientSession, url: str) -> AsyncIterator[Json]:
    timeout = aiohttp.ClientTimeout(total=None)
    async with session.get(url, timeout=timeout, read_bufsize=1 << 22) as stream:
        async for line in stream.content:
            event = json.loads(line)
            if event["type"] == "ADDED":
                yield event["object"]

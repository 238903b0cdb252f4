"""What the runs of benchmarks.fleet share: a place of their own on the API server, objects that are created at once,
and what a process costs meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from benchmarks.observers import peak_rss_of
from finetune_local import kubeapi
from finetune_local.cluster import Cluster
from tests.clients import kubectl_program
from tests.integration.operators import Operator, small_job

Json = dict[str, Any]
Create = Callable[["Place", str, Iterable[Json]], Awaitable[dict[str, float]]]
"""Creates these objects at a URL; name -> when it was there."""

CREATORS = 16  # objects that are being created at the same time


@dataclass(frozen=True)
class Place:
    """A namespace on the API server of a cluster, and how to reach both."""

    cluster: Cluster
    namespace: str

    @classmethod
    def make(cls, cluster: Cluster, prefix: str) -> Place:
        """A new one."""
        namespace = f"{prefix}-{time.time_ns() // 10**6 % 10**8}"
        cluster.client().call("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
        return cls(cluster, namespace)

    @property
    def server(self) -> str:
        return f"https://127.0.0.1:{self.cluster.ports['kube-apiserver']}"

    @property
    def tls(self) -> ssl.SSLContext:
        return kubeapi.client_context(self.cluster.layout.pki, "admin")

    def url(self, group_version: str, plural: str) -> str:
        return f"{self.server}/apis/{group_version}/namespaces/{self.namespace}/{plural}"

    def session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=self.tls, limit=64))

    def operator(self, folder: Path, **environment: str) -> Operator:
        """One of this namespace; it is not started."""
        kubeconfig = self.cluster.layout.user_kubeconfig("operator")
        return Operator(
            folder, kubeconfig, self.namespace, **{"FINETUNE_PROGRESS_SECONDS": "10", **environment}
        )


class Meter:
    """What a process costs from now on."""

    def __init__(self, pid: int) -> None:
        self._process = psutil.Process(pid)
        self._before = self._process.cpu_times()
        self.began = time.time()

    def cpu(self) -> float:
        """CPU seconds."""
        now = self._process.cpu_times()
        return now.user + now.system - self._before.user - self._before.system

    def seconds(self) -> float:
        return time.time() - self.began

    def peak_rss(self) -> int:
        """Bytes, since the process began."""
        return peak_rss_of(self._process.pid)


async def create_many(place: Place, url: str, bodies: Iterable[Json]) -> dict[str, float]:
    """Create these as fast as the server takes them; name -> when its creation was answered."""
    created: dict[str, float] = {}
    left = iter(bodies)

    async def creator(session: aiohttp.ClientSession) -> None:
        for body in left:
            async with session.post(url, json=body) as answer:
                if answer.status != 201:
                    raise RuntimeError(f"{body['metadata']['name']}: {answer.status} {await answer.text()}")
            created[body["metadata"]["name"]] = time.time()

    async with place.session() as session:
        await asyncio.gather(*(creator(session) for _ in range(CREATORS)))
    return created


async def apply_many(place: Place, url: str, bodies: Iterable[Json]) -> dict[str, float]:
    """The same by one `kubectl apply -f` of them all, which sends a request after the other; name -> when kubectl said
    that it is created."""
    del url
    created: dict[str, float] = {}
    command = (
        f"--kubeconfig={place.cluster.kubeconfig}",
        f"--namespace={place.namespace}",
        "apply",
        "-f",
        "-",
    )
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(kubectl_program(), *command, stdin=pipe, stdout=pipe)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps({"apiVersion": "v1", "kind": "List", "items": list(bodies)}).encode())
    process.stdin.close()
    async for line in process.stdout:
        created[line.decode().split()[0].rpartition("/")[2]] = time.time()
    if await process.wait():
        raise RuntimeError(f"kubectl has created {len(created)} objects and refused others")
    return created


async def create_jobs(place: Place, jobs: int, *, first: int = 0, **spec: Any) -> dict[str, float]:
    """FineTuneJobs job-<first>, …; the same."""
    bodies = (small_job(f"job-{number}", **spec) for number in range(first, first + jobs))
    return await create_many(place, place.url("finetune.dev/v1alpha1", "finetunejobs"), bodies)


async def added(session: aiohttp.ClientSession, url: str) -> AsyncIterator[Json]:
    """The objects that are there, and then those that are created, each once, until cancelled. A watch that the server
    ends, as it does with one that reads too slowly, begins anew."""
    timeout = aiohttp.ClientTimeout(total=None)
    told: set[str] = set()
    while True:
        with contextlib.suppress(aiohttp.ClientPayloadError):
            async with session.get(f"{url}?watch=1", timeout=timeout, read_bufsize=1 << 22) as stream:
                async for line in stream.content:
                    event = json.loads(line)
                    if event["type"] == "ADDED" and (uid := event["object"]["metadata"]["uid"]) not in told:
                        told.add(uid)
                        yield event["object"]


async def until(holds: Callable[[], bool], *, seconds: float, every: float = 0.2) -> None:
    async with asyncio.timeout(seconds):
        while not await asyncio.to_thread(holds):  # noqa: ASYNC110 - of another process
            await asyncio.sleep(every)


def p50_p99(values: Iterable[float]) -> tuple[float, float]:
    ordered = sorted(values)
    return ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]


def never_twice(uids: dict[str, set[str]]) -> None:
    """Raises RuntimeError where an object (name -> the UIDs that it had) was created more than once."""
    twice: Sequence[str] = sorted(name for name, found in uids.items() if len(found) > 1)
    if twice:
        raise RuntimeError(f"created twice: {twice}")


def metric(operator: Operator, name: str) -> dict[str, float]:
    """Series of a metric: labels -> value."""
    with urllib.request.urlopen(
        f"http://127.0.0.1:{operator.ports['metrics']}/metrics", timeout=30
    ) as answer:
        lines = answer.read().decode().splitlines()
    found = (line.rsplit(" ", 1) for line in lines if line.startswith(name + "{"))
    return {labels.removeprefix(name): float(value) for labels, value in found}


def requests_of(operator: Operator) -> dict[str, float]:
    return metric(operator, "finetune_api_requests_total")


def finished(operator: Operator) -> float:
    """How many jobs have ended well. Raises RuntimeError where one did not."""
    found = metric(operator, "finetune_jobs_finished_total")
    ended = {labels: count for labels, count in found.items() if count}
    if bad := {labels: count for labels, count in ended.items() if 'class="ArtifactPublished"' not in labels}:
        raise RuntimeError(f"jobs that did not succeed: {bad}")
    return sum(ended.values())


def well(operator: Operator) -> bool:
    return operator.get("/healthz") == "ok\n"

"""The peer of benchmarks.fleet: KubeRay, a Go operator, on the same API server, with as many objects at once.

What is compared is the first thing that either does with a new object: FineTuneJob → RayJob, RayJob → RayCluster, as
many of them per second as it gets done, and what that costs. Nobody plays the RayJobs here: after that the operator
waits, and KubeRay goes on to make a Service and a pod per cluster, which nothing runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import aiohttp

from benchmarks import fleet_floor, pages
from benchmarks.fleet_floor import Floor, Sample
from benchmarks.fleet_places import (
    Create,
    Json,
    Meter,
    Place,
    added,
    apply_many,
    create_many,
    p50_p99,
    until,
    well,
)
from finetune_local import binaries
from finetune_local.cluster import Cluster
from finetune_local.ports import choose
from finetune_operator.reconcile.queue import CONCURRENCY
from tests.integration.operators import small_job
from tests.integration.rayjobs import rayjob

# Requests per second that its client allows itself: with the default of 100 it would wait for that.
QPS = 1000
BY_KUBECTL = ", objects by `kubectl apply`"
START_SECONDS = 8.0  # from its start until its caches are filled


@dataclass(frozen=True)
class Lap:
    """Parents created at once, until the first child of each is there. Times in seconds, memory in bytes."""

    jobs: int
    p50: float
    p99: float
    seconds: float
    cpu: float
    peak_rss: int

    @property
    def rate(self) -> float:
        return self.jobs / self.seconds

    def row(self, name: str) -> str:
        return (
            f"| {self.jobs:,} | {name} | {self.p50:.2f} s | {self.p99:.2f} s | {self.rate:.1f}/s | "
            f"{1000 * self.cpu / self.jobs:.1f} ms | {self.peak_rss / 2**20:.0f} MiB |"
        )


Timed = TypeVar("Timed", Lap, Floor)


@dataclass(frozen=True)
class Race:
    """Both, in turns, as often, and what the API server needs for the requests alone; and both where kubectl creates
    the objects."""

    jobs: int
    operator: list[Lap] = field(default_factory=list)
    kuberay: list[Lap] = field(default_factory=list)
    floors: list[Floor] = field(default_factory=list)
    operator_applied: list[Lap] = field(default_factory=list)
    kuberay_applied: list[Lap] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """How many times KubeRay's throughput the operator has: median of the pairs."""
        return statistics.median(a.rate / b.rate for a, b in zip(self.operator, self.kuberay, strict=True))

    def rows(self) -> list[str]:
        """Of each the lap in the middle, by its throughput."""
        return [
            _middle(self.operator).row("operator"),
            _middle(self.kuberay).row("KubeRay"),
            self.floor.row(),
            self.applied.row(f"operator{BY_KUBECTL}"),
            _middle(self.kuberay_applied).row(f"KubeRay{BY_KUBECTL}"),
        ]

    @property
    def applied(self) -> Lap:
        return _middle(self.operator_applied)

    @property
    def floor(self) -> Floor:
        return _middle(self.floors)

    @property
    def rates(self) -> tuple[float, float]:
        """Throughput of the operator and of KubeRay, jobs per second: that of the laps in the middle."""
        return _middle(self.operator).rate, _middle(self.kuberay).rate


def _middle(laps: Sequence[Timed]) -> Timed:
    return sorted(laps, key=lambda lap: lap.rate)[len(laps) // 2]


async def race(cluster: Cluster, jobs: int, folder: Path, *, rounds: int) -> Race:
    """Let both run, the one after the other, each time with a fresh process in a namespace of its own."""
    found = Race(jobs)
    bodies = [small_job(f"job-{number}") for number in range(jobs)]
    for number in range(rounds):
        lap, sample = await _operator_lap(cluster, bodies, folder / f"operator-{jobs}-{number}", create_many)
        found.operator.append(lap)
        found.floors.append(await fleet_floor.measure(cluster, bodies, sample, requests_at_once=CONCURRENCY))
        found.kuberay.append(
            await _kuberay_lap(cluster, jobs, folder / f"kuberay-{jobs}-{number}", create_many)
        )
        lap, _ = await _operator_lap(cluster, bodies, folder / f"operator-applied-{number}", apply_many)
        found.operator_applied.append(lap)
        found.kuberay_applied.append(
            await _kuberay_lap(cluster, jobs, folder / f"kuberay-applied-{number}", apply_many)
        )
        pages.say("\n".join(found.rows()))
    return found


async def _operator_lap(
    cluster: Cluster, bodies: Sequence[Json], folder: Path, create: Create
) -> tuple[Lap, Sample]:
    place = Place.make(cluster, f"race-{len(bodies)}")
    operator = place.operator(folder)
    operator.start()
    try:
        await until(lambda: well(operator), seconds=60)
        await asyncio.sleep(3)  # Kopf's discovery and first lists
        assert operator.process is not None
        parents = place.url("finetune.dev/v1alpha1", "finetunejobs")
        pid, children = operator.process.pid, place.url("ray.io/v1", "rayjobs")
        lap = await _lap(place, pid, parents, bodies, children, create)
        return lap, await fleet_floor.sample(place, bodies[0]["metadata"]["name"])
    finally:
        operator.kill()


async def _kuberay_lap(cluster: Cluster, jobs: int, folder: Path, create: Create) -> Lap:
    place = Place.make(cluster, f"peer-{jobs}")
    process = start_kuberay(place, folder)
    try:
        await asyncio.sleep(START_SECONDS)
        bodies = [_rayjob(place, number) for number in range(jobs)]
        parents, children = (place.url("ray.io/v1", plural) for plural in ("rayjobs", "rayclusters"))
        return await _lap(place, process.pid, parents, bodies, children, create)
    finally:
        process.kill()
        process.wait()


async def _lap(
    place: Place, pid: int, parents: str, bodies: Sequence[Json], children: str, create: Create
) -> Lap:
    seen: dict[str, float] = {}
    async with place.session() as session:
        watching = asyncio.create_task(_note_children(session, children, seen))
        await asyncio.sleep(0.5)
        meter = Meter(pid)
        created = await create(place, parents, bodies)
        async with asyncio.timeout(120 + len(bodies)):
            while len(seen) < len(bodies):  # noqa: ASYNC110 - coarse on purpose
                await asyncio.sleep(0.1)
        cpu = meter.cpu()
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
    p50, p99 = p50_p99(seen[name] - at for name, at in created.items())
    seconds = max(seen.values()) - meter.began
    return Lap(jobs=len(bodies), p50=p50, p99=p99, seconds=seconds, cpu=cpu, peak_rss=meter.peak_rss())


async def _note_children(session: aiohttp.ClientSession, url: str, seen: dict[str, float]) -> None:
    """When the first child of each parent is seen."""
    async for body in added(session, url):
        owners = body["metadata"].get("ownerReferences") or [{"name": ""}]
        seen.setdefault(owners[0]["name"], time.time())


def _rayjob(place: Place, number: int) -> Json:
    body = rayjob(f"job-{number}", "true")
    body["metadata"]["namespace"] = place.namespace
    return body


def start_kuberay(place: Place, folder: Path, *, proxy: str | None = None) -> subprocess.Popen[bytes]:
    """KubeRay for this namespace. `proxy`: URL of an HTTP proxy that all its requests for Ray go to."""

    def quiet(line: str) -> None:
        del line

    found = binaries.obtain(
        ["kuberay-operator"], sources=binaries.Sources.from_environment(), announce=quiet, detail=quiet
    )
    ports = choose(("metrics", "health"), known={}, in_use_by_us=[])
    folder.mkdir(parents=True, exist_ok=True)
    # Go sends nothing for loopback through a proxy, so the API server is reached directly.
    proxies = {"HTTP_PROXY": proxy, "http_proxy": proxy, "NO_PROXY": "", "no_proxy": ""} if proxy else {}
    with (folder / "kuberay.log").open("wb") as log:
        return subprocess.Popen(
            [
                str(found.programs["kuberay-operator"]),
                f"--kubeconfig={place.cluster.layout.user_kubeconfig('kuberay')}",
                "--enable-leader-election=false",
                f"--watch-namespace={place.namespace}",
                f"--metrics-addr=127.0.0.1:{ports['metrics']}",
                f"--health-probe-bind-address=127.0.0.1:{ports['health']}",
                f"--reconcile-concurrency={CONCURRENCY}",  # as our queue has them; its own default is 1
                f"--qps={QPS}",
                f"--burst={2 * QPS}",
            ],
            stdout=log,
            stderr=log,
            env={**os.environ, "RAY_ENABLE_KUBERAY": "1", **proxies},
        )

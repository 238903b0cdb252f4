"""FineTuneJobs at once with the real KubeRay: only Ray's job API, the trainers and the kubelet are played.

KubeRay makes a RayCluster, a Service and a head pod per job, the scheduler binds the pod, KWOK says that it runs, and
KubeRay submits the job (HTTPMode) to a small server that answers as Ray does.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

from benchmarks import pages
from benchmarks.fleet_peer import START_SECONDS, start_kuberay
from benchmarks.fleet_places import Meter, Place, create_jobs, finished, never_twice, requests_of, until, well
from benchmarks.fleet_runs import Figures
from benchmarks.rayjob_player import Ending, Json, Player
from finetune_local import objects
from finetune_local.cluster import Cluster
from tests.integration.operators import PARTS

REAL_PARTS = (*PARTS, "kube-scheduler", "kwok")
ROOM = {"cpu": "100k", "memory": "1Pi", "pods": "100k"}  # of the one node, so that no job waits for another
JOBS = "/api/jobs/"


@dataclass(frozen=True)
class RealFigures:
    """What the operator cost, and KubeRay in the same time: CPU seconds, and bytes at the most."""

    operator: Figures
    kuberay_cpu: float
    kuberay_rss: int

    def row(self) -> str:
        cpu = 1000 * self.kuberay_cpu / self.operator.jobs
        return f"{self.operator.row()} {cpu:.1f} ms | {self.kuberay_rss / 2**20:.0f} MiB |"


class Ray(Player):
    """Ray's job API and the trainers of the jobs that KubeRay submits. RayJobs themselves are KubeRay's here."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._bodies: dict[str, Json] = {}
        self._running: dict[str, asyncio.Task[bool]] = {}

    async def play(self, body: Json) -> None:
        self._bodies[body["metadata"]["name"]] = body

    async def let_go(self, body: Json) -> None:
        """KubeRay does."""

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        """Be KubeRay's HTTP proxy, to which it sends all that it asks of any cluster; the URL."""
        runner = web.ServerRunner(web.Server(self._answer, access_log=None))
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.method == "POST" and request.path == JOBS:
            return self._submit(await request.json())
        job = request.path.removeprefix(JOBS).partition("/")[0]
        if not request.path.startswith(JOBS) or job not in self._running:
            return web.Response(status=404, text=f"Job {job} does not exist\n")
        status = "SUCCEEDED" if self._running[job].done() else "RUNNING"
        return web.json_response(
            {"type": "SUBMISSION", "submission_id": job, "status": status, "message": "", "entrypoint": "-"}
        )

    def _submit(self, submission: Json) -> web.Response:
        """KubeRay names a job after its RayJob, with five letters more."""
        job = str(submission["submission_id"])
        if job not in self._running:
            body = self._bodies[job.rpartition("-")[0]]
            self._running[job] = asyncio.create_task(self.train(body, Ending.WELL), name=job)
        return web.json_response({"job_id": job, "submission_id": job})


def make_room(cluster: Cluster) -> None:
    """Let the one node hold any number of pods."""
    patch = {"status": {"capacity": ROOM, "allocatable": ROOM}}
    path = f"/api/v1/nodes/{objects.NODE}/status"
    cluster.client().call("PATCH", path, patch, content_type="application/merge-patch+json")


async def measure(cluster: Cluster, jobs: int, folder: Path) -> RealFigures:
    """One run. `cluster` has REAL_PARTS."""
    load = pages.current_load()
    place = Place.make(cluster, f"real-{jobs}")
    make_room(cluster)
    operator = place.operator(folder / "operator", FINETUNE_SUBMISSION_MODE="HTTPMode")
    ray = Ray(place.server, place.tls, pace=0.2, namespace=place.namespace)
    playing = asyncio.create_task(ray.run())
    async with ray.listening() as proxy:
        kuberay = start_kuberay(place, folder, proxy=proxy)
        operator.start()
        try:
            await until(lambda: well(operator), seconds=60)
            await asyncio.sleep(START_SECONDS)
            assert operator.process is not None
            meter, peer = Meter(operator.process.pid), Meter(kuberay.pid)
            before = requests_of(operator)
            created = await create_jobs(place, jobs)
            await until(lambda: finished(operator) >= jobs, seconds=300 + 2 * jobs, every=1.0)
            drained, cpu, peer_cpu = meter.seconds(), meter.cpu(), peer.cpu()
            never_twice(ray.seen.uids)
            figures = Figures(
                jobs=jobs,
                latencies=[
                    ray.seen.created[f"{place.namespace}/{name}-a1"] - at for name, at in created.items()
                ],
                drained=drained,
                cpu=cpu,
                requests={k: v - before.get(k, 0) for k, v in requests_of(operator).items()},
                peak_rss=meter.peak_rss(),
                load=load,
            )
            return RealFigures(figures, kuberay_cpu=peer_cpu, kuberay_rss=peer.peak_rss())
        finally:
            playing.cancel()
            operator.kill()
            kuberay.kill()
            kuberay.wait()

"""Many FineTuneJobs at once on a real API server, with KubeRay and the trainers played: what the operator costs.

    python -m benchmarks.fleet --jobs 100 1000 5000

The control plane (etcd, kube-apiserver, kube-controller-manager), the operator, and this program, which creates the
jobs and plays KubeRay, share the machine: latencies are those of all of them together, CPU and memory the operator's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import signal
import ssl
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil

from benchmarks import fleet_peer, pages
from benchmarks.observers import peak_rss_of
from benchmarks.rayjob_player import Player
from finetune_local import kubeapi
from finetune_local.cluster import Cluster
from tests.integration.operators import PARTS, Operator, apply_ray_crds, small_job

TITLE = "Fleet"
CREATORS = 16  # jobs that are being created at the same time
TARGETS = {
    "create → RayJob, p99": "2 s at 1,000",
    "requests": "12",
    "CPU": "25 ms",
    "RSS": "150 MiB at 5,000",
}


@dataclass(frozen=True)
class Figures:
    """Of one run. Times in seconds, memory in bytes; CPU and requests are totals of the operator."""

    jobs: int
    latencies: Sequence[float]
    creating: float
    drained: float
    cpu: float
    requests: dict[str, float]
    idle_rss: int
    peak_rss: int
    load: float

    def row(self) -> str:
        ordered = sorted(self.latencies)
        p50, p99 = ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
        total = sum(self.requests.values())
        return (
            f"| {self.jobs:,} | {p50:.2f} s | {p99:.2f} s | {total / self.jobs:.1f} | "
            f"{1000 * self.cpu / self.jobs:.1f} ms | {self.peak_rss / 2**20:.0f} MiB | {self.drained:.1f} s | "
            f"{self.jobs / self.drained:.0f}/s | {self.load:.2f} |"
        )


async def measure(
    cluster: Cluster, jobs: int, folder: Path, *, pace: float, profile: Path | None = None
) -> Figures:
    """One run with a fresh operator in a namespace of its own. `profile`: where cProfile's figures go; what is
    measured is slower then."""
    load = pages.current_load()
    namespace = f"fleet-{jobs}-{int(time.time()) % 100_000}"
    server = f"https://127.0.0.1:{cluster.ports['kube-apiserver']}"
    tls = kubeapi.client_context(cluster.layout.pki, "admin")
    client = cluster.client()
    client.call("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
    operator = Operator(
        folder, cluster.layout.user_kubeconfig("operator"), namespace, FINETUNE_PROGRESS_SECONDS="10"
    )
    if profile is not None:
        operator.program[1:1] = ["-m", "cProfile", "-o", str(profile)]
    operator.start()
    player = Player(server, tls, pace=pace)
    playing = asyncio.create_task(player.run())
    try:
        await until(lambda: operator.get("/healthz") == "ok\n", seconds=30)
        await asyncio.sleep(3)  # Kopf's discovery and first lists
        assert operator.process is not None
        process = psutil.Process(operator.process.pid)
        idle, before, began = process.memory_info().rss, process.cpu_times(), time.time()
        requests = _requests(operator)
        created = await create_jobs(server, tls, namespace, jobs)
        creating = time.time() - began
        # Not by the operator's metrics: making 30,000 series would be a part of what is measured.
        await until(lambda: player.seen.ended >= jobs, seconds=60 + jobs)
        drained = time.time() - began
        await asyncio.sleep(2)  # the last passes
        after = process.cpu_times()
        if _finished(operator) < jobs:
            raise RuntimeError(f"{_finished(operator):.0f} of {jobs} jobs ended")
        latencies = [player.seen.created[f"{name}-a1"] - at for name, at in created.items()]
        twice = {name: uids for name, uids in player.seen.uids.items() if len(uids) > 1}
        if twice:
            raise RuntimeError(f"created twice: {sorted(twice)}")
        return Figures(
            jobs=jobs,
            latencies=latencies,
            creating=creating,
            drained=drained,
            cpu=after.user + after.system - before.user - before.system,
            requests={k: v - requests.get(k, 0) for k, v in _requests(operator).items()},
            idle_rss=idle,
            peak_rss=peak_rss_of(process.pid),
            load=load,
        )
    finally:
        playing.cancel()
        if profile is not None and operator.process is not None:
            operator.signal(signal.SIGTERM)
            await asyncio.to_thread(operator.process.wait, 60)
        operator.kill()


async def create_jobs(server: str, tls: ssl.SSLContext, namespace: str, jobs: int) -> dict[str, float]:
    """Create the jobs as fast as the server takes them; namespace/name -> when its creation was answered."""
    created: dict[str, float] = {}
    names = iter(range(jobs))
    url = f"{server}/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs"

    async def creator(session: aiohttp.ClientSession) -> None:
        for number in names:
            name = f"job-{number}"
            async with session.post(url, json=small_job(name)) as answer:
                if answer.status != 201:
                    raise RuntimeError(f"{name}: {answer.status} {await answer.text()}")
            created[f"{namespace}/{name}"] = time.time()

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=tls)) as session:
        await asyncio.gather(*(creator(session) for _ in range(CREATORS)))
    return created


async def until(holds: Callable[[], bool], *, seconds: float, every: float = 0.2) -> None:
    async with asyncio.timeout(seconds):
        while not await asyncio.to_thread(holds):  # noqa: ASYNC110 - of another process
            await asyncio.sleep(every)


def metric(operator: Operator, name: str) -> dict[str, float]:
    """Series of a metric: labels -> value."""
    with urllib.request.urlopen(
        f"http://127.0.0.1:{operator.ports['metrics']}/metrics", timeout=30
    ) as answer:
        lines = answer.read().decode().splitlines()
    found = (line.rsplit(" ", 1) for line in lines if line.startswith(name + "{"))
    return {labels.removeprefix(name): float(value) for labels, value in found}


def _requests(operator: Operator) -> dict[str, float]:
    return metric(operator, "finetune_api_requests_total")


def _finished(operator: Operator) -> float:
    return sum(metric(operator, "finetune_jobs_finished_total").values())


def report(runs: Sequence[Figures]) -> str:
    table = "\n".join(run.row() for run in runs)
    details = json.dumps({run.jobs: run.requests for run in runs}, indent=1)
    pages.say(details)
    return (
        "FineTuneJobs created at once; each goes through one attempt with every status that KubeRay was seen to\n"
        "write, one report of progress and one of the result. Latencies are from the answer to the creation of the\n"
        "FineTuneJob to the watch event of its RayJob. Requests and CPU time are the operator's for a whole job,\n"
        "memory its peak.\n\n"
        "| jobs at once | create → RayJob, p50 | p99 | API requests per job | CPU per job | peak RSS |"
        " all ended after | jobs | load before |\n|---|---|---|---|---|---|---|---|---|\n"
        f"{table}\n\nTargets: p99 2 s at 1,000; 12 requests; 25 ms; 150 MiB at 5,000.\n"
    )


def report_peer(runs: Sequence[fleet_peer.PeerFigures]) -> str:
    if not runs:
        return ""
    table = "\n".join(run.row() for run in runs)
    return (
        "\nKubeRay 1.6.2 in the same run, with eight passes at once: RayJobs created at once, from the answer to the\n"
        "creation to the watch event of the RayCluster. CPU is up to the moment when all clusters are there.\n\n"
        "| jobs at once | create → RayCluster, p50 | p99 | CPU per job | peak RSS |\n|---|---|---|---|---|\n"
        f"{table}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, nargs="+", default=[100, 1000, 5000])
    parser.add_argument(
        "--peer", type=int, nargs="*", default=[], help="RayJobs at once for KubeRay, beside it"
    )
    parser.add_argument("--pace", type=float, default=0.2, help="seconds between two statuses of a RayJob")
    parser.add_argument("--profile", type=Path, help="file for cProfile's figures of the operator")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fleet-"))
    cluster = Cluster(folder / "cluster")
    load = pages.current_load()
    try:
        cluster.up(PARTS)
        apply_ray_crds(cluster)
        runs = []
        for jobs in arguments.jobs:
            run = measure(
                cluster,
                jobs,
                folder / f"run-{jobs}",
                pace=arguments.pace,
                profile=arguments.profile,
            )
            runs.append(asyncio.run(run))
            pages.say(runs[-1].row())
        peers = []
        for jobs in arguments.peer:
            peers.append(asyncio.run(fleet_peer.measure(cluster, jobs, folder / f"peer-{jobs}")))
            pages.say(peers[-1].row())
        body = (
            report(runs)
            + report_peer(peers)
            + "\n"
            + pages.describe_machine(["kopf", "kubernetes", "aiohttp"], load=load)
        )
        words = ["--jobs", *map(str, arguments.jobs)]
        words += ["--peer", *map(str, arguments.peer)] if arguments.peer else []
        command = f"Command: `python -m benchmarks.fleet {' '.join(words)} --write`.\n"
        print(body + command)
        if arguments.write:
            pages.write_section(TITLE, body + command)
    finally:
        cluster.down(purge=True)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()

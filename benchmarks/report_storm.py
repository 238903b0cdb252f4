"""Many running jobs that all report: what the endpoint, the passes and the status writes cost the operator.

python -m benchmarks.report_storm --jobs 1000 --every 5 --seconds 60
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks import pages
from benchmarks.fleet_places import Place, create_jobs, metric, until, well
from benchmarks.rayjob_player import Player
from finetune_local.cluster import Cluster
from tests.integration.operators import PARTS, Operator, apply_ray_crds

TITLE = "Reports"


@dataclass(frozen=True)
class Figures:
    """Per second, over the time that was measured. CPU in cores, memory in bytes."""

    reports: float
    refused: float
    writes: float
    requests: float
    cpu: float
    rss: int


async def measure(cluster: Cluster, jobs: int, folder: Path, *, every: float, seconds: float) -> Figures:
    place = Place.make(cluster, "storm")
    operator = place.operator(folder)
    operator.start()
    player = Player(place.server, place.tls, pace=0.1, reports=100_000, report_pace=every)
    playing = asyncio.create_task(player.run())
    try:
        await until(lambda: well(operator), seconds=60)
        await asyncio.sleep(3)
        await create_jobs(place, jobs)
        await until(lambda: _running(operator) >= jobs, seconds=300, every=3)
        await asyncio.sleep(15)  # until the burst of the beginning is over
        assert operator.process is not None
        process = psutil.Process(operator.process.pid)
        before, cpu, began = _counters(operator), process.cpu_times(), time.monotonic()
        await asyncio.sleep(seconds)
        after, spent, took = _counters(operator), process.cpu_times(), time.monotonic() - began
        reports, refused, writes, requests = ((b - a) / took for a, b in zip(before, after, strict=True))
        used = spent.user + spent.system - cpu.user - cpu.system
        return Figures(
            reports=reports,
            refused=refused,
            writes=writes,
            requests=requests,
            cpu=used / took,
            rss=process.memory_info().rss,
        )
    finally:
        playing.cancel()
        operator.kill()


def _running(operator: Operator) -> float:
    phases = metric(operator, "finetune_job_phase")
    return sum(value for labels, value in phases.items() if 'phase="Running"' in labels)


def _counters(operator: Operator) -> tuple[float, float, float, float]:
    reports = metric(operator, "finetune_reports_total")
    requests = metric(operator, "finetune_api_requests_total")
    taken = _sum(reports, lambda labels: 'code="200"' in labels)
    refused = _sum(reports, lambda labels: 'code="200"' not in labels)
    writes = _sum(requests, lambda labels: 'method="PATCH"' in labels)
    return taken, refused, writes, sum(requests.values())


def _sum(series: dict[str, float], wanted: Callable[[str], bool]) -> float:
    return sum(value for labels, value in series.items() if wanted(labels))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1000)
    parser.add_argument("--every", type=float, default=5.0, help="seconds between two reports of a job")
    parser.add_argument("--seconds", type=float, default=60.0, help="for which it is measured")
    parser.add_argument("--write", action="store_true", help="put the table into docs/benchmarks.md")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="storm-"))
    cluster = Cluster(folder / "cluster")
    load = pages.current_load()
    try:
        cluster.up(PARTS)
        apply_ray_crds(cluster)
        figures = asyncio.run(
            measure(
                cluster,
                arguments.jobs,
                folder / "operator",
                every=arguments.every,
                seconds=arguments.seconds,
            )
        )
        command = (
            f"Command: `python -m benchmarks.report_storm --jobs {arguments.jobs} --every {arguments.every:g} "
            f"--seconds {arguments.seconds:g} --write`.\n"
        )
        body = (
            f"{arguments.jobs:,} running jobs, each reporting every {arguments.every:g} s, measured for "
            f"{arguments.seconds:g} s. FINETUNE_PROGRESS_SECONDS is 10, its default.\n\n"
            "| | measured | target |\n|---|---|---|\n"
            f"| reports taken | {figures.reports:.0f}/s | |\n"
            f"| reports refused | {figures.refused:.1f}/s | 0 |\n"
            f"| status writes | {figures.writes:.0f}/s | 100/s |\n"
            f"| API requests in all | {figures.requests:.0f}/s | |\n"
            f"| CPU of the operator | {figures.cpu:.2f} cores | 1 core |\n"
            f"| memory of the operator | {figures.rss / 2**20:.0f} MiB | |\n\n"
        )
        body += pages.describe_machine(["kopf", "kubernetes", "aiohttp"], load=load) + command
        print(body)
        if arguments.write:
            pages.write_section(TITLE, body)
    finally:
        cluster.down(purge=True)
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()

"""FineTuneJobs at once whose RayJobs are played, so that the operator alone is measured."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import pages
from benchmarks.fleet_places import (
    Meter,
    Place,
    create_jobs,
    finished,
    never_twice,
    p50_p99,
    requests_of,
    until,
    well,
)
from benchmarks.rayjob_player import Player
from finetune_local.cluster import Cluster


@dataclass(frozen=True)
class Figures:
    """Of one run. Times in seconds, memory in bytes; CPU and requests are totals of the operator."""

    jobs: int
    latencies: Sequence[float]
    drained: float
    cpu: float
    requests: dict[str, float]
    peak_rss: int
    load: float

    @property
    def p99(self) -> float:
        return p50_p99(self.latencies)[1]

    @property
    def requests_per_job(self) -> float:
        return sum(self.requests.values()) / self.jobs

    @property
    def cpu_ms_per_job(self) -> float:
        return 1000 * self.cpu / self.jobs

    @property
    def mib(self) -> float:
        return self.peak_rss / 2**20

    def row(self) -> str:
        p50, p99 = p50_p99(self.latencies)
        return (
            f"| {self.jobs:,} | {p50:.2f} s | {p99:.2f} s | {self.requests_per_job:.1f} | "
            f"{self.cpu_ms_per_job:.1f} ms | {self.mib:.0f} MiB | {self.drained:.1f} s | "
            f"{self.jobs / self.drained:.1f}/s | {self.load:.2f} |"
        )


async def measure(
    cluster: Cluster, jobs: int, folder: Path, *, pace: float, profile: Path | None = None
) -> Figures:
    """One run with a fresh operator in a namespace of its own. `profile`: where cProfile's figures go; what is
    measured is slower then."""
    load = pages.current_load()
    place = Place.make(cluster, f"fleet-{jobs}")
    operator = place.operator(folder)
    if profile is not None:
        operator.program[1:1] = ["-m", "cProfile", "-o", str(profile)]
    operator.start()
    player = Player(place.server, place.tls, pace=pace, namespace=place.namespace)
    playing = asyncio.create_task(player.run())
    try:
        await until(lambda: well(operator), seconds=60)
        await asyncio.sleep(3)  # Kopf's discovery and first lists
        assert operator.process is not None
        meter, requests = Meter(operator.process.pid), requests_of(operator)
        created = await create_jobs(place, jobs)
        # Not by the operator's metrics: making 30,000 series would be a part of what is measured.
        await until(lambda: player.seen.ended >= jobs, seconds=300 + jobs)
        drained = meter.seconds()
        await asyncio.sleep(2)  # the last passes
        cpu = meter.cpu()
        if finished(operator) < jobs:
            raise RuntimeError(f"{finished(operator):.0f} of {jobs} jobs ended")
        never_twice(player.seen.uids)
        return Figures(
            jobs=jobs,
            latencies=[
                player.seen.created[f"{place.namespace}/{name}-a1"] - at for name, at in created.items()
            ],
            drained=drained,
            cpu=cpu,
            requests={k: v - requests.get(k, 0) for k, v in requests_of(operator).items()},
            peak_rss=meter.peak_rss(),
            load=load,
        )
    finally:
        playing.cancel()
        if profile is not None and operator.process is not None:
            operator.signal(signal.SIGTERM)
            await asyncio.to_thread(operator.process.wait, 60)
        operator.kill()

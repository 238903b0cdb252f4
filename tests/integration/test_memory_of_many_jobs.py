"""Memory of an operator through which many jobs pass: it follows what is there, not what has ever been.

    FINETUNE_TEST_JOBS=10000 pytest -s -m faults tests/integration/test_memory_of_many_jobs.py

Jobs come in waves, each is deleted once it has ended, and after each wave the resident memory is read. At first it
grows: caches fill up to their limits, and the allocator takes what a busy moment needs. After that it must not.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import aiohttp
import psutil
import pytest

from benchmarks.fleet_places import Place, create_jobs, metric, until
from finetune_local.cluster import Cluster
from tests.integration.operators import Operator, Stage
from tests.waiting import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.faults]

JOBS = int(os.environ.get("FINETUNE_TEST_JOBS", "3000"))
MIB = 2**20
WAVE = min(200, JOBS // 10)
KIB_PER_JOB = 0.5  # of growth in the last half; a report takes several
NOISE_MIB = 2.0  # by which medians of resident memory differ without a cause
PATIENCE = 600.0  # seconds for a wave, of which a busy machine needs many


@pytest.fixture
def operator(api: Cluster, stage: Stage, tmp_path: Path) -> Iterator[Operator]:
    running = Operator(tmp_path / "operator", api.layout.user_kubeconfig("operator"), stage.kubectl.namespace)
    stage.player.pace = 0.02
    running.start()
    wait_until(lambda: running.get("/healthz") == "ok\n", seconds=30)
    yield running
    running.kill()


class Passage:
    """Waves of jobs through one namespace."""

    def __init__(self, cluster: Cluster, stage: Stage) -> None:
        self._place = Place(cluster, stage.kubectl.namespace)
        self._url = self._place.url("finetune.dev/v1alpha1", "finetunejobs")
        self._seen = stage.player.seen
        self.passed = 0

    async def wave(self, jobs: int) -> None:
        """Create so many jobs at once, wait until each has ended well, and delete them."""
        await create_jobs(self._place, jobs, first=self.passed)
        self.passed += jobs
        await until(lambda: self._seen.ended >= self.passed, seconds=PATIENCE)
        async with self._place.session() as session:
            async with asyncio.timeout(PATIENCE):
                while (phases := await self._phases(session)) != {"Succeeded": jobs}:
                    assert not phases.keys() & {"Failed", "Cancelled"}, phases
                    await asyncio.sleep(0.3)
            names = range(self.passed - jobs, self.passed)
            await asyncio.gather(*(self._delete(session, f"job-{number}") for number in names))

    async def _phases(self, session: aiohttp.ClientSession) -> Counter[str]:
        async with session.get(self._url) as answer:
            items = (await answer.json())["items"]
        return Counter(item.get("status", {}).get("phase", "none") for item in items)

    async def _delete(self, session: aiohttp.ClientSession, name: str) -> None:
        async with session.delete(f"{self._url}/{name}") as answer:
            assert answer.status == 200, await answer.text()


def slope(values: Sequence[float]) -> float:
    """Growth from one value to the next: the median over all pairs (Theil and Sen), which a few odd values do not
    move."""
    pairs = itertools.combinations(enumerate(values), 2)
    return statistics.median((y - x) / (j - i) for (i, x), (j, y) in pairs)


def test_memory_does_not_grow_with_the_jobs_that_have_passed(
    api: Cluster, stage: Stage, operator: Operator
) -> None:
    assert operator.process is not None
    process = psutil.Process(operator.process.pid)
    passage, began = Passage(api, stage), time.monotonic()
    memory: list[float] = []
    while passage.passed < JOBS:
        asyncio.run(passage.wave(WAVE))
        memory.append(process.memory_info().rss / MIB)
        print(
            f"{passage.passed:>6} jobs, {time.monotonic() - began:4.0f} s: {memory[-1]:.1f} MiB", flush=True
        )
    last_half = memory[len(memory) // 2 :]
    growth = slope(last_half) * len(last_half)
    print(f"growth over the last {WAVE * len(last_half)} jobs: {growth:.2f} MiB")
    wait_until(
        lambda: not metric(operator, "finetune_job_phase"), seconds=60, what="series of jobs that are gone"
    )
    assert set(stage.rayjobs_ever().values()) == {1}
    allowed = NOISE_MIB + KIB_PER_JOB * WAVE * len(last_half) / 1024
    assert growth < allowed, f"{growth:.1f} MiB more: {[round(value, 1) for value in memory]}"

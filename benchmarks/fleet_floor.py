"""The floor under the operator's figures: what the API server needs for the requests that a new job costs, sent by a
client that does nothing else.

For each FineTuneJob that is created, as the watch tells of it: the status with the attempt, the ConfigMap, the RayJob,
the status with its UID. The objects are those that the operator has made for another job.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from benchmarks.fleet_places import Json, Place, added, create_many, p50_p99
from finetune_local.cluster import Cluster
from finetune_operator.api import finetunejob
from finetune_operator.api.base import API_VERSION

KEPT = ("name", "namespace", "labels", "annotations")


@dataclass(frozen=True)
class Sample:
    """What the operator has made for one job."""

    status: Json
    config_map: Json
    rayjob: Json


@dataclass(frozen=True)
class Floor:
    """Times in seconds."""

    jobs: int
    p50: float
    p99: float
    seconds: float

    @property
    def rate(self) -> float:
        return self.jobs / self.seconds

    def row(self) -> str:
        times = f"{self.p50:.2f} s | {self.p99:.2f} s | {self.rate:.1f}/s"
        return f"| {self.jobs:,} | the API server alone | {times} |  |  |"


async def sample(place: Place, name: str) -> Sample:
    """Of a job whose RayJob is there."""
    core = f"{place.server}/api/v1/namespaces/{place.namespace}/configmaps"
    async with place.session() as session:

        async def read(url: str, name: str) -> Json:
            async with session.get(f"{url}/{name}") as answer:
                body: Json = await answer.json()
                return body

        job = await read(place.url(API_VERSION, finetunejob.PLURAL), name)
        made = await read(core, f"{name}-a1"), await read(place.url("ray.io/v1", "rayjobs"), f"{name}-a1")
    return Sample(job["status"], *made)


async def measure(cluster: Cluster, bodies: Sequence[Json], like: Sample, *, requests_at_once: int) -> Floor:
    """As many jobs at once, without an operator."""
    place = Place.make(cluster, f"floor-{len(bodies)}")
    jobs, rayjobs = place.url(API_VERSION, finetunejob.PLURAL), place.url("ray.io/v1", "rayjobs")
    told: asyncio.Queue[Json] = asyncio.Queue()
    seen: dict[str, float] = {}
    async with place.session() as session:

        async def listen() -> None:
            async for body in added(session, jobs):
                told.put_nowait(body)

        async def note() -> None:
            async for body in added(session, rayjobs):
                seen.setdefault(body["metadata"]["name"].removesuffix("-a1"), time.time())

        async def work() -> None:
            while True:
                await _act(session, place, await told.get(), like)

        tasks = [asyncio.create_task(one()) for one in (listen, note, *[work] * requests_at_once)]
        await asyncio.sleep(0.5)
        began = time.time()
        created = await create_many(place, jobs, bodies)
        async with asyncio.timeout(120 + len(bodies)):
            while len(seen) < len(bodies):  # noqa: ASYNC110 - coarse on purpose
                await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks)
    p50, p99 = p50_p99(seen[name] - at for name, at in created.items())
    return Floor(len(bodies), p50, p99, max(seen.values()) - began)


async def _act(session: aiohttp.ClientSession, place: Place, job: Json, like: Sample) -> None:
    """The four requests for one job."""
    name = job["metadata"]["name"]
    status = f"{place.url(API_VERSION, finetunejob.PLURAL)}/{name}/status"
    await _send(session, "PATCH", status, {"status": like.status | {"phase": "Pending"}})
    core = f"{place.server}/api/v1/namespaces/{place.namespace}/configmaps"
    await _send(session, "POST", core, _renamed(like.config_map, job))
    await _send(session, "POST", place.url("ray.io/v1", "rayjobs"), _renamed(like.rayjob, job))
    await _send(session, "PATCH", status, {"status": {"phase": "Provisioning"}})


def _renamed(body: Json, job: Json) -> Json:
    metadata: dict[str, Any] = {key: value for key, value in body["metadata"].items() if key in KEPT}
    metadata |= {
        "name": f"{job['metadata']['name']}-a1",
        "namespace": job["metadata"]["namespace"],
        "ownerReferences": [
            {key: job[key] for key in ("apiVersion", "kind")}
            | {key: job["metadata"][key] for key in ("name", "uid")}
        ],
    }
    return {key: value for key, value in body.items() if key != "status"} | {"metadata": metadata}


async def _send(session: aiohttp.ClientSession, method: str, url: str, body: Json) -> None:
    kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
    async with session.request(method, url, json=body, headers={"Content-Type": kind}) as answer:
        if answer.status > 299:
            raise RuntimeError(f"{method} {url}: {answer.status} {await answer.text()}")
        await answer.read()

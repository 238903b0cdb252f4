"""The local Ray's job API, as the gateway uses it; job names in and out are Ray's own (pod_folders.Folder.internal)."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import aiohttp

JOBS = "/api/jobs/"
TERMINAL = ("SUCCEEDED", "FAILED", "STOPPED")


@dataclasses.dataclass(frozen=True)
class Answer:
    """A whole HTTP answer."""

    status: int
    body: bytes
    headers: dict[str, str]


class RayClient:
    """Every method raises aiohttp.ClientError or TimeoutError while Ray is away."""

    def __init__(self, session: aiohttp.ClientSession, dashboard: str) -> None:
        self._session = session
        self._dashboard = dashboard

    async def forward(
        self, method: str, path: str, *, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> Answer:
        """Any request, unchanged."""
        url = self._dashboard + path
        async with self._session.request(method, url, data=body or None, headers=headers) as answer:
            return Answer(answer.status, await answer.read(), dict(answer.headers))

    async def submit(self, submission: dict[str, Any]) -> Answer:
        async with self._session.post(self._dashboard + JOBS, json=submission) as answer:
            return Answer(answer.status, await answer.read(), dict(answer.headers))

    async def list_jobs(self) -> list[dict[str, Any]]:
        async with self._session.get(self._dashboard + JOBS) as answer:
            jobs: list[dict[str, Any]] = await answer.json()
            return jobs

    async def find_status(self, job: str) -> str | None:
        """The job's status, or None when Ray does not know it (it is new, and took the old one's processes along)."""
        async with self._session.get(f"{self._dashboard}{JOBS}{job}") as answer:
            if answer.status == 404:
                return None
            answer.raise_for_status()
            return str((await answer.json())["status"])

    async def stop(self, job: str) -> None:
        """Stop a job and return when no process of it runs any more."""
        asked = False
        while (status := await self.find_status(job)) is not None and status not in TERMINAL:
            if not asked:
                async with self._session.post(f"{self._dashboard}{JOBS}{job}/stop") as answer:
                    asked = answer.status < 400
            await asyncio.sleep(0.3)

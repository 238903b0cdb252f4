"""Plays KubeRay and the trainer of every RayJob that the operator creates, so that the operator alone is measured.

Statuses come in the order in which KubeRay 1.6.2 was seen to write them; the trainer reports with a token of its own
through the operator's endpoint. Nothing of a RayJob is run.
"""

from __future__ import annotations

import asyncio
import json
import random
import ssl
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import aiohttp

Json = dict[str, Any]

JOB, ATTEMPT = "finetune.dev/job", "finetune.dev/attempt"
FINALIZER = "ray.io/rayjob-finalizer"
TRIES = 60  # of a report that is not taken yet; the trainer itself gives up later
DIGEST = "sha256:" + "0" * 64
NOTHING = {"class": "Internal", "exitCode": 1, "message": "nothing was committed"}


class Ending(StrEnum):
    """How an attempt goes."""

    WELL = "Well"  # commits an artifact and says so
    USER_FAULT = "UserFault"  # the trainer exits 65 and says so
    LOST = "Lost"  # the head is gone, and nobody said a word
    LATE = "Late"  # the same after a report of a step
    UNHEARD = "Unheard"  # commits an artifact, and is lost before it says so
    HANGS = "Hangs"  # reports a step and then nothing more
    WAITS = "Waits"  # its pods never run


Story = Callable[[str, int], Ending]
"""Job and number of the attempt -> how it goes."""


def all_well(job: str, attempt: int) -> Ending:
    return Ending.WELL


@dataclass
class Seen:
    """What the player saw, for the invariants and the figures. Times are time.time()."""

    created: dict[str, float] = field(default_factory=dict)
    """RayJob "namespace/name" -> when its creation was seen."""
    uids: dict[str, set[str]] = field(default_factory=dict)
    """RayJob "namespace/name" -> the UIDs that it ever had: more than one means that it was created twice."""
    owned: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    """UID of the job and name of the RayJob -> the UIDs that it ever had: a job may have taken another's name."""
    requests: int = 0
    ended: int = 0


class Player:
    """`pace` is the time between two statuses in seconds, `report_pace` that between two reports of `reports`;
    `connections` is how many requests are under way at once. It plays in one namespace, or in all."""

    def __init__(
        self,
        server: str,
        tls: ssl.SSLContext | None,
        *,
        story: Story = all_well,
        pace: float = 0.1,
        reports: int = 1,
        report_pace: float | None = None,
        connections: int = 32,
        namespace: str | None = None,
    ) -> None:
        self._server = server
        where = f"namespaces/{namespace}/" if namespace else ""
        self._rayjobs = f"{server}/apis/ray.io/v1/{where}rayjobs"
        self._tls = tls if tls is not None else False
        self._story = story
        self.pace = pace
        self._reports = reports
        self._report_pace = pace if report_pace is None else report_pace
        self._connections = connections
        self._playing: dict[str, asyncio.Task[None]] = {}
        self._committed: set[str] = set()  # UIDs of jobs
        self._jitter = random.Random(1)
        self._session: aiohttp.ClientSession | None = None
        self._trainers: aiohttp.ClientSession
        self.seen = Seen()

    async def run(self) -> None:
        """Play until cancelled; a vanished API server is waited for."""
        connector = aiohttp.TCPConnector(limit=self._connections, ssl=self._tls)
        trainers = aiohttp.TCPConnector(limit=200, force_close=True)  # each of them connects anew
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            aiohttp.ClientSession(connector=trainers) as self._trainers,
            asyncio.TaskGroup() as group,
        ):
            self._session = session
            async for event in self._watch():
                self._notice(event, group)

    def _notice(self, event: Json, group: asyncio.TaskGroup) -> None:
        body = event["object"]
        metadata = body["metadata"]
        uid, name = metadata["uid"], f"{metadata['namespace']}/{metadata['name']}"
        self.seen.uids.setdefault(name, set()).add(uid)
        owner = next((owner["uid"] for owner in metadata.get("ownerReferences", ())), "")
        self.seen.owned.setdefault((owner, metadata["name"]), set()).add(uid)
        if event["type"] == "DELETED" or "deletionTimestamp" in metadata:
            playing = self._playing.pop(uid, None)
            if playing is not None and playing.cancel():  # else it has come to its end
                self.seen.ended += 1
            if event["type"] != "DELETED" and FINALIZER in metadata.get("finalizers", []):
                group.create_task(self.let_go(body))
            return
        self.seen.created.setdefault(name, time.time())
        over = body.get("status", {}).get("jobDeploymentStatus") in ("Complete", "Failed")
        if uid not in self._playing and not over and JOB in metadata.get("labels", {}):
            self._playing[uid] = group.create_task(self.play(body))

    async def play(self, body: Json) -> None:
        """What becomes of a RayJob that is new."""
        labels, metadata = body["metadata"]["labels"], body["metadata"]
        ending = self._story(labels[JOB], int(labels[ATTEMPT]))
        await self._patch(body, {"metadata": {"finalizers": [FINALIZER]}})
        await self._status(body, jobDeploymentStatus="Initializing", rayClusterName=f"{metadata['name']}-x")
        looks = "inspect" in body["spec"].get("entrypoint", "")
        if ending is Ending.WAITS and not looks:
            return
        await self._status(body, jobDeploymentStatus="Running")
        await self._status(body, jobStatus="RUNNING")
        if looks:
            await self._inspect(body)
        elif ending in (Ending.WELL, Ending.USER_FAULT):
            await self.train(body, ending)
            await self._end(body, well=ending is Ending.WELL)
        else:
            await self._fall_silent(body, ending)
        self.seen.ended += 1

    async def _end(self, body: Json, *, well: bool, exit_code: int = 65) -> None:
        if well:
            await self._status(body, jobStatus="SUCCEEDED")
            await self._status(body, jobDeploymentStatus="Complete", succeeded=1)
            return
        text = f"Job entrypoint command failed with exit code {exit_code}, last available logs (truncated …):"
        await self._status(
            body,
            jobStatus="FAILED",
            jobDeploymentStatus="Failed",
            reason="AppFailed",
            message=text,
            failed=1,
        )

    async def _fall_silent(self, body: Json, ending: Ending) -> None:
        """Nobody tells how the trainer ends, if it does."""
        if ending is not Ending.LOST:
            url, token = await self._endpoint(body)
            await self._post(url, token, progress(1, 1), tries=TRIES)
            await asyncio.sleep(10 * self.pace)  # it does some work
        if ending is Ending.UNHEARD:
            self._committed.add(body["metadata"]["ownerReferences"][0]["uid"])
        if ending is not Ending.HANGS:
            message = "Job submission has failed. Reason: BackoffLimitExceeded."
            await self._status(
                body, jobDeploymentStatus="Failed", reason="SubmissionFailed", message=message, failed=1
            )

    async def _inspect(self, body: Json) -> None:
        url, token = await self._endpoint(body)
        found = body["metadata"]["ownerReferences"][0]["uid"] in self._committed
        report = progress(1, 1)
        report["finetune"] |= {"inspection": True, "result": _committed(body) if found else NOTHING}
        await self._post(url, token, report, tries=TRIES)
        await self._end(body, well=found, exit_code=1)

    async def train(self, body: Json, ending: Ending) -> bool:
        """Report as the trainer does; whether the result was taken."""
        url, token = await self._endpoint(body)
        for number in range(self._reports):
            await self._post(url, token, progress(number + 1, self._reports), tries=1)
            await asyncio.sleep(self._report_pace)
        last: Json = {"class": "BadData", "exitCode": 65, "message": "train.jsonl line 17: not JSON"}
        if ending is Ending.WELL:
            last = _committed(body)
        final = progress(self._reports, self._reports)
        final["finetune"]["result"] = last
        return await self._post(url, token, final, tries=TRIES)

    async def _endpoint(self, body: Json) -> tuple[str, str]:
        container = body["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
        environment = {item["name"]: item.get("value", "") for item in container["env"]}
        owner = body["metadata"]["ownerReferences"][0]["uid"]
        path = f"/api/v1/namespaces/{body['metadata']['namespace']}/serviceaccounts/default/token"
        request = {"spec": {"audiences": [f"finetune.dev/jobs/{owner}"], "expirationSeconds": 3600}}
        while (answer := await self._call("POST", path, request)) is None:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.2)  # as a kubelet waits for the service account of a new namespace
        return environment["KUBEFLOW_TRAINER_SERVER_URL"], answer["status"]["token"]

    async def _post(self, url: str, token: str, report: Json, *, tries: int) -> bool:
        """Whether the operator took it; answers of 4xx other than 429 are final, as for the trainer."""
        for number in range(tries):
            try:
                async with self._trainers.post(
                    url,
                    json=report,
                    headers={"Authorization": f"Bearer {token}"},
                    timeout=aiohttp.ClientTimeout(total=10),
                ) as answer:
                    if answer.status < 500 and answer.status != 429:
                        return answer.status == 200
            except (aiohttp.ClientError, TimeoutError):
                pass
            await asyncio.sleep(min(2.0, 0.2 * 2**number) * self._jitter.uniform(0.5, 1.0))
        return False

    async def _status(self, body: Json, **status: Any) -> None:
        await self._patch(body, {"status": status}, "/status")
        await asyncio.sleep(self.pace * self._jitter.uniform(0.5, 1.5))

    async def let_go(self, body: Json) -> None:
        """A RayJob is being deleted, and may go."""
        await self._patch(body, {"metadata": {"finalizers": None}})

    async def _patch(self, body: Json, patch: Json, part: str = "") -> None:
        metadata = body["metadata"]
        path = f"/apis/ray.io/v1/namespaces/{metadata['namespace']}/rayjobs/{metadata['name']}{part}"
        patch.setdefault("metadata", {})["uid"] = metadata["uid"]  # never one that has taken its name
        await self._call("PATCH", path, patch)

    async def _call(self, method: str, path: str, body: Json) -> Json | None:
        """The answer, or None where the object is gone. Retried for as long as the server is away."""
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        while True:
            self.seen.requests += 1
            try:
                async with self._open.request(
                    method, self._server + path, data=json.dumps(body), headers={"Content-Type": kind}
                ) as answer:
                    if answer.status < 300:
                        parsed: Json = await answer.json()
                        return parsed
                    if answer.status in (404, 409, 422):
                        return None
            except (aiohttp.ClientError, TimeoutError):
                pass
            await asyncio.sleep(0.5)

    @property
    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            raise RuntimeError("the player does not run")
        return self._session

    async def _watch(self) -> AsyncIterator[Json]:
        """All RayJobs, then their changes, for ever."""
        while True:
            try:
                async with self._open.get(self._rayjobs) as answer:
                    listed = await answer.json()
                for item in listed.get("items", []):
                    yield {"type": "ADDED", "object": item}
                version = listed["metadata"]["resourceVersion"]
                async for event in self._changes(version):
                    yield event
            except (aiohttp.ClientError, TimeoutError, KeyError, ValueError):
                await asyncio.sleep(0.5)

    async def _changes(self, version: str) -> AsyncIterator[Json]:
        url = f"{self._rayjobs}?watch=1&resourceVersion={version}&allowWatchBookmarks=true"
        timeout = aiohttp.ClientTimeout(total=None, sock_read=300)
        async with self._open.get(url, timeout=timeout, read_bufsize=1 << 22) as stream:
            async for line in stream.content:
                event = json.loads(line)
                if event["type"] == "ERROR":
                    return
                if event["type"] != "BOOKMARK":
                    yield event


def _committed(body: Json) -> Json:
    """The result that tells of an artifact."""
    artifact = {
        "uri": f"file:///artifacts/{body['metadata']['labels'][JOB]}",
        "digest": DIGEST,
        "sizeBytes": 1 << 20,
        "baseModel": "file:///model",
        "rank": 8,
    }
    return {"class": "Succeeded", "exitCode": 0, "artifact": artifact}


def progress(step: int, total: int) -> Json:
    """A report of the trainer in the middle of its work."""
    return {
        "trainerStatus": {
            "progressPercentage": 100 * step // max(total, 1),
            "estimatedRemainingSeconds": total - step,
            "metrics": [{"name": "loss", "value": f"{2 / (step + 1):.4f}"}],
        },
        "finetune": {"phase": "Training", "step": step, "totalSteps": total, "tokensPerSecond": 100.0},
    }

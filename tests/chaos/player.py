"""KubeRay and the trainers of a fleet, played on a real API server: many jobs, fast, and every fault at will.

What is played is what the operator can see: statuses as KubeRay 1.6.2 writes them, pods that take their time to go,
trainers (played_trainers.py) with real tokens. The player knows the truth (which processes are alive, what is saved
and committed), so it can say when two attempts ran at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from finetune_local import kubeaio, kubeapi
from finetune_operator.manifests import naming
from tests.chaos.played_trainers import Process, Trainers

Json = dict[str, Any]
RAYJOBS = "/apis/ray.io/v1/namespaces/{}/rayjobs"
MERGE = "application/merge-patch+json"
FINALIZER = "finetune.dev/chaos"  # on pods: as long as their process lives
GRACE = 1.5  # seconds between SIGTERM and SIGKILL
FORSAKEN = {
    "jobDeploymentStatus": "Failed",
    "reason": "SubmissionFailed",
    "message": "Job submission has failed. Reason: BackoffLimitExceeded.",
}


@dataclass
class _Played:
    body: Json
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    forsaken: bool = False
    """Whether KubeRay calls it failed while its process lives on."""

    @property
    def deleting(self) -> bool:
        return "deletionTimestamp" in self.body["metadata"]

    @property
    def held(self) -> bool:
        return bool(self.body["spec"].get("suspend", False))


class Player:
    """Use `run` in an event loop of its own; the other public methods may be called from it only."""

    def __init__(
        self,
        api: kubeaio.AsyncApi,
        session: aiohttp.ClientSession,
        namespace: str,
        *,
        addresses: Sequence[str],
        seed: int,
    ) -> None:
        self._api = api
        self._namespace = namespace
        self._dice = random.Random(seed)
        self._played: dict[str, _Played] = {}
        self.trainers = Trainers(session, addresses, random.Random(seed))
        self.uids: dict[str, set[str]] = defaultdict(set)
        """All UIDs that were seen under the name of a RayJob; the UID of the job is part of the key."""

    async def run(self) -> None:
        """Play until cancelled."""
        path = RAYJOBS.format(self._namespace)
        async with asyncio.TaskGroup() as group:
            while True:
                try:
                    found = await self._api.call("GET", path)
                    present = {item["metadata"]["uid"] for item in found["items"]}
                    for uid in set(self._played) - present:
                        self._played.pop(uid).changed.set()
                    for item in found["items"]:
                        self._notice(item, group)
                    async for event in self._api.watch(path, version=found["metadata"]["resourceVersion"]):
                        if event["type"] == "ERROR":
                            break
                        if event["type"] != "DELETED":
                            self._notice(event["object"], group)
                except kubeapi.ApiError:  # the API server is being restarted
                    await asyncio.sleep(0.3)

    def _notice(self, body: Json, group: asyncio.TaskGroup) -> None:
        uid = body["metadata"]["uid"]
        owner = body["metadata"]["ownerReferences"][0]["uid"]
        self.uids[f"{owner}/{body['metadata']['name']}"].add(uid)
        played = self._played.get(uid)
        if played is None:
            played = self._played[uid] = _Played(body)
            task = group.create_task(self._control(uid, played))
            task.add_done_callback(self._ended)
        played.body = body
        played.changed.set()

    def _ended(self, task: asyncio.Task[None]) -> None:
        """A player that fails is a fault of the test's: it must be told, or the operator looks guilty."""
        if not task.cancelled() and task.exception() is not None:
            error = "".join(traceback.format_exception(task.exception()))
            self.trainers.wrong.append(error)
            print(f"chaos: the player of {task.get_name()} failed: {error}")

    # ------------------------------------------------------------ KubeRay

    def forsake(self, process: Process) -> None:
        """KubeRay gives a RayJob up (its submitter died) whose process goes on until its pod is gone."""
        for played in self._played.values():
            if played.body["metadata"]["name"] == process.rayjob:
                played.forsaken = True
                played.changed.set()

    async def _control(self, uid: str, played: _Played) -> None:
        """One RayJob, from its creation to its deletion."""
        await self._patch(played, {"metadata": {"finalizers": [naming.KUBERAY_FINALIZER]}})
        while not played.deleting and uid in self._played:
            if not played.held:
                if await self._attempt(uid, played):
                    break
                continue
            await self._status(played, jobDeploymentStatus="Suspended", jobStatus=None)
            await self._until(played, lambda: not played.held or played.deleting)
        await self._until(played, lambda: played.deleting or uid not in self._played)
        self._played.pop(uid, None)
        await self._patch(played, {"metadata": {"finalizers": None}})

    async def _attempt(self, uid: str, played: _Played) -> bool:
        """Its pod and its process. Returns whether the RayJob is over; False: it was held back or deleted."""
        await self._status(played, jobDeploymentStatus="Initializing", jobStatus=None)
        await self._pause(0.1, 0.4)
        process = await self._process_of(played)
        await self._create_pod(process)
        running = asyncio.create_task(self.trainers.live(process))
        calling_off = asyncio.create_task(
            self._until(played, lambda: played.deleting or played.held or played.forsaken)
        )
        await self._status(played, jobDeploymentStatus="Running", jobStatus="RUNNING")
        try:
            await asyncio.wait({running, calling_off}, return_when=asyncio.FIRST_COMPLETED)
            over = running.done() or played.forsaken
            if over:
                await self._status(played, **(_ending(running.result()) if running.done() else FORSAKEN))
                await self._pause(0.0, 2.0)
            await self._take_down(process, running)
            return over
        finally:
            calling_off.cancel()

    async def _take_down(self, process: Process, running: asyncio.Task[int]) -> None:
        """Delete the pod: SIGTERM, grace, SIGKILL, and the pod is gone when the process is."""
        path = f"/api/v1/namespaces/{self._namespace}/pods/{process.pod}"
        await self._pause(0.0, 0.5)
        await self._insist("DELETE", path)
        process.orders.put_nowait("term")
        try:
            await asyncio.wait_for(asyncio.shield(running), GRACE)
        except TimeoutError:
            process.orders.put_nowait("kill")
            await running
        await self._insist("PATCH", path, {"metadata": {"finalizers": None}}, content_type=MERGE)

    async def _create_pod(self, process: Process) -> None:
        labels = naming.labels(process.job, process.attempt)
        token = {"serviceAccountToken": {"path": "token", "audience": naming.audience(process.uid)}}
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": process.pod, "labels": labels, "finalizers": [FINALIZER]},
            "spec": {
                "nodeName": "local",
                "containers": [{"name": "ray-head", "image": "none"}],
                "volumes": [{"name": "token", "projected": {"sources": [token]}}],
            },
        }
        await self._insist("POST", f"/api/v1/namespaces/{self._namespace}/pods", pod)

    async def _process_of(self, played: _Played) -> Process:
        metadata, spec = played.body["metadata"], played.body["spec"]
        container = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
        environment = {item["name"]: item.get("value", "") for item in container["env"]}
        owner = metadata["ownerReferences"][0]["uid"]
        path = f"/api/v1/namespaces/{self._namespace}/serviceaccounts/default/token"
        request = {"spec": {"audiences": [naming.audience(owner)], "expirationSeconds": 3600}}
        while (answer := await self._insist("POST", path, request)) is None:
            await asyncio.sleep(0.2)  # the account of a new namespace comes a moment later
        return Process(
            job=metadata["labels"][naming.LABEL_JOB],
            uid=owner,
            attempt=int(metadata["labels"][naming.LABEL_ATTEMPT]),
            rayjob=metadata["name"],
            pod=f"{metadata['name']}-{self._dice.randrange(16**5):05x}-head",
            inspect="inspect" in spec["entrypoint"],
            url=environment["KUBEFLOW_TRAINER_SERVER_URL"],
            token=answer["status"]["token"],
        )

    # ------------------------------------------------------------ writing

    async def _status(self, played: _Played, **status: Any) -> None:
        await self._patch(played, {"status": status}, part="/status")

    async def _patch(self, played: _Played, patch: Json, *, part: str = "") -> None:
        metadata = played.body["metadata"]
        patch.setdefault("metadata", {})["uid"] = metadata["uid"]  # never one that has taken its name
        path = f"{RAYJOBS.format(self._namespace)}/{metadata['name']}{part}"
        await self._insist("PATCH", path, patch, content_type=MERGE)

    async def _insist(self, method: str, path: str, body: Json | None = None, **more: Any) -> Any:
        """The answer; None where the object is gone or there already. Tried for as long as the server is away."""
        while True:
            try:
                return await self._api.call(method, path, body, **more)
            except kubeapi.ApiError as error:
                if error.status in (404, 409, 422):
                    return None
                await asyncio.sleep(0.3)

    async def _until(self, played: _Played, holds: Callable[[], bool]) -> None:
        while not holds():
            played.changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(played.changed.wait(), 1.0)

    async def _pause(self, low: float, high: float) -> None:
        await asyncio.sleep(self._dice.uniform(low, high))


def _ending(code: int) -> Json:
    """What KubeRay shows of a process that has ended."""
    if code == 0:
        return {"jobStatus": "SUCCEEDED", "jobDeploymentStatus": "Complete", "succeeded": 1}
    told = f"Job entrypoint command failed with exit code {code}, last available logs (truncated):\nplayed"
    return {
        "jobStatus": "FAILED",
        "jobDeploymentStatus": "Failed",
        "reason": "AppFailed",
        "message": told,
        "failed": 1,
    }

"""KubeRay and the trainers of a fleet, played on a real API server: many jobs, fast, and every fault at will.

What is played is what the operator can see: statuses as KubeRay 1.6.2 writes them, pods that take their time to go, a
trainer that saves, resumes, commits and reports with a real token. The player knows the truth (which processes are
alive, what is saved and committed), so it can say when two attempts ran at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from finetune_local import kubeaio, kubeapi
from finetune_operator.manifests import naming

Json = dict[str, Any]
RAYJOBS = "/apis/ray.io/v1/namespaces/{}/rayjobs"
MERGE = "application/merge-patch+json"
FINALIZER = "finetune.dev/chaos"  # on pods: as long as their process lives
TOTAL, PER_TICK, INTERVAL = 60, 2, 10  # optimizer steps: of a job, per tick, between checkpoints
TICK = 0.15  # seconds
GRACE = 1.5  # seconds between SIGTERM and SIGKILL
PATIENCE = 10.0  # seconds for which a result is offered
CLASSES = {
    64: "BadConfig", 65: "BadData", 74: "Storage", 75: "Preempted", 80: "GpuOutOfMemory", 81: "HostOutOfMemory",
    82: "NotFinite", 83: "Collective", 84: "CheckpointCorrupt", 1: "Internal",
}  # fmt: skip
KILLED = 137
FORSAKEN = {
    "jobDeploymentStatus": "Failed",
    "reason": "SubmissionFailed",
    "message": "Job submission has failed. Reason: BackoffLimitExceeded.",
}


@dataclass(eq=False)
class Process:
    """A trainer, or an inspection."""

    job: str
    uid: str
    """Of the FineTuneJob."""
    attempt: int
    rayjob: str
    inspect: bool
    url: str
    token: str
    orders: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    """term, kill, hang, or an exit code to end with."""
    step: int | None = None
    resumed: int = 0


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
        self, api: kubeaio.AsyncApi, session: aiohttp.ClientSession, namespace: str, seed: int
    ) -> None:
        self._api = api
        self._session = session
        self._namespace = namespace
        self._dice = random.Random(seed)
        self._played: dict[str, _Played] = {}
        self.alive: list[Process] = []
        self.wrong: list[str] = []
        self.saved: dict[str, int] = defaultdict(int)
        """Step of the newest checkpoint, by the job's UID."""
        self.committed: dict[str, str] = {}
        """Digest of the artifact, by the job's UID."""
        self.uids: dict[str, set[str]] = defaultdict(set)
        """All UIDs that were seen under the name of a RayJob; the UID of the job is part of the key."""
        self.mute = False
        """Whether reports are lost on their way."""

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
            self.wrong.append(error)
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
        running = asyncio.create_task(self._live(process))
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
        path = f"/api/v1/namespaces/{self._namespace}/pods/{process.rayjob}-head"
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
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": f"{process.rayjob}-head", "labels": labels, "finalizers": [FINALIZER]},
            "spec": {"nodeName": "local", "containers": [{"name": "ray-head", "image": "none"}]},
        }
        await self._insist("POST", f"/api/v1/namespaces/{self._namespace}/pods", pod)

    # ------------------------------------------------------------ the trainer

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
            inspect="inspect" in spec["entrypoint"],
            url=environment["KUBEFLOW_TRAINER_SERVER_URL"],
            token=answer["status"]["token"],
        )

    async def _live(self, process: Process) -> int:
        """The process, from its start to its exit code."""
        for other in self.alive:
            if other.uid == process.uid and not (other.inspect and process.inspect):
                self.wrong.append(f"{process.rayjob} started while {other.rayjob} was alive")
        self.alive.append(process)
        try:
            return await self._work(process)
        finally:
            self.alive.remove(process)

    async def _work(self, process: Process) -> int:
        if process.inspect:
            await asyncio.sleep(TICK)
            return await self._end(process, 0 if process.uid in self.committed else 1)
        process.step = process.resumed = self.saved[process.uid]
        while process.uid not in self.committed:
            try:
                order = await asyncio.wait_for(process.orders.get(), TICK)
            except TimeoutError:
                await self._take_steps(process)
                continue
            match order:
                case "kill":
                    return KILLED
                case "hang":
                    while await process.orders.get() != "kill":
                        pass
                    return KILLED
                case "term":
                    if self._dice.random() < 0.8:  # else the grace does not suffice
                        self.saved[process.uid] = process.step
                    return await self._end(process, 75)
                case code:
                    return await self._end(process, int(code))
        return await self._end(process, 0)

    async def _take_steps(self, process: Process) -> None:
        assert process.step is not None
        process.step += PER_TICK
        if process.step % INTERVAL == 0:
            self.saved[process.uid] = process.step
        if process.step >= TOTAL:
            self.committed[process.uid] = f"sha256:{hashlib.sha256(process.uid.encode()).hexdigest()}"
        else:
            await self._post(process, self._report(process))

    async def _end(self, process: Process, code: int) -> int:
        """Offer the result as long as there is patience, or until somebody kills."""
        body = self._report(process)
        result: Json = {
            "class": CLASSES.get(code, "Succeeded"),
            "exitCode": code,
            "message": f"played {code}",
        }
        if process.step is not None:
            result["step"] = process.step
        if code == 0:
            result["artifact"] = {
                "uri": f"file:///artifacts/{process.job}",
                "digest": self.committed[process.uid],
                "sizeBytes": 1,
                "baseModel": "file:///model",
            }
        body["finetune"]["result"] = result
        deadline = time.monotonic() + (PATIENCE if code != 75 else 1.0)
        while time.monotonic() < deadline and not await self._post(process, body):
            with contextlib.suppress(TimeoutError):
                if await asyncio.wait_for(process.orders.get(), 0.3) == "kill":
                    return KILLED
        return code

    def _report(self, process: Process) -> Json:
        step = process.step or 0
        ours: Json = {"phase": "Training", "step": step, "totalSteps": TOTAL}
        if not process.inspect:
            ours["resumedFromStep"] = process.resumed
        if self.saved[process.uid]:
            uri = f"file:///saved/{process.job}/checkpoint-{self.saved[process.uid]}"
            ours["checkpoint"] = {"step": self.saved[process.uid], "uri": uri}
        status = {"progressPercentage": 100 * step // TOTAL, "estimatedRemainingSeconds": TOTAL - step}
        return {"trainerStatus": status, "finetune": ours}

    async def _post(self, process: Process, body: Json) -> bool:
        """Whether the operator gave a final answer."""
        if self.mute:
            return False
        headers = {"Authorization": f"Bearer {process.token}"}
        timeout = aiohttp.ClientTimeout(total=10)
        try:
            async with self._session.post(process.url, json=body, headers=headers, timeout=timeout) as answer:
                return answer.status < 500 and answer.status != 429
        except (aiohttp.ClientError, TimeoutError):
            return False

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

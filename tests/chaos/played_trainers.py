"""The trainers of a played fleet: processes that save, resume, commit and report, and know what is true."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp

Json = dict[str, Any]
TOTAL, PER_TICK, INTERVAL = 160, 2, 10  # optimizer steps: of a job, per tick, between checkpoints
TICK = 0.15  # seconds
PATIENCE = 10.0  # seconds for which a result is offered
CLASSES = {
    64: "BadConfig", 65: "BadData", 74: "Storage", 75: "Preempted", 80: "GpuOutOfMemory", 81: "HostOutOfMemory",
    82: "NotFinite", 83: "Collective", 84: "CheckpointCorrupt", 1: "Internal",
}  # fmt: skip
KILLED = 137


@dataclass(eq=False)
class Process:
    """A trainer, or an inspection."""

    job: str
    uid: str
    """Of the FineTuneJob."""
    attempt: int
    rayjob: str
    pod: str
    inspect: bool
    url: str
    token: str
    orders: asyncio.Queue[str] = field(default_factory=asyncio.Queue)
    """term, kill, hang, or an exit code to end with."""
    step: int | None = None
    resumed: int = 0


class Trainers:
    """`addresses`: those of the operator's replicas; each report goes to one of them, as through a Service."""

    def __init__(self, session: aiohttp.ClientSession, addresses: Sequence[str], dice: random.Random) -> None:
        self._session = session
        self._addresses = tuple(addresses)
        self._dice = dice
        self.alive: list[Process] = []
        self.wrong: list[str] = []
        self.saved: dict[str, int] = defaultdict(int)
        """Step of the newest checkpoint, by the job's UID."""
        self.committed: dict[str, str] = {}
        """Digest of the artifact, by the job's UID."""
        self.begun: dict[tuple[str, int], int] = defaultdict(int)
        """UID of the job and attempt -> how many trainers it had, one after the other."""
        self.mute = False
        """Whether reports are lost on their way."""

    async def live(self, process: Process) -> int:
        """The process, from its start to its exit code. No other one of its job may be alive, nor one of an earlier job
        of its name: they may have the same folders."""
        for other in self.alive:
            both_look = other.inspect and process.inspect and other.uid == process.uid
            if other.job == process.job and not both_look:
                self.wrong.append(f"{process.rayjob} started while {other.rayjob} was alive")
        self.alive.append(process)
        self.begun[process.uid, process.attempt] += not process.inspect
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
        saved = TOTAL if process.uid in self.committed else self.saved[process.uid]
        step = saved if process.step is None else process.step
        ours: Json = {"phase": "Training", "step": step, "totalSteps": TOTAL}
        ours |= {"inspection": True} if process.inspect else {"resumedFromStep": process.resumed}
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
        url = self._dice.choice(self._addresses) + urlsplit(process.url).path
        try:
            async with self._session.post(url, json=body, headers=headers, timeout=timeout) as answer:
                return answer.status < 500 and answer.status != 429
        except (aiohttp.ClientError, TimeoutError):
            return False

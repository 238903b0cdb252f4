"""Fleets of jobs that chaos is let loose on: one with real trainers, one with played ones. Both know the same words."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import aiohttp

from finetune_local import kubeaio, kubeapi
from finetune_local.cluster import Cluster
from finetune_operator.manifests import naming
from tests import trainers
from tests.chaos.player import Player, Process
from tests.chaos.rollouts import Rollouts
from tests.clients import FINAL, Json, Kubectl, KubectlError, finetunejob
from tests.clusters import pid_of

Result = TypeVar("Result")
RETRY = {"maxInfraRetries": 1000, "maxUserRetries": 1000, "backoffSeconds": {"min": 0, "max": 2}}
ACTION = "finetune.dev/action"
HELD = '{"spec":{"suspend":true}}'
RELEASED = '{"spec":{"suspend":false}}'


class Fleet:
    """`size` jobs at any time; one that has ended is replaced until `closed`."""

    def __init__(self, cluster: Cluster, kubectl: Kubectl, parts: Sequence[str], *, size: int) -> None:
        self.cluster = cluster
        self.kubectl = kubectl
        self.parts = tuple(parts)
        self.size = size
        self.names: list[str] = []
        self.excused: set[str] = set()
        """Jobs that need not succeed: a person has ended them."""

    def body(self, name: str) -> Json:
        raise NotImplementedError

    def fill(self) -> None:
        missing = self.size - len(self.unfinished())
        for _ in range(missing):
            name = f"j{len(self.names) + 1}"
            self.names.append(name)
            self.kubectl.apply(self.body(name))

    def jobs(self) -> list[Json]:
        """All jobs that exist; asked again for as long as the API server is away."""
        deadline = time.monotonic() + 60
        while True:
            try:
                return self.kubectl.items("ftj")
            except KubectlError:
                assert time.monotonic() < deadline, "the API server does not come back"
                time.sleep(0.3)

    def unfinished(self) -> list[str]:
        return [j["metadata"]["name"] for j in self.jobs() if j.get("status", {}).get("phase") not in FINAL]

    # ------------------------------------------------------------ faults that both know

    def happen(self, fault: str, pick: float) -> str:
        """Do it to somebody; returns to whom, or why to nobody."""
        act: Callable[[float], str] = getattr(self.actor(fault), fault.replace(" ", "_"))
        try:
            return act(pick)
        except KubectlError as error:  # gone meanwhile, or the API server is away: another fault is at work
            return str(error).splitlines()[0][:100]

    def actor(self, fault: str) -> object:
        """Whose method the fault is."""
        return self

    def suspend(self, pick: float) -> str:
        return self._patch_job(pick, suspend=True)

    def resume(self, pick: float) -> str:
        held = [j["metadata"]["name"] for j in self.jobs() if j["spec"].get("suspend")]
        return self._patch(choose(held, pick), suspend=False)

    def cancel(self, pick: float) -> str:
        name = choose(self.unfinished(), pick)
        self.excused.add(name)
        self.kubectl("annotate", "ftj", name, f"{ACTION}=cancel", "--overwrite")
        return name

    def job_deleted(self, pick: float) -> str:
        name = choose(self.unfinished(), pick)
        self.kubectl("delete", "ftj", name, "--wait=false")
        return name

    def rayjob_deleted(self, pick: float) -> str:
        name = choose(self._names_of("rayjob"), pick)
        self.kubectl("delete", "rayjob", name, "--wait=false")
        return name

    def rayjob_held(self, pick: float) -> str:
        name = choose(self._names_of("rayjob"), pick)
        self.kubectl("patch", "rayjob", name, "--type=merge", "-p", HELD)
        return name

    def rayjob_released(self, pick: float) -> str:
        held = [b["metadata"]["name"] for b in self.kubectl.items("rayjob") if b["spec"].get("suspend")]
        self.kubectl("patch", "rayjob", choose(held, pick), "--type=merge", "-p", RELEASED)
        return choose(held, pick)

    def operator_killed(self, pick: float) -> str:
        return self._kill("operator")

    def operator_stands_still(self, pick: float) -> str:
        pid = pid_of(self.cluster, "operator")
        os.kill(pid, signal.SIGSTOP)
        time.sleep(1 + 3 * pick)
        os.kill(pid, signal.SIGCONT)
        return "operator"

    def apiserver_killed(self, pick: float) -> str:
        return self._kill("kube-apiserver")

    def heal(self) -> None:
        """Nobody holds anything any more."""
        for body in self.jobs():
            if body["spec"].get("suspend"):
                self._patch(body["metadata"]["name"], suspend=False)
        for body in self.kubectl.items("rayjob"):
            if body["spec"].get("suspend"):
                self.kubectl("patch", "rayjob", body["metadata"]["name"], "--type=merge", "-p", RELEASED)

    def _patch_job(self, pick: float, **spec: Any) -> str:
        return self._patch(choose(self.unfinished(), pick), **spec)

    def _patch(self, name: str, **spec: Any) -> str:
        self.kubectl("patch", "ftj", name, "--type=merge", "-p", json.dumps({"spec": spec}))
        return name

    def _names_of(self, kind: str) -> list[str]:
        return [body["metadata"]["name"] for body in self.kubectl.items(kind, "-l", naming.LABEL_JOB)]

    def _kill(self, part: str) -> str:
        os.kill(pid_of(self.cluster, part), signal.SIGKILL)
        self.cluster.up(self.parts)
        return part


class RealFleet(Fleet):
    """Real KubeRay, Ray and trainers of the tiny model."""

    WEIGHTS: ClassVar[dict[str, float]] = {
        "trainer killed": 5, "trainer terminated": 5, "suspend": 2, "resume": 4, "cancel": 0.3, "job deleted": 0.3,
        "rayjob deleted": 2, "rayjob held": 1, "rayjob released": 3, "raycluster deleted": 2, "pod deleted": 2,
        "operator killed": 2, "operator stands still": 1, "kuberay killed": 1, "gateway killed": 1,
        "apiserver killed": 0.5,
    }  # fmt: skip

    def __init__(self, *args: Any, model: Path, data: Path, steps: int, **more: Any) -> None:
        super().__init__(*args, **more)
        self.model, self.data, self.steps = model, data, steps

    def body(self, name: str) -> Json:
        hyper = {"maxSteps": self.steps, "globalBatchSize": 8, "maxLength": 64, "learningRate": 0.001}
        saved = {"everySteps": 25}
        return finetunejob(name, self.model, self.data, hyperparameters=hyper, checkpoint=saved, retry=RETRY)

    def trainer_killed(self, pick: float) -> str:
        name = choose(self._at_work(), pick)
        trainers.kill(self.kubectl.namespace, name)
        return name

    def trainer_terminated(self, pick: float) -> str:
        name = choose(self._at_work(), pick)
        trainers.send(self.kubectl.namespace, name, signal.SIGTERM)
        return name

    def raycluster_deleted(self, pick: float) -> str:
        name = choose(self._names_of("raycluster"), pick)
        self.kubectl("delete", "raycluster", name, "--wait=false")
        return name

    def pod_deleted(self, pick: float) -> str:
        name = choose(self._names_of("pod"), pick)
        self.kubectl("delete", "pod", name, "--wait=false")
        return name

    def kuberay_killed(self, pick: float) -> str:
        return self._kill("kuberay")

    def gateway_killed(self, pick: float) -> str:
        return self._kill("ray-gateway")

    def _at_work(self) -> list[str]:
        return [name for name in self.names if trainers.find(self.kubectl.namespace, name)]


class PlayedFleet(Fleet):
    """Real API server, garbage collection and KWOK; KubeRay and the trainers are played in a thread.

    Beside it, the same operator leads two rollouts.
    """

    WEIGHTS: ClassVar[dict[str, float]] = {
        "killed": 6, "term": 5, "hang": 2, "code 74": 3, "code 83": 2, "code 84": 2, "code 1": 2, "code 80": 1,
        "code 81": 1, "code 65": 1, "forsaken": 5, "suspend": 4, "resume": 8, "cancel": 1, "job deleted": 1,
        "rayjob deleted": 4, "rayjob held": 3, "rayjob released": 8, "silence": 2, "operator killed": 3,
        "operator stands still": 2, "apiserver killed": 1, **Rollouts.WEIGHTS,
    }  # fmt: skip

    def __init__(self, *args: Any, seed: int, rollouts: Rollouts, **more: Any) -> None:
        super().__init__(*args, **more)
        self.rollouts = rollouts
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(
            target=lambda: self._loop.run_until_complete(self._play(seed)), daemon=True
        )
        self._stop = asyncio.Event()
        self.player: Player

    def body(self, name: str) -> Json:
        body = finetunejob(name, Path("/model"), Path("/data.jsonl"), retry=RETRY)
        body["spec"]["deadlines"] = {"stallSeconds": 10}
        return body

    @contextmanager
    def playing(self) -> Iterator[None]:
        self._thread.start()
        assert self._ready.wait(20)
        try:
            yield
        finally:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(20)

    async def _play(self, seed: int) -> None:
        server = f"https://127.0.0.1:{self.cluster.ports['kube-apiserver']}"
        tls = kubeapi.client_context(self.cluster.layout.pki, "admin")
        async with kubeaio.AsyncApi(server, tls) as api, aiohttp.ClientSession() as session:
            self.player = Player(api, session, self.kubectl.namespace, seed)
            running = asyncio.create_task(self.player.run())
            self._ready.set()
            stopping = asyncio.create_task(self._stop.wait())
            await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
            running.cancel()

    def call(self, act: Callable[[], Result]) -> Result:
        """Something that the player's own thread must do."""

        async def run() -> Result:
            return act()

        coroutine: Coroutine[Any, Any, Result] = run()
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(20)

    def happen(self, fault: str, pick: float) -> str:
        if fault.startswith("code "):
            return self._order(pick, fault.removeprefix("code "))
        return super().happen(fault, pick)

    def actor(self, fault: str) -> object:
        return self.rollouts if fault in Rollouts.WEIGHTS else self

    def killed(self, pick: float) -> str:
        return self._order(pick, "kill")

    def term(self, pick: float) -> str:
        return self._order(pick, "term")

    def hang(self, pick: float) -> str:
        return self._order(pick, "hang")

    def forsaken(self, pick: float) -> str:
        return self._to_one(pick, lambda process: self.player.forsake(process))

    def silence(self, pick: float) -> str:
        """Reports are lost for a while."""
        self.player.mute = True
        time.sleep(1 + 4 * pick)
        self.player.mute = False
        return "all"

    def _order(self, pick: float, order: str) -> str:
        return self._to_one(pick, lambda process: process.orders.put_nowait(order))

    def _to_one(self, pick: float, act: Callable[[Process], None]) -> str:
        def find() -> str:
            alive = sorted((p for p in self.player.alive if not p.inspect), key=lambda p: p.rayjob)
            if not alive:
                return "nobody"
            process = alive[int(pick * len(alive))]
            act(process)
            return process.rayjob

        return self.call(find)


def choose(names: Sequence[str], pick: float) -> str:
    """One of them. Raises KubectlError where there is none: nothing can happen then."""
    if not names:
        raise KubectlError("nobody")
    return sorted(names)[int(pick * len(names))]

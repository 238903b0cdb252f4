"""A fleet with played trainers: many jobs, fast."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import aiohttp

from finetune_local import kubeaio, kubeapi
from tests.chaos.fleets import LocalFleet
from tests.chaos.played_trainers import Process
from tests.chaos.player import Player
from tests.chaos.replicas import Replicas
from tests.chaos.rollouts import Rollouts
from tests.clients import Json, finetunejob

Result = TypeVar("Result")


class PlayedFleet(LocalFleet):
    """Real API server, garbage collection and KWOK; KubeRay and the trainers are played in a thread.

    Beside it, the same operators lead two rollouts.
    """

    WEIGHTS: ClassVar[dict[str, float]] = {
        "killed": 6, "term": 5, "hang": 2, "code 74": 3, "code 83": 2, "code 84": 2, "code 1": 2, "code 80": 1,
        "code 81": 1, "code 65": 1, "forsaken": 5, "suspend": 4, "resume": 8, "cancel": 1, "job deleted": 1,
        "job replaced": 4, "rayjob deleted": 4, "rayjob held": 3, "rayjob released": 8, "silence": 2,
        "apiserver killed": 0.5, **Rollouts.WEIGHTS, **Replicas.WEIGHTS,
    }  # fmt: skip

    def __init__(self, *args: Any, seed: int, rollouts: Rollouts, replicas: Replicas, **more: Any) -> None:
        super().__init__(*args, **more)
        self.rollouts, self.replicas = rollouts, replicas
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(
            target=lambda: self._loop.run_until_complete(self._play(seed)), daemon=True
        )
        self._stop = asyncio.Event()
        self.player: Player

    def body(self, name: str) -> Json:
        body = finetunejob(name, Path("/model"), Path("/data.jsonl"), retry=self.retry(name))
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
            addresses = self.replicas.addresses
            self.player = Player(api, session, self.kubectl.namespace, addresses=addresses, seed=seed)
            running = asyncio.create_task(self.player.run())
            self._ready.set()
            stopping = asyncio.create_task(self._stop.wait())
            await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if running.done():
                running.result()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

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
        if fault in Replicas.WEIGHTS:
            return self.replicas
        return self.rollouts if fault in Rollouts.WEIGHTS else self

    def heal(self) -> None:
        self.replicas.heal()
        super().heal()

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
        self.player.trainers.mute = True
        time.sleep(1 + 4 * pick)
        self.player.trainers.mute = False
        return "all"

    def _order(self, pick: float, order: str) -> str:
        return self._to_one(pick, lambda process: process.orders.put_nowait(order))

    def _to_one(self, pick: float, act: Callable[[Process], None]) -> str:
        def find() -> str:
            alive = sorted((p for p in self.player.trainers.alive if not p.inspect), key=lambda p: p.rayjob)
            if not alive:
                return "nobody"
            process = alive[int(pick * len(alive))]
            act(process)
            return process.rayjob

        return self.call(find)

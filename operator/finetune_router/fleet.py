"""The worker processes: starts them, passes snapshots on, gathers counters, starts anew what died or hangs.

The parent owns the listening sockets, one per worker (SO_REUSEPORT spreads connections over them): a worker that is
started anew finds its socket with the connections that waited meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from finetune_operator.api.routes import Snapshot
from finetune_router import counters
from finetune_router.config import RouterConfig
from finetune_router.control import Channel, Message
from finetune_router.exposition import MetricsBoard
from finetune_router.ledger import Epoch, Ledger

logger = logging.getLogger(__name__)

HANG_SECONDS = 10.0  # without a sign of life, which comes twice a second: the worker is stuck and is replaced
START_SECONDS = 60.0  # until it serves, on a machine that is busy otherwise
RESTART_SECONDS = 0.2  # doubled with each early death
_LONGEST_RESTART = 10.0
_APPLY_SECONDS = 5.0
_REPORT_SECONDS = 1.0
_KILL_SECONDS = 5.0  # after the grace time
_BACKLOG = 4096


@dataclass(eq=False)
class Life:
    """One life of one worker."""

    epoch: Epoch
    process: asyncio.subprocess.Process
    channel: Channel
    started: float
    heard: float
    serving: bool = False
    version: int = -1
    in_flight: int = 0
    mirrors: int = 0
    unread: int = 0
    news: asyncio.Event = field(default_factory=asyncio.Event)
    reported: int = 0


class Fleet:
    """All workers of this router."""

    def __init__(self, config: RouterConfig, ledger: Ledger, board: MetricsBoard) -> None:
        self._config = config
        self._ledger = ledger
        self._board = board
        self._listeners: list[socket.socket] = []
        self._lives: dict[int, Life] = {}
        self._keepers: list[asyncio.Task[None]] = []
        self._snapshot: Snapshot | None = None
        self._routes: dict[str, dict[str, Any]] = {}
        self._stopping = False
        self._number = 0
        self.restarts = 0

    @property
    def lives(self) -> tuple[Life, ...]:
        return tuple(self._lives.values())

    @property
    def port(self) -> int:
        port: int = self._listeners[0].getsockname()[1]
        return port

    def listen(self) -> None:
        """Open the data port. Raises OSError when it is taken."""
        port = self._config.port
        for _ in range(self._config.workers):
            listener = open_listener(self._config.host, port)
            port = listener.getsockname()[1]
            self._listeners.append(listener)

    def start(self) -> None:
        self._keepers = [asyncio.create_task(self._keep(slot)) for slot in range(self._config.workers)]

    def all_serving(self) -> bool:
        lives = self._lives
        return len(lives) == self._config.workers and all(life.serving for life in lives.values())

    def version(self) -> int:
        """The oldest version that any worker applies; -1 while one is starting and none was ever given."""
        wanted = -1 if self._snapshot is None else self._snapshot.version
        # A worker that is just being started serves nobody until it has the newest snapshot.
        return min((life.version for life in self.lives if life.serving), default=wanted)

    async def apply(self, snapshot: Snapshot) -> int:
        """Give the snapshot to all workers and wait until they apply it; returns what `version` says then."""
        documents = {route.alias: route.model_dump(mode="json", by_alias=True) for route in snapshot.routes}
        change = {
            "version": snapshot.version,
            "changed": [new for alias, new in documents.items() if self._routes.get(alias) != new],
            "removed": [alias for alias in self._routes if alias not in documents],
            "base_models": _dump_bases(snapshot),
        }
        self._snapshot, self._routes = snapshot, documents
        self._ledger.compare({route.alias: counters.comparison_of(route) for route in snapshot.routes})
        for life in self.lives:
            life.channel.send("routes", change=change)
        await self._until(lambda life: not life.serving or life.version >= snapshot.version, _APPLY_SECONDS)
        return self.version()

    async def gather(self) -> None:
        """Ask all workers for their newest counters; one that does not answer soon is passed over."""
        self._number += 1
        number = self._number
        for life in self.lives:
            life.channel.send("report", number=number)
        await self._until(lambda life: not life.serving or life.reported >= number, _REPORT_SECONDS)

    def announce_drain(self) -> None:
        """From now on no connection is kept alive, but new ones are still taken."""
        self._stopping = True
        for life in self.lives:
            life.channel.send("draining")

    async def drain(self) -> None:
        """Take no more connections, let running requests end within the grace time, then stop the processes."""
        self._stopping = True
        for life in self.lives:
            life.channel.send("drain")
        for listener in self._listeners:
            listener.close()
        patience = self._config.grace + _KILL_SECONDS
        _, late = await asyncio.wait(self._keepers, timeout=patience) if self._keepers else ((), ())
        for life in self.lives:
            life.process.kill()
        if late:
            await asyncio.wait(late, timeout=_KILL_SECONDS)

    async def _keep(self, slot: int) -> None:
        """Keep one worker alive until the router stops."""
        pause = RESTART_SECONDS
        while not self._stopping:
            try:
                life = await self._launch(slot)
            except OSError as error:  # no memory, or no processes left, just now
                pause = min(pause * 2, _LONGEST_RESTART)
                logger.error("worker %d cannot be started, next try in %.1f s: %s", slot, pause, error)
                await asyncio.sleep(pause)
                continue
            try:
                await self._listen_to(life)
            finally:
                self._lives.pop(slot, None)
                self._ledger.end(life.epoch.name)
                self._board.end(life.epoch.name)
            code = await life.process.wait()
            if self._stopping:
                return
            self.restarts += 1
            pause = (
                RESTART_SECONDS if time.monotonic() - life.started > 60 else min(pause * 2, _LONGEST_RESTART)
            )
            logger.error("worker %d ended with %d; another one starts in %.1f s", slot, code, pause)
            await asyncio.sleep(pause)

    async def _launch(self, slot: int) -> Life:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        listener = self._listeners[slot]
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "finetune_router.worker", str(theirs.fileno()), str(listener.fileno()),
            pass_fds=(theirs.fileno(), listener.fileno()),
        )  # fmt: skip
        theirs.close()
        channel = Channel(*await asyncio.open_connection(sock=ours))
        now = time.monotonic()
        epoch = self._ledger.begin(f"worker-{uuid.uuid4().hex}")
        life = Life(epoch=epoch, process=process, channel=channel, started=now, heard=now)
        channel.send("setup", config=self._config.to_json())
        if self._snapshot is not None:
            channel.send(
                "routes",
                change={
                    "version": self._snapshot.version,
                    "changed": list(self._routes.values()),
                    "removed": [],
                    "base_models": _dump_bases(self._snapshot),
                },
            )
        self._lives[slot] = life
        channel.send("serve")
        if self._stopping:  # it was not there yet when the others were told
            channel.send("drain")
        return life

    async def _listen_to(self, life: Life) -> None:
        """Take in a worker's messages until it is gone; a silent one is killed."""
        while True:
            patience = HANG_SECONDS if life.serving else START_SECONDS
            if self._stopping:
                patience += self._config.grace
            try:
                async with asyncio.timeout(patience):
                    message = await life.channel.receive()
            except TimeoutError:
                logger.error("a worker has given no sign of life for %.0f s and is replaced", patience)
                life.process.kill()
                message = None
            if message is None:
                life.channel.close()
                return
            life.heard = time.monotonic()
            self._take(life, message)
            life.news.set()

    def _take(self, life: Life, message: Message) -> None:
        match message["kind"]:
            case "serving":
                life.serving = True
            case "applied":
                life.version = message["version"]
            case "refused":
                logger.error("a worker refused snapshot %s and is replaced", message["version"])
                life.process.kill()
            case "counters":
                self._ledger.update(life.epoch, message)
                self._board.update(life.epoch.name, message)
            case "beat":
                life.in_flight, life.mirrors = message["in_flight"], message["mirrors"]
                life.unread = message["unread"]
            case "reported":
                if message["number"] is not None:
                    life.reported = message["number"]

    async def _until(self, done: Callable[[Life], bool], seconds: float) -> None:
        """Wait until it holds for all workers that are there, but not longer than that."""
        end = time.monotonic() + seconds
        while waiting := [life for life in self.lives if not done(life)]:
            left = end - time.monotonic()
            if left <= 0:
                return
            for life in waiting:
                life.news.clear()
            tasks = [asyncio.ensure_future(life.news.wait()) for life in waiting]
            await asyncio.wait(tasks, timeout=min(left, 0.5), return_when=asyncio.FIRST_COMPLETED)
            for task in tasks:
                task.cancel()


def _dump_bases(snapshot: Snapshot) -> list[dict[str, Any]]:
    return [base.model_dump(mode="json", by_alias=True) for base in snapshot.base_models]


def open_listener(host: str, port: int) -> socket.socket:
    """A listening socket that others may share the port with. Raises OSError."""
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def describe(life: Life) -> dict[str, Any]:
    """A worker, for people who look at the admin port."""
    return {
        "pid": life.process.pid,
        "serving": life.serving,
        "version": life.version,
        "inFlight": life.in_flight,
        "mirrors": life.mirrors,
    }

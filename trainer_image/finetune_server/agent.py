"""Brings adapters to an engine and says what is really loaded.

The wanted adapters are kept in a file; the engine's own list is the truth. Every second the two are compared: what is
missing is downloaded, verified, loaded and asked for one token, also after the engine restarted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_server import downloads, threads, verification, wanted
from finetune_server.engine_client import EngineClient, EngineError, Facts
from finetune_server.verification import Refused
from finetune_server.wanted import Entry, Reason, State

LOG = logging.getLogger("finetune_server.agent")
POLL_SECONDS = 1.0
PATIENCE = 2  # observations in a row that may fail before the engine counts as gone
LISTED_SECONDS = 3.0  # an adapter that was loaded must be in the engine's list by then


class Conflict(Exception):  # noqa: N818  as the API reports it
    """The name belongs to another artifact."""


@dataclass(frozen=True)
class Settings:
    cache: Path
    state_file: Path | None  # None: nothing is remembered
    max_loras: int = 0  # 0: what the engine says
    max_lora_rank: int = 0  # 0: the engine decides
    base_uri: str | None = None  # the engine's base model; None: the root that the engine tells
    load_timeout: float = 120.0  # seconds for the engine's call
    download_timeout: float = 900.0  # seconds


class Agent:
    """The agent of one engine. All methods run on one event loop."""

    def __init__(self, client: EngineClient, settings: Settings) -> None:
        self.client = client
        self.settings = settings
        self._entries, self._leaving = wanted.read(settings.state_file)  # wanted ones; names to be unloaded
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._touched: set[str] = set()  # names that this agent asked the engine for
        self._facts: Facts | None = None  # None: the engine is not ready
        self._message = "the engine has not answered yet"
        self._misses = 0
        self._seen = 0.0  # when the look began that the facts are from
        self._engine_lock = asyncio.Lock()  # one load at a time: places are counted before
        self._wake = asyncio.Event()

    # What callers ask.

    def put(self, name: str, uri: str, digest: str) -> bool:
        """Wants an adapter. Returns True when it is loaded already.

        Raises Conflict for another digest, OSError when it cannot be written down.
        """
        entry = self._entries.get(name)
        if entry is not None and entry.digest != digest and entry.state is not State.FAILED:
            raise Conflict(
                f"{name} is {entry.state.lower()} with digest {entry.digest}; names are never reused"
            )
        if entry is not None and entry.digest == digest and entry.state is not State.FAILED:
            entry.uri = uri
            return entry.state is State.LOADED
        entry = Entry(name, uri, digest, message="waiting")
        self._remember({**self._entries, name: entry}, self._leaving - {name})
        return False

    def delete(self, name: str) -> bool:
        """No longer wants an adapter. Returns False when neither agent nor engine has it.

        Raises OSError when it cannot be written down.
        """
        # An engine that does not answer may still have it.
        if name not in self._entries and self._facts is not None and name not in self._facts.adapters:
            return False
        rest = {other: entry for other, entry in self._entries.items() if other != name}
        self._remember(rest, self._leaving | {name})
        task = self._tasks.pop(name, None)
        if task is not None:
            task.cancel()
        return True

    def _remember(self, entries: dict[str, Entry], leaving: set[str]) -> None:
        """Writes down what is wanted before it counts: what was told to be refused is not done all the same."""
        wanted.write(self.settings.state_file, entries, leaving)
        self._entries, self._leaving = entries, leaving
        self._wake.set()

    async def status(self) -> dict[str, Any]:
        """Returns the document of GET /agent/v1/status, after a fresh look at the engine."""
        await self._observe()
        facts = self._facts
        names = list(facts.base_models) if facts else []
        return {
            "apiVersion": "agent/v1",
            "engine": {
                "ready": facts is not None,
                "instance": facts.instance if facts else "",
                "baseModel": names[0] if names else "",
                "baseModels": names,
                "message": self._message,
            },
            "capacity": {
                # Null, not 0, where it is not known: 0 would be a limit that no adapter keeps.
                "maxLoras": self._max_loras() or None,
                "loadedLoras": len(facts.adapters) if facts else 0,
                "maxLoraRank": self.settings.max_lora_rank or None,
            },
            "adapters": [entry.document() for entry in self._entries.values()],
        }

    # The loop.

    async def run(self) -> None:
        """Reconciles until it is cancelled."""
        cache, seconds = self.settings.cache, 2 * self.settings.download_timeout
        threads.begin(lambda: downloads.clean_parts(cache, seconds=seconds))
        try:
            while True:
                self._wake.clear()
                try:
                    await self._reconcile()
                except Exception:  # a full disk, for example: what is wanted stays wanted
                    LOG.exception("a round failed; trying again")
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), POLL_SECONDS)
        finally:
            tasks = list(self._tasks.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _reconcile(self) -> None:
        await self._observe()
        if self._facts is not None:
            self._find_strays(self._facts)
            await self._unload_leaving()
            self._start_loads()

    async def _observe(self) -> None:
        begun = asyncio.get_running_loop().time()
        try:
            facts = await self.client.observe()
        except EngineError as error:
            self._misses += 1
            if self._misses >= PATIENCE or self._facts is None:
                self._lost(f"{error}")
            return
        self._misses = 0
        if begun < self._seen:
            return  # overtaken by a later look
        self._seen = begun
        if self._facts is not None and facts.instance != self._facts.instance:
            LOG.info("the engine restarted")
        self._facts, self._message = facts, ""
        for entry in self._entries.values():
            lost = _find_loss(entry, facts) if entry.state is State.LOADED and entry.since < begun else ""
            if lost:
                LOG.info("adapter %s: %s", entry.name, lost)
                entry.state, entry.message = State.LOADING, lost
                self._wake.set()

    def _lost(self, message: str) -> None:
        self._facts, self._message = None, message
        for entry in self._entries.values():
            if entry.state is State.LOADED:
                entry.state, entry.message = State.LOADING, "the engine is not ready"

    async def _unload_leaving(self) -> None:
        for name in list(self._leaving):
            try:
                async with self._engine_lock:
                    await self.client.unload(name)
            except EngineError as error:
                LOG.warning("adapter %s could not be unloaded (%s); trying again", name, error)
                continue
            LOG.info("adapter %s unloaded", name)
            self._leaving.discard(name)
            try:
                wanted.write(self.settings.state_file, self._entries, self._leaving)
            except OSError as error:  # a later agent unloads it once more, which harms nobody
                LOG.warning("that %s is unloaded could not be written down (%s)", name, error)
            self._clean()

    def _clean(self) -> None:
        """Begins to remove copies that nobody wants; nobody waits for it."""

        def wanted_now() -> set[str]:
            return {entry.digest for entry in list(self._entries.values())}

        threads.begin(lambda: downloads.clean(self.settings.cache, wanted=wanted_now))

    def _find_strays(self, facts: Facts) -> None:
        """Marks what the engine still loaded after we gave up on it, for example after a timeout."""
        for name in self._touched & facts.adapters.keys():
            entry = self._entries.get(name)
            if (entry is None or entry.state is State.FAILED) and name not in self._tasks:
                self._leaving.add(name)

    def _start_loads(self) -> None:
        for name, entry in self._entries.items():
            if entry.state is State.LOADING and name not in self._tasks:
                task = asyncio.create_task(self._load(entry), name=f"load {name}")
                self._tasks[name] = task
                task.add_done_callback(lambda done, name=name: self._ended(name, done))  # type: ignore[misc]

    def _ended(self, name: str, task: asyncio.Task[None]) -> None:
        if self._tasks.get(name) is task:
            del self._tasks[name]
        if not task.cancelled() and task.exception() is not None:
            LOG.error("loading %s ended unexpectedly", name, exc_info=task.exception())
            entry = self._entries.get(name)
            if entry is not None:
                entry.state, entry.reason = State.FAILED, Reason.LOAD_FAILED
                entry.message = f"the agent failed: {type(task.exception()).__name__}; its log says more"
        self._wake.set()

    async def _load(self, entry: Entry) -> None:
        try:
            await self._bring(entry)
        except Refused as refused:
            entry.state, entry.reason, entry.message = State.FAILED, refused.reason, str(refused)
            LOG.warning("adapter %s failed: %s: %s", entry.name, refused.reason, refused)
        else:
            LOG.info("adapter %s loaded and probed", entry.name)

    async def _bring(self, entry: Entry) -> None:
        """Downloads, verifies, loads and probes. Raises Refused, which says what was wrong."""
        self._check_capacity(entry)
        entry.message = "downloading"
        seconds = self.settings.download_timeout
        artifact = await verification.fetch(entry, cache=self.settings.cache, seconds=seconds)
        verification.check_rank(artifact, limit=self.settings.max_lora_rank)
        root = self.settings.base_uri or (self._facts.root if self._facts else None)
        warning = await verification.check_base(artifact, root, seconds=seconds)
        async with self._engine_lock:
            self._check_capacity(entry)  # another one may have come first
            entry.message = "loading"
            try:
                await self._load_into_engine(entry, artifact.folder)
                await self._probe(entry)
            except Refused:
                with contextlib.suppress(EngineError):  # it must not stay half loaded
                    await self.client.unload(entry.name)
                raise
        entry.state, entry.reason, entry.message = State.LOADED, None, warning
        entry.since = asyncio.get_running_loop().time()

    def _max_loras(self) -> int:
        """Places for adapters; 0 where neither the settings nor the engine tell."""
        return self.settings.max_loras or (self._facts.max_loras if self._facts else None) or 0

    def _check_capacity(self, entry: Entry) -> None:
        limit = self._max_loras()
        loaded = [
            one.name for one in self._entries.values() if one.state is State.LOADED and one is not entry
        ]
        if limit and len(loaded) >= limit:
            raise Refused(
                Reason.CAPACITY_FULL,
                f"all {limit} places for adapters are taken ({', '.join(loaded)}); "
                "delete one, or raise --max-loras",
            )

    async def _load_into_engine(self, entry: Entry, folder: Path) -> None:
        facts = self._facts
        path = str(folder)
        if facts is not None and facts.adapters.get(entry.name) == path:
            return  # loaded from these very files before this process began
        seconds = self.settings.load_timeout
        await self._call(lambda: self._replace(entry.name, path, seconds=seconds), Reason.LOAD_FAILED)

    async def _replace(self, name: str, path: str, *, seconds: float) -> None:
        self._touched.add(name)
        try:
            await self.client.load(name, path, seconds=seconds)
        except EngineError as error:
            if "already been loaded" not in str(error):
                raise
            await self.client.unload(name)  # by somebody else, from who knows where
            await self.client.load(name, path, seconds=seconds)

    async def _probe(self, entry: Entry) -> None:
        """Believes the engine's list and one token, not the answer to the load call."""
        name = entry.name
        deadline = asyncio.get_running_loop().time() + LISTED_SECONDS
        while True:
            facts: Facts = await self._call(self.client.observe, Reason.PROBE_FAILED)
            if name in facts.adapters:
                entry.root = facts.adapters[name]
                break
            if asyncio.get_running_loop().time() > deadline:
                raise Refused(
                    Reason.PROBE_FAILED, "the engine said that it is loaded, but /v1/models does not list it"
                )
            await asyncio.sleep(0.1)
        await self._call(lambda: self.client.probe(name), Reason.PROBE_FAILED)

    async def _call(self, call: Callable[[], Awaitable[Any]], otherwise: Reason) -> Any:
        try:
            return await call()
        except EngineError as error:
            raise Refused(_reason_of(error, otherwise), str(error)) from error


def _find_loss(entry: Entry, facts: Facts) -> str:
    """Returns why an adapter that was loaded is not any more; empty while it is."""
    if entry.name not in facts.adapters:
        return "the engine lost it; loading it again"
    # As the engine told it at the load: it may write our path in another way.
    root = facts.adapters[entry.name]
    if root != entry.root:
        return f"somebody loaded {root or 'something else'} under its name; loading it again"
    return ""


def _reason_of(error: EngineError, otherwise: Reason) -> Reason:
    """Reads our engine's error types, and vLLM's messages, which have no types of their own."""
    text = str(error).lower()
    if error.kind == "LoRACapacityError":
        return Reason.CAPACITY_FULL
    if error.kind == "RankTooLarge" or "max_lora_rank" in text:
        return Reason.RANK_TOO_LARGE
    if error.kind == "WrongBase" or "size mismatch" in text or "expected target modules" in text:
        return Reason.INCOMPATIBLE_BASE
    return otherwise

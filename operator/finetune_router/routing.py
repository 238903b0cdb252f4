"""Which snapshot is in force: the newest of what the operator pushed, the routes file, and the mirror on disk."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from finetune_operator.api.routes import Snapshot
from finetune_router import storage, upstreams
from finetune_router.fleet import Fleet

logger = logging.getLogger(__name__)

_WATCH_SECONDS = 2.0


class RouteKeeper:
    """Refuses to go back, tells the workers, and keeps the last good snapshot on disk."""

    def __init__(self, *, folder: Path, routes_file: Path | None, workers: Fleet) -> None:
        self._folder = folder
        self._file = routes_file
        self._workers = workers
        self._current: Snapshot | None = None
        self._stored = True
        self._looked_at: tuple[int, int, int] | None = None
        self._lock = asyncio.Lock()

    @property
    def has_routes(self) -> bool:
        return self._current is not None

    @property
    def expects_routes(self) -> bool:
        return self._file is not None

    @property
    def version(self) -> int:
        return -1 if self._current is None else self._current.version

    async def load(self) -> None:
        """Start with what is there."""
        known = storage.read_mirror(self._folder)
        if known is not None:
            await self._take(known, write=False)
        await self._look()

    async def offer(self, snapshot: Snapshot) -> bool:
        """Put a snapshot in force; False when a newer one is. The same version once more changes nothing: it only tries
        again what did not succeed the first time.

        Raises ValueError for a snapshot with an upstream that is no URL.
        """
        check_addresses(snapshot)
        async with self._lock:
            if snapshot.version < self.version:
                return False
            if snapshot.version > self.version:
                await self._take(snapshot, write=True)
            elif self._current is not None:
                if self._workers.version() < snapshot.version:
                    await self._workers.apply(self._current)
                if not self._stored:
                    await asyncio.to_thread(self._store, self._current)
            return True

    async def watch(self) -> None:
        """Look at the routes file for ever; a mounted ConfigMap changes up to a minute after the push."""
        while True:
            await asyncio.sleep(_WATCH_SECONDS)
            await self._look()

    async def _look(self) -> None:
        if self._file is None:
            return
        found = await asyncio.to_thread(storage.identity, self._file)
        if found == self._looked_at:  # what is wrong with it was said
            return
        self._looked_at = found
        snapshot = await asyncio.to_thread(storage.read_snapshot, self._file)
        if snapshot is not None and snapshot.version > self.version:
            try:
                await self.offer(snapshot)
            except ValueError as error:
                logger.error("%s is passed over: %s", self._file, error)

    async def _take(self, snapshot: Snapshot, *, write: bool) -> None:
        """Apply and store at once: neither has to wait for the other, and a full disk must not stop a rollback."""
        self._current = snapshot
        storing = asyncio.to_thread(self._store, snapshot) if write else asyncio.sleep(0)
        applied, _ = await asyncio.gather(self._workers.apply(snapshot), storing)
        logger.info(
            "snapshot %d, %d routes; workers apply %d", snapshot.version, len(snapshot.routes), applied
        )

    def _store(self, snapshot: Snapshot) -> None:
        try:
            storage.write_mirror(self._folder, snapshot)
            self._stored = True
        except OSError as error:
            self._stored = False
            logger.error("snapshot %d is in force but not on disk: %s", snapshot.version, error)


def check_addresses(snapshot: Snapshot) -> None:
    """Raises ValueError that names the route whose upstream is no URL."""
    for route in snapshot.routes:
        for target in (route.stable, route.candidate):
            for url in target.upstreams if target is not None else ():
                try:
                    upstreams.parse_address(url)
                except ValueError as error:
                    raise ValueError(f"route {route.alias}: {error}") from None
    for base in snapshot.base_models:
        for url in base.upstreams:
            try:
                upstreams.parse_address(url)
            except ValueError as error:
                raise ValueError(f"base model {base.name}: {error}") from None

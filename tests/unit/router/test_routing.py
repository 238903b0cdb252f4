"""The routes file, which is looked at every other second, and the mirror on disk."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import cast

import pytest

from finetune_operator.api.routes import Snapshot
from finetune_router import routing, storage
from finetune_router.fleet import Fleet
from finetune_router.routing import RouteKeeper
from tests.waiting import until


class Workers:
    """They apply whatever they are given."""

    def version(self) -> int:
        return 0

    async def apply(self, snapshot: Snapshot) -> int:
        return snapshot.version


async def test_a_file_of_no_use_is_told_of_once_and_a_better_one_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    def identity(file: Path) -> tuple[int, int, int] | None:
        nonlocal looks
        looks += 1
        return look(file)

    look = storage.identity
    monkeypatch.setattr(storage, "identity", identity)
    monkeypatch.setattr(routing, "_WATCH_SECONDS", 0.01)
    file = tmp_path / "given.json"
    file.write_text("{ broken")
    keeper = RouteKeeper(folder=tmp_path, routes_file=file, workers=cast("Fleet", Workers()))
    await keeper.load()
    watching = asyncio.create_task(keeper.watch())
    await until(lambda: looks > 5)
    assert sum("passed over" in record.message for record in caplog.records) == 1
    file.write_text(Snapshot(version=7).model_dump_json(by_alias=True))
    await until(lambda: keeper.version == 7)
    watching.cancel()


async def test_a_snapshot_that_found_the_disk_full_is_stored_when_it_comes_again(tmp_path: Path) -> None:
    folder = tmp_path / "state"  # not there yet: nothing can be written into it
    keeper = RouteKeeper(folder=folder, routes_file=None, workers=cast("Fleet", Workers()))
    assert await keeper.offer(Snapshot(version=7))
    folder.mkdir()
    assert await keeper.offer(Snapshot(version=7))
    stored = storage.read_mirror(folder)
    assert stored is not None
    assert stored.version == 7
    (folder / "routes.json").unlink()
    assert await keeper.offer(Snapshot(version=7))
    assert storage.read_mirror(folder) is None, "what is stored is not written again"

"""What must be right before the engine hears of an adapter: its files, its rank, and the base model that it is for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from finetune_server import bases, downloads, threads
from finetune_server.wanted import Entry, Reason

T = TypeVar("T")


class Refused(Exception):  # noqa: N818  a decision, not a defect
    """A load that ended; reason and message go to the status."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason = reason


async def fetch(entry: Entry, *, cache: Path, seconds: float) -> downloads.Artifact:
    """Returns the verified copy of a wanted adapter. Raises Refused."""
    try:
        return await _read(
            entry.uri, lambda: downloads.fetch(entry.uri, entry.digest, cache), seconds=seconds
        )
    except downloads.DownloadFailed as error:
        raise Refused(Reason.DOWNLOAD_FAILED, str(error)) from error
    except downloads.DigestMismatch as error:
        raise Refused(Reason.DIGEST_MISMATCH, str(error)) from error
    except downloads.NotServable as error:
        raise Refused(Reason.LOAD_FAILED, str(error)) from error


def check_rank(artifact: downloads.Artifact, *, limit: int) -> None:
    """Raises Refused; a limit of 0 is none."""
    rank = artifact.manifest.get("rank")
    if limit and isinstance(rank, int) and rank > limit:
        raise Refused(
            Reason.RANK_TOO_LARGE,
            f"the adapter has rank {rank}, the engine takes {limit}; raise --max-lora-rank or train smaller",
        )


async def check_base(artifact: downloads.Artifact, root: str | None, *, seconds: float) -> str:
    """Compares with the engine's base model at `root`. Returns what could not be checked; empty when all could.
    Raises Refused."""
    what = f"{root} or the adapter's own base model"
    verdict = await _read(what, lambda: bases.compare(artifact.manifest, root), seconds=seconds)
    if verdict.match is bases.Match.DIFFERENT:
        raise Refused(Reason.INCOMPATIBLE_BASE, verdict.message)
    return verdict.message if verdict.match is bases.Match.UNKNOWN else ""


async def _read(what: str, call: Callable[[], T], *, seconds: float) -> T:
    """Returns what `call` returns, which reads storage. Raises Refused when that takes too long."""
    try:
        async with asyncio.timeout(seconds):
            return await threads.apart(call)
    except TimeoutError:
        raise Refused(Reason.DOWNLOAD_FAILED, f"{what} was not read within {seconds:g} s") from None

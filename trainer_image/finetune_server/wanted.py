"""The adapters that an agent is to keep loaded: what is known of each, and the file that outlives the process."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

LOG = logging.getLogger("finetune_server.agent")


class State(StrEnum):
    LOADING = "Loading"
    LOADED = "Loaded"
    FAILED = "Failed"


class Reason(StrEnum):
    """Why an adapter could not be loaded."""

    DOWNLOAD_FAILED = "DownloadFailed"
    DIGEST_MISMATCH = "DigestMismatch"
    INCOMPATIBLE_BASE = "IncompatibleBase"
    RANK_TOO_LARGE = "RankTooLarge"
    CAPACITY_FULL = "CapacityFull"
    LOAD_FAILED = "LoadFailed"
    PROBE_FAILED = "ProbeFailed"  # the engine said that it is loaded, but it does not answer


@dataclass
class Entry:
    """A wanted adapter."""

    name: str
    uri: str
    digest: str
    state: State = State.LOADING
    reason: Reason | None = None
    message: str = ""
    since: float = 0.0  # the event loop's time at which it was found loaded
    root: str = ""  # where the engine said then that it was loaded from

    def document(self) -> dict[str, Any]:
        found = {"name": self.name, "digest": self.digest, "uri": self.uri, "state": self.state}
        return {**found, "reason": self.reason or "", "message": self.message}


def read(file: Path | None) -> tuple[dict[str, Entry], set[str]]:
    """Returns the remembered adapters by name, all still to be loaded, and the names that were still to be unloaded;
    none without a file or with a broken one."""
    if file is None or not file.is_file():
        return {}, set()
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        found = {row["name"]: Entry(row["name"], row["uri"], row["digest"]) for row in document["adapters"]}
        return found, set(document.get("leaving", []))
    except (OSError, ValueError, KeyError, TypeError) as error:
        LOG.warning("%s cannot be read (%s); beginning without it", file, error)
        return {}, set()


def write(file: Path | None, entries: dict[str, Entry], leaving: set[str]) -> None:
    """Writes the file so that a reader sees the old or the new one; does nothing without a file."""
    if file is None:
        return
    rows = [{"name": entry.name, "uri": entry.uri, "digest": entry.digest} for entry in entries.values()]
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part")
    part.write_text(json.dumps({"adapters": rows, "leaving": sorted(leaving)}), encoding="utf-8")
    part.replace(file)

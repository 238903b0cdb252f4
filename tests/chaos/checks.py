"""What must hold of every job when all is over."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from tests.clients import Json

# Written down anew: what the operator is measured by is not its own table.
BUDGETS: dict[str, tuple[str, tuple[str, ...]]] = {
    "user": ("maxUserRetries", ("BadConfig", "BadData", "ModelNotFound", "NotFinite")),
    "infrastructure": (
        "maxInfraRetries",
        ("Storage", "Collective", "CheckpointCorrupt", "Lost", "Stalled", "Internal"),
    ),
    "preemption": ("preemptions", ("Preempted",)),
}
OUT_OF_MEMORY = ("GpuOutOfMemory", "HostOutOfMemory")


def ended_well(job: Json, *, excused: bool) -> bool:
    """Whether the job ended as it may: with an artifact, by a person's word, or with nothing left to try."""
    status = job["status"]
    cancelled = excused and status["phase"] == "Cancelled"
    # More than once in one job: there is nothing left to give.
    too_small = status["reason"] in OUT_OF_MEMORY and "already" in status["message"]
    return status["phase"] == "Succeeded" or cancelled or too_small or _spent(job)


def _spent(job: Json) -> bool:
    """Whether it failed because the budget for its last attempt's class was used up."""
    status, retry = job["status"], job["spec"]["retry"]
    return status["phase"] == "Failed" and any(
        status["reason"] in classes
        and retry[field] != "Unlimited"
        and status.get("retries", {}).get(name, 0) == int(retry[field])
        for name, (field, classes) in BUDGETS.items()
    )


def wrong_budgets(job: Json) -> list[str]:
    """Whether each attempt that failed was charged once, and nothing else was."""
    status, attempts = job["status"], job["status"].get("attempts", [])
    if not attempts or attempts[0]["number"] > 1:  # the history is cut off
        return []
    wrong = []
    for name, (_, classes) in BUDGETS.items():
        used = status.get("retries", {}).get(name, 0)
        failed = sum(attempt["class"] in classes for attempt in attempts)
        if status["phase"] == "Failed" and status["reason"] in classes:
            failed -= 1  # the last one is followed by none
        # What was charged may turn out well, or be cancelled; what is held back goes on as the same attempt.
        most = float("inf") if name == "preemption" else failed + 1
        if not failed <= used <= most:
            wrong.append(f"{failed} attempts failed, {name} retries: {used}")
    return wrong


def wrong_artifact(status: Json, volume: Path = Path("/")) -> list[str]:
    """The files of an artifact beside its manifest, and the manifest beside the digest that the status tells. `volume`:
    where the claim of a pvc:// URI lies."""
    artifact = status["artifact"]
    folder = volume / re.sub("^(file:///|pvc://[^/]+/)", "", artifact["uri"])
    content = (folder / "manifest.json").read_bytes()
    files: list[dict[str, Any]] = json.loads(content)["files"]
    wrong = [] if artifact["digest"] == _digest(content) else ["manifest.json is not what the status says"]
    for file in files:
        found = _digest((folder / file["path"]).read_bytes())
        if found.removeprefix("sha256:") != file["sha256"]:
            wrong.append(f"{file['path']} is not what manifest.json says")
    return wrong if files else ["an artifact without files"]


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"

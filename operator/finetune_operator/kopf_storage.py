"""Kopf's places for what was seen and handled last: none, as this operator has handlers for events only.

Kopf copies every object of every event three times to find out what changed since, which was more than half of the
operator's CPU time, and nothing here asks for it.
"""

from __future__ import annotations

from typing import Any

import kopf
from kopf._core.reactor.inventory import ResourceMemories, ResourceMemory


class NoMemories(ResourceMemories):
    """Nothing is remembered of an object from one event to the next; Kopf keeps about a kilobyte of each, of finished
    ones too."""

    async def recall(self, *arguments: Any, **options: Any) -> ResourceMemory:
        return await super().recall(*arguments, **{**options, "ephemeral": True})


class NoDiffBase(kopf.DiffBaseStorage):
    """Nothing of an object counts as changed."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        return kopf.BodyEssence()

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        """Nothing is kept."""


class NoProgress(kopf.ProgressStorage):
    """No handler is ever half done."""

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> None:
        """Nothing is kept."""

    def purge(self, **_: Any) -> None:
        """Nothing was kept."""

    def touch(self, **_: Any) -> None:
        """Objects are never written to by Kopf."""

    def clear(self, *, essence: kopf.BodyEssence) -> kopf.BodyEssence:
        return essence

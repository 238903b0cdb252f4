"""Kopf keeps nothing of an object, neither in it nor in memory: events are all that it is used for."""

from __future__ import annotations

from typing import Any

import kopf

from finetune_operator.handlers import configure_kopf
from finetune_operator.kopf_storage import NoMemories


def test_nothing_of_an_object_is_copied_compared_or_written() -> None:
    settings = kopf.OperatorSettings()
    configure_kopf(settings)
    changes, progress = settings.persistence.diffbase_storage, settings.persistence.progress_storage
    body, patch = kopf.Body({"metadata": {"name": "triage"}, "spec": {"a": [1, 2]}}), kopf.Patch()
    essence = changes.build(body=body)
    assert not essence
    assert changes.fetch(body=body) is None
    changes.store(body=body, patch=patch, essence=essence)
    assert (
        progress.clear(essence=essence) is essence
    )  # the default copies it, once for each place that it knows
    progress.touch(body=body, patch=patch, value="now")
    assert not patch


async def test_nothing_is_remembered_of_an_object_once_its_event_is_handled() -> None:
    memories = NoMemories()
    body: Any = {"metadata": {"uid": "a"}}
    first = await memories.recall(body, noticed_by_listing=True)
    assert await memories.recall(body) is not first
    assert list(memories.iter_all_memories()) == []
    await memories.forget(body)

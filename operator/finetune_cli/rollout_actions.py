"""Asking the operator to promote, abort, ...: by the annotation finetune.dev/action, never by the spec.

The value is `verb/nonce`, so that the same verb twice is two wishes. The operator answers in status.lastAction and
takes the annotation away; until then nobody's wish is overwritten, except by an abort.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from finetune_cli import watches
from finetune_cli.kinds import DEPLOYMENT
from finetune_cli.texts import status_of
from finetune_operator.api.base import ACTION_ANNOTATION, GROUP, VERSION

Object = dict[str, Any]


class Verb(StrEnum):
    PROMOTE = "promote"  # end the step under way, or approve it
    PROMOTE_FULL = "promote-full"  # skip all steps
    ABORT = "abort"
    PAUSE = "pause"
    RESUME = "resume"
    RETRY = "retry"  # the rolled back revision, from its first step
    ROLLBACK = "rollback"  # to the revision that served before


@dataclass
class Wish:
    """What is asked of the operator; `asked` once it is written, which may take until an earlier wish is answered."""

    verb: Verb
    asked: bool = False


def perform(
    api: Any,
    namespace: str,
    name: str,
    wish: Wish,
    *,
    deadline: float,
    on_trouble: Callable[[str | None], None],
) -> Object:
    """Ask, and wait until the operator has answered; the object with its answer in status.lastAction.

    `deadline` is in time.monotonic() seconds. Raises what watches.follow raises, WatchTimeoutError among it.
    """
    value = f"{wish.verb}/{secrets.token_hex(4)}"
    for one in watches.follow(api, DEPLOYMENT, namespace, name, deadline=deadline, on_trouble=on_trouble):
        if (status_of(one).get("lastAction") or {}).get("value") == value:
            return one
        # It may be written although the API server did not live to say so.
        written = wish.asked or _waiting(one) == value
        wish.asked = written or (_is_free(one, wish.verb) and _ask(api, one, value))
    raise AssertionError("follow() ends only by an exception")


def _is_free(one: Object, verb: Verb) -> bool:
    """Whether no other wish waits to be obeyed. An abort waits for nobody."""
    waiting = _waiting(one)
    return waiting is None or (verb is Verb.ABORT and not waiting.startswith(Verb.ABORT))


def _waiting(one: Object) -> str | None:
    value: str | None = (one["metadata"].get("annotations") or {}).get(ACTION_ANNOTATION)
    return value


def _ask(api: Any, one: Object, value: str) -> bool:
    """Set the annotation; False when the object has changed meanwhile, whose newest state then comes by the watch."""
    from kubernetes import client

    meta = one["metadata"]
    patch = {
        "metadata": {"resourceVersion": meta["resourceVersion"], "annotations": {ACTION_ANNOTATION: value}}
    }
    try:
        client.CustomObjectsApi(api).patch_namespaced_custom_object(
            GROUP, VERSION, meta["namespace"], DEPLOYMENT.plural, meta["name"], patch,
            _request_timeout=watches.REQUEST_TIMEOUT,
        )  # fmt: skip
    except client.ApiException as error:
        if error.status != 409:
            raise
        return False
    return True

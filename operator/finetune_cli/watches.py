"""Following one object through everything that happens to the connection."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

from finetune_cli.kinds import Kind
from finetune_operator.api.base import GROUP, VERSION

Object = dict[str, Any]

WATCH_SECONDS = 20  # so that a connection that died without a word is noticed
CONNECT_SECONDS = 5
REQUEST_TIMEOUT = (CONNECT_SECONDS, WATCH_SECONDS)  # of each request: the client itself would wait for ever
# Seconds between attempts to get the connection back; the last one repeats.
PAUSES = (0.3, 0.5, 1.0, 2.0, 3.0)
# An API server that has just started may answer 401 or 403 until it has read its rules.
REFUSAL_SECONDS = 60.0


class NotFoundError(Exception):
    """There is no such object, or no longer, or this cluster does not know its kind."""


class WatchTimeoutError(Exception):
    """The time that the user allowed is over."""


def get_object(api: Any, kind: Kind, namespace: str, name: str) -> Object:
    """The object as it is now. Raises NotFoundError, ApiException, urllib3's errors."""
    from kubernetes import client

    # An empty variable, or ftj/triage as kubectl takes it, would be another path.
    if name in ("", ".", "..") or "/" in name:
        raise NotFoundError(f"{name!r} is no name of a {kind.name}; see: {kind.listing}")
    try:
        found: Object = client.CustomObjectsApi(api).get_namespaced_custom_object(
            GROUP,
            VERSION,
            namespace,
            kind.plural,
            name,
            _request_timeout=REQUEST_TIMEOUT,
        )
    except client.ApiException as error:
        if error.status == 404:
            raise NotFoundError(_missing(error.body, kind, namespace, name)) from error
        raise
    return found


def follow(
    api: Any,
    kind: Kind,
    namespace: str,
    name: str,
    *,
    deadline: float | None,
    on_trouble: Callable[[str | None], None],
) -> Iterator[Object]:
    """The object now and after each change, for ever. Errors of the connection are told to `on_trouble` and survived.

    `deadline` is in time.monotonic() seconds. `on_trouble(None)` says that the connection is back.
    Raises NotFoundError (also when the object is deleted), WatchTimeoutError, and at the first request what
    get_object raises: a cluster that never answered is a mistake of the caller.
    """
    from kubernetes import client
    from urllib3.exceptions import HTTPError

    one = get_object(api, kind, namespace, name)
    uid, trouble, refused_since = one["metadata"]["uid"], 0, 0.0
    yield one
    while True:
        _check(deadline)
        try:
            if trouble:
                one = get_object(api, kind, namespace, name)
                if one["metadata"]["uid"] != uid:
                    raise NotFoundError(
                        f"{name} was deleted, and another {kind.noun} of that name was created"
                    )
                on_trouble(None)
                trouble = 0
                yield one
            version = one["metadata"]["resourceVersion"]
            for change in _changes(api, kind, namespace, name, version=version, deadline=deadline):
                one = change
                yield one
        except client.ApiException as error:
            if error.status in (401, 403):
                refused_since = refused_since if trouble else time.monotonic()
                if time.monotonic() - refused_since > REFUSAL_SECONDS:
                    raise
            elif error.status not in (410, 429) and error.status < 500:
                raise
            trouble = _pause(trouble, deadline)
            if error.status != 410:  # that one only says that the watch has to begin anew
                on_trouble(f"the API server answers {error.status}; trying again")
        except (HTTPError, OSError):
            on_trouble(f"the API server does not answer; the {kind.noun} goes on, trying again")
            trouble = _pause(trouble, deadline)


def _changes(
    api: Any, kind: Kind, namespace: str, name: str, *, version: str, deadline: float | None
) -> Iterator[Object]:
    """Changes after `version`, for at most WATCH_SECONDS."""
    from kubernetes import client, watch

    left = WATCH_SECONDS if deadline is None else min(WATCH_SECONDS, deadline - time.monotonic())
    seconds = max(1, math.ceil(left))
    stream = watch.Watch().stream(
        client.CustomObjectsApi(api).list_namespaced_custom_object,
        GROUP,
        VERSION,
        namespace,
        kind.plural,
        field_selector=f"metadata.name={name}",
        resource_version=version,
        timeout_seconds=seconds,
        _request_timeout=(CONNECT_SECONDS, seconds + 10),
    )
    for event in stream:
        if event["type"] == "DELETED":
            raise NotFoundError(f"{name} was deleted in namespace {namespace}")
        yield event["raw_object"]
        _check(deadline)


def _pause(trouble: int, deadline: float | None) -> int:
    pause = PAUSES[min(trouble, len(PAUSES) - 1)]
    time.sleep(pause if deadline is None else max(0.0, min(pause, deadline - time.monotonic())))
    return trouble + 1


def _check(deadline: float | None) -> None:
    if deadline is not None and time.monotonic() >= deadline:
        raise WatchTimeoutError


def _missing(body: Any, kind: Kind, namespace: str, name: str) -> str:
    """The object is missing, or the whole kind: the API server answers the latter without details."""
    try:
        details = json.loads(body).get("details") or {}
    except (TypeError, ValueError):
        details = {}
    if details.get("name") != name:
        return f"this cluster has no {kind.name} ({GROUP}/{VERSION}); install the operator's CRDs"
    return f"no {kind.name} {name} in namespace {namespace}; see: {kind.listing}"

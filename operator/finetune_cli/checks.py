"""Having the API server check an object without creating or changing anything."""

from __future__ import annotations

import copy
import json
from typing import Any

from finetune_cli import files, watches
from finetune_cli.connections import Connection
from finetune_cli.kinds import Kind
from finetune_operator.api.base import GROUP, VERSION


def find_problems(
    connection: Connection, kind: Kind, namespace: str | None, body: dict[str, Any]
) -> list[str]:
    """One line for each problem; empty: the object could be applied. Raises ApiException for anything but a refusal.

    `namespace`: where it would be applied, if not where it says or the connection is."""
    if wrong := files.explain_version(body):
        return [wrong]
    where = namespace or (body.get("metadata") or {}).get("namespace") or connection.namespace
    refusal = _dry_run(connection.api, kind, where, body, validation="Strict")
    if refusal is None:
        return []
    problems = files.explain_refusal(refusal, kind)
    if files.is_about_unknown_fields(refusal):
        values = _dry_run(connection.api, kind, where, body, validation="Ignore")
        problems += files.explain_refusal(values, kind) if values else []
    return problems


def _dry_run(
    api: Any, kind: Kind, namespace: str, given: dict[str, Any], *, validation: str
) -> dict[str, Any] | None:
    """The API server's Status if it refuses to create the object, or to update the one that exists; else None."""
    from kubernetes import client

    objects = client.CustomObjectsApi(api)
    body = copy.deepcopy(given)
    meta = body.setdefault("metadata", {}) or {}
    meta["namespace"] = namespace
    place = (GROUP, VERSION, namespace, kind.plural)
    dry = {"dry_run": "All", "field_validation": validation, "_request_timeout": watches.REQUEST_TIMEOUT}
    try:
        try:
            objects.create_namespaced_custom_object(*place, body, **dry)
        except client.ApiException as error:
            if error.status != 409:
                raise
            known = objects.get_namespaced_custom_object(
                *place, meta["name"], _request_timeout=watches.REQUEST_TIMEOUT
            )
            meta["resourceVersion"] = known["metadata"]["resourceVersion"]
            objects.replace_namespaced_custom_object(*place, meta["name"], body, **dry)
    except client.ApiException as error:
        if error.status not in (400, 422):
            raise
        refusal: dict[str, Any] = json.loads(error.body)
        return refusal
    return None

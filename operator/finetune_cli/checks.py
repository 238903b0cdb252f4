"""Having the API server check an object without creating or changing anything."""

from __future__ import annotations

import copy
import json
from typing import Any

from finetune_cli import files, watches
from finetune_cli.kinds import Kind
from finetune_operator.api.base import API_VERSION, GROUP, VERSION


def find_problems(api: Any, kind: Kind, namespace: str, body: dict[str, Any]) -> list[str]:
    """One line for each problem; empty: the object could be applied. Raises ApiException for anything but a refusal."""
    if body.get("apiVersion") != API_VERSION:
        return [f"apiVersion: {body.get('apiVersion')!r} is not known; write {API_VERSION}"]
    refusal = _dry_run(api, kind, namespace, body, validation="Strict")
    if refusal is None:
        return []
    problems = files.explain_refusal(refusal, kind)
    if files.is_about_unknown_fields(refusal):
        values = _dry_run(api, kind, namespace, body, validation="Ignore")
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

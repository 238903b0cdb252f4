"""The route snapshot from its parts, and its durable copy."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from finetune_operator.api.routes import BaseModelRoute, Route, Snapshot
from finetune_operator.manifests import naming

NAME = "finetune-routes"
ROUTES_KEY = "routes.json"
ENGINES_KEY = "engines.json"
MAX_BYTES = 1 << 20
"""Of all values of a ConfigMap together (k8s.io/api/core/v1 MaxSecretSize, which ConfigMaps share)."""


def build_snapshot(
    *, version: int, routes: Iterable[Route], base_models: Mapping[str, Iterable[str]]
) -> Snapshot:
    """All routes in a fixed order, so that equal parts make equal snapshots."""
    return Snapshot(
        version=version,
        routes=tuple(sorted(routes, key=lambda route: route.alias)),
        base_models=tuple(
            BaseModelRoute(name=name, upstreams=tuple(sorted(set(upstreams))))
            for name, upstreams in sorted(base_models.items())
        ),
    )


def to_text(snapshot: Snapshot) -> str:
    """The snapshot as routers read it, without nulls: a thousand aliases stay below MAX_BYTES."""
    return snapshot.model_dump_json(by_alias=True, exclude_none=True)


def build_config_map(
    *, namespace: str, routes: str, engines: Mapping[str, Sequence[str]], resource_version: str | None
) -> dict[str, Any]:
    """The durable copy, which starting routers mount. `engines` are the agents that were asked to load something for
    an alias: where to clean up when it is gone. With a version, the API server refuses the write when somebody else
    wrote meanwhile."""
    version = {"resourceVersion": resource_version} if resource_version else {}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": NAME,
            "namespace": namespace,
            "labels": {naming.LABEL_MANAGED_BY: naming.MANAGER},
            **version,
        },
        "data": {ROUTES_KEY: routes, ENGINES_KEY: json.dumps(engines, sort_keys=True)},
    }


def why_too_large(config_map: Mapping[str, Any], snapshot: Snapshot) -> str | None:
    """What to tell when the durable copy cannot hold the snapshot; None when it can."""
    size = sum(len(value.encode()) for value in config_map["data"].values())
    if size <= MAX_BYTES:
        return None
    largest = max(snapshot.routes, key=_size_of, default=None)
    biggest = f", the largest {_size_of(largest)} for alias {largest.alias}" if largest else ""
    return (
        f"the routes of all {len(snapshot.routes)} aliases take {size} bytes{biggest}, and the ConfigMap {NAME} holds "
        f"{MAX_BYTES}: the routers have them, but one that starts while the operator is away gets older ones; shorten "
        "spec.traffic.outputSchema or match, delete AdapterDeployments, or serve some namespaces "
        "(FINETUNE_NAMESPACES) by another operator with routers of its own"
    )


def _size_of(route: Route) -> int:
    return len(route.model_dump_json(by_alias=True, exclude_none=True).encode())

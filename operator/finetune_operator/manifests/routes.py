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
    """The snapshot as routers read it, without nulls: a thousand aliases stay below the 1 MiB of a ConfigMap."""
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

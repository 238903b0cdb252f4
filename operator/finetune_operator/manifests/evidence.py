"""The ConfigMap that keeps the evidence of a rollout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_operator.api.adapterdeployment import KIND
from finetune_operator.manifests import naming

KEY = "evidence.json"


def name_of(deployment: str) -> str:
    return f"{deployment}-evidence"


def build_config_map(
    *, namespace: str, deployment: str, uid: str, evidence: str, resource_version: str | None
) -> dict[str, Any]:
    """It goes with the deployment. With a version, the API server refuses the write when somebody else wrote
    meanwhile."""
    version = {"resourceVersion": resource_version} if resource_version else {}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": name_of(deployment),
            "namespace": namespace,
            "labels": {naming.LABEL_MANAGED_BY: naming.MANAGER},
            "ownerReferences": [naming.owner_reference(KIND, deployment, uid)],
            **version,
        },
        "data": {KEY: evidence},
    }


def is_owned_by(config_map: Mapping[str, Any], uid: str) -> bool:
    return any(owner.get("uid") == uid for owner in config_map["metadata"].get("ownerReferences", []))

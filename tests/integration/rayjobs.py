"""RayJobs without an operator: what tests of the laptop cluster submit and wait for."""

from __future__ import annotations

from typing import Any

from finetune_local import kubeapi
from tests.waiting import wait_until

RAY_JOBS = "/apis/ray.io/v1/namespaces/default/rayjobs"


def rayjob(name: str, entrypoint: str, **pod: Any) -> dict[str, Any]:
    container = {
        "name": "ray-head",
        "image": "none",
        "resources": {"limits": {"cpu": "500m", "memory": "512Mi"}},
        **pod.pop("container", {}),
    }
    spec = {
        "automountServiceAccountToken": False,
        "terminationGracePeriodSeconds": 5,
        "containers": [container],
        **pod,
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {
            "submissionMode": "HTTPMode",
            "entrypoint": entrypoint,
            "shutdownAfterJobFinishes": True,
            "backoffLimit": 0,
            "rayClusterSpec": {
                "rayVersion": "2.60.0",
                "headGroupSpec": {"rayStartParams": {}, "template": {"spec": spec}},
            },
        },
    }


def submit(client: kubeapi.ApiClient, job: dict[str, Any]) -> None:
    client.call("POST", RAY_JOBS, job)


def status_of(client: kubeapi.ApiClient, name: str) -> dict[str, Any]:
    found = client.get(f"{RAY_JOBS}/{name}") or {}
    status: dict[str, Any] = found.get("status", {})
    return status


def wait_for_end(client: kubeapi.ApiClient, name: str) -> dict[str, Any]:
    def ended() -> dict[str, Any] | None:
        status = status_of(client, name)
        return status if status.get("jobDeploymentStatus") in ("Complete", "Failed") else None

    return wait_until(ended, seconds=90, what=f"the end of RayJob {name}")

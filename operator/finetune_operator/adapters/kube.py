"""The requests that the operator makes of the Kubernetes API, and all that it makes besides Kopf's watches.

Bodies and answers are dicts. Every failure is one of `api_errors`.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_operator.adapters.api_client import ApiClient
from finetune_operator.adapters.api_errors import InvalidError
from finetune_operator.api import adapterdeployment, finetunejob
from finetune_operator.api.base import API_VERSION

Json = dict[str, Any]

FIELD_MANAGER = "finetune-operator"
KUEUE_VERSION = "kueue.x-k8s.io/v1beta2"  # served since Kueue 0.15
KUEUE_VISIBILITY = "visibility.kueue.x-k8s.io/v1beta2"
PLURALS = {
    ("v1", "ConfigMap"): "configmaps",
    ("v1", "Event"): "events",
    ("v1", "Pod"): "pods",
    ("coordination.k8s.io/v1", "Lease"): "leases",
    ("ray.io/v1", "RayCluster"): "rayclusters",
    ("ray.io/v1", "RayJob"): "rayjobs",
    (KUEUE_VERSION, "Workload"): "workloads",
    (API_VERSION, finetunejob.KIND): finetunejob.PLURAL,
    (API_VERSION, adapterdeployment.KIND): adapterdeployment.PLURAL,
}
PAGE = 500  # objects per answer of a list
METADATA_ONLY = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"


@dataclass(frozen=True)
class TokenOwner:
    """Whose a verified token is."""

    username: str


class Kube(ApiClient):
    """A client with the few requests that the operator makes."""

    async def get(self, api_version: str, kind: str, namespace: str, name: str) -> Json | None:
        """The object, or None where there is none (or no such kind)."""
        return await self._request("GET", _path(api_version, kind, namespace, name), missing_ok=True)

    async def find(
        self, api_version: str, kind: str, namespace: str, *, labels: Mapping[str, str]
    ) -> list[Json]:
        selector = ",".join(f"{key}={value}" for key, value in labels.items())
        answer = await self._request(
            "GET", _path(api_version, kind, namespace), query=[("labelSelector", selector)], missing_ok=True
        )
        return _items(answer)

    async def events_about(self, namespace: str, *, uid: str) -> list[Json]:
        """The core/v1 Events about one object, in any order."""
        query = [("fieldSelector", f"involvedObject.uid={uid}")]
        return _items(await self._request("GET", _path("v1", "Event", namespace), query=query))

    async def events_named(self, namespace: str, *, kind: str, name: str) -> list[Json]:
        """The same by the kind and name of an object that we may not read."""
        query = [("fieldSelector", f"involvedObject.kind={kind},involvedObject.name={name}")]
        return _items(await self._request("GET", _path("v1", "Event", namespace), query=query))

    async def pending_workloads(self, namespace: str, queue: str) -> list[Json]:
        """The Workloads that wait in a LocalQueue of Kueue, the next one first (at most 1000). Empty where Kueue does
        not serve that list."""
        path = f"/apis/{KUEUE_VISIBILITY}/namespaces/{namespace}/localqueues/{queue}/pendingworkloads"
        return _items(await self._request("GET", path, missing_ok=True))

    async def list_all(self, api_version: str, kind: str, namespaces: Sequence[str]) -> list[Json]:
        """All objects of a kind in these namespaces; of the whole cluster where none is named."""
        return [body async for body in self._pages(api_version, kind, namespaces)]

    async def list_names(
        self, api_version: str, kind: str, namespaces: Sequence[str]
    ) -> set[tuple[str, str]]:
        """Namespace and name of each, for which the server sends no more than the metadata."""
        bodies = self._pages(api_version, kind, namespaces, accept=METADATA_ONLY)
        return {(body["metadata"]["namespace"], body["metadata"]["name"]) async for body in bodies}

    async def _pages(
        self, api_version: str, kind: str, namespaces: Sequence[str], *, accept: str = "application/json"
    ) -> AsyncIterator[Json]:
        for namespace in namespaces or (None,):
            path, more = _path(api_version, kind, namespace), ""
            while True:
                query = [("limit", str(PAGE)), *([("continue", more)] if more else [])]
                answer = await self._request("GET", path, query=query, accept=accept, missing_ok=True) or {}
                for body in _items(answer):
                    yield body
                more = answer.get("metadata", {}).get("continue", "")
                if not more:
                    break

    async def apply(self, body: Json) -> Json:
        """Server-side apply under our field manager; safe to repeat. A metadata.resourceVersion in the body is a
        condition: ConflictError if the object is not at that version any more."""
        metadata = body["metadata"]
        answer = await self._request(
            "PATCH",
            _path(body["apiVersion"], body["kind"], metadata["namespace"], metadata["name"]),
            body=body,
            content_type="application/apply-patch+yaml",
            query=[("fieldManager", FIELD_MANAGER), ("force", "true")],
        )
        return answer or {}

    async def create(self, body: Json) -> Json:
        path = _path(body["apiVersion"], body["kind"], body["metadata"]["namespace"])
        return await self._request("POST", path, body=body) or {}

    async def replace(self, body: Json) -> Json:
        """PUT the whole object. Raises ConflictError if it is not at the body's metadata.resourceVersion any more."""
        metadata = body["metadata"]
        path = _path(body["apiVersion"], body["kind"], metadata["namespace"], metadata["name"])
        return await self._request("PUT", path, body=body) or {}

    async def delete(self, api_version: str, kind: str, namespace: str, name: str, *, uid: str) -> None:
        """Delete the object if it still is the one with this UID; what it owns follows in the background. Safe to
        repeat. Raises ConflictError where another object has the name by now."""
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "preconditions": {"uid": uid},
            "propagationPolicy": "Background",
        }
        await self._request("DELETE", _path(api_version, kind, namespace, name), body=body, missing_ok=True)

    async def patch_status(
        self, kind: str, namespace: str, name: str, *, resource_version: str, patch: Json
    ) -> Json:
        """Merge the patch into the status of one of our objects. Raises ConflictError if it is not at that version any
        more."""
        body = {"metadata": {"resourceVersion": resource_version}, "status": patch}
        answer = await self._request(
            "PATCH",
            _path(API_VERSION, kind, namespace, name) + "/status",
            body=body,
            content_type="application/merge-patch+json",
            query=[("fieldManager", FIELD_MANAGER)],
        )
        return answer or {}

    async def remove_annotation(
        self, kind: str, namespace: str, name: str, *, annotation: str, value: str
    ) -> None:
        """Remove an annotation of one of our objects if it still has this value (JSON patch, RFC 6902)."""
        pointer = "/metadata/annotations/" + annotation.replace("~", "~0").replace("/", "~1")
        patch = [{"op": "test", "path": pointer, "value": value}, {"op": "remove", "path": pointer}]
        with contextlib.suppress(InvalidError):  # it has another value by now, or is gone
            await self._request(
                "PATCH",
                _path(API_VERSION, kind, namespace, name),
                body=patch,
                content_type="application/json-patch+json",
                query=[("fieldManager", FIELD_MANAGER)],
                missing_ok=True,
            )

    async def has_group_version(self, group_version: str) -> bool:
        """Whether the cluster serves a group and version, for example ray.io/v1."""
        return await self._request("GET", f"/apis/{group_version}", missing_ok=True) is not None

    async def review_token(self, token: str, *, audience: str) -> TokenOwner | None:
        """Whose token it is, or None where it is not valid for the audience (TokenReview)."""
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [audience]},
        }
        answer = await self._request("POST", "/apis/authentication.k8s.io/v1/tokenreviews", body=body) or {}
        status = answer.get("status", {})
        if not status.get("authenticated") or audience not in status.get("audiences", []):
            return None
        return TokenOwner(username=status["user"]["username"])


def _path(api_version: str, kind: str, namespace: str | None, name: str | None = None) -> str:
    root = f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"
    within = f"/namespaces/{namespace}" if namespace else ""
    path = f"{root}{within}/{PLURALS[api_version, kind]}"
    return f"{path}/{name}" if name else path


def _items(answer: Json | None) -> list[Json]:
    """An empty list of metadata only comes with `"items": null`."""
    return (answer or {}).get("items") or []

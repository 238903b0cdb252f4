"""The Kubernetes API as dicts: the only module of the operator that talks to it (besides Kopf's watches).

Typed models of the client validate what the server answers and break on objects that are newer than they are, so
everything here is the parsed JSON. Every failure is one of five exceptions; each is an ordinary event for callers.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Self

import aiohttp
import pydantic_core
from kubernetes import aio

from finetune_operator.adapters import kubeconfig
from finetune_operator.adapters.kubeconfig import KubeconfigError
from finetune_operator.api import adapterdeployment, finetunejob
from finetune_operator.api.base import API_VERSION

Json = dict[str, Any]

FIELD_MANAGER = "finetune-operator"
REQUEST_SECONDS = 30
CONNECTIONS = 128  # at once, of about 100 kB each; further requests wait for their turn
BUSY_TRIES = 4  # of a request that the server was too busy to begin with (429)
BUSY_SECONDS = 5.0  # the longest that one is held back, whatever Retry-After says
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


class ApiError(Exception):
    """A request failed; `str()` is the server's own message."""


class ConflictError(ApiError):
    """The object changed or exists already (409): read it again."""


class InvalidError(ApiError):
    """The server refuses the object (400, 422): sending it again cannot help."""


class ForbiddenError(ApiError):
    """RBAC or a quota forbids it (401, 403)."""


class UnavailableError(ApiError):
    """The server is away or busy (429, 5xx, no connection, timeout): try again later."""


class FencedError(UnavailableError):
    """Another operator may lead by now: the request was not sent."""


@dataclass(frozen=True)
class TokenOwner:
    """Whose a verified token is."""

    username: str


def _always() -> bool:
    return True


_fence: ContextVar[Callable[[], bool]] = ContextVar("fence", default=_always)
"""Whether the request that this task is about to send may still be sent."""


class Kube:
    """A client with the few requests that the operator makes. Each write first asks `may_write`, the last moment at
    which a process that was stopped for a while can learn that it leads no more."""

    def __init__(
        self,
        client: aio.client.ApiClient,
        *,
        may_write: Callable[[], bool] = _always,
        on_answer: Callable[[str, int], None] = lambda method, status: None,
    ) -> None:
        self._client = client
        self._may_write = may_write
        self._on_answer = on_answer

    @classmethod
    async def connect(
        cls,
        *,
        may_write: Callable[[], bool] = _always,
        on_answer: Callable[[str, int], None] = lambda method, status: None,
    ) -> Self:
        """A client by the pod's service account or the kubeconfig, without a request yet. `on_answer` is told the
        method and the HTTP status of each request, 0 where there was no answer. Raises KubeconfigError."""
        configuration = await kubeconfig.find(connections=CONNECTIONS)
        configuration.client_session_kwargs = {"trust_env": False, "trace_configs": [_trace()]}
        try:
            client = aio.client.ApiClient(configuration)
        except OSError as error:  # of TLS
            raise KubeconfigError(
                f"the certificates for {configuration.host} cannot be used: {error}"
            ) from error
        return cls(client, may_write=may_write, on_answer=on_answer)

    @property
    def server(self) -> str:
        """URL of the API server."""
        return str(self._client.configuration.host)

    async def close(self) -> None:
        await self._client.close()

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

    async def _request(
        self,
        method: str,
        path: str,
        *,
        body: Json | list[Json] | None = None,
        content_type: str = "application/json",
        query: list[tuple[str, str]] | None = None,
        accept: str = "application/json",
        missing_ok: bool = False,
    ) -> Json | None:
        """Send it, and again where the server was too busy to begin with it, as every client of Kubernetes does."""
        for number in range(1, BUSY_TRIES + 1):
            status, data, retry_after = await self._send(
                method, path, body=body, content_type=content_type, query=query, accept=accept
            )
            if status != 429 or number == BUSY_TRIES:
                break
            pause = min(BUSY_SECONDS, retry_after * number)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - spreads load
        if status == 404 and missing_ok:
            return None
        if not 200 <= status <= 299:
            raise _error(status, data, f"{method} {path}")
        parsed: Json = pydantic_core.from_json(data)
        return parsed

    async def _send(
        self,
        method: str,
        path: str,
        *,
        body: Json | list[Json] | None,
        content_type: str,
        query: list[tuple[str, str]] | None,
        accept: str,
    ) -> tuple[int, bytes, float]:
        """Status, body and Retry-After in seconds. Raises UnavailableError where there is no answer."""
        may_send = _always if method == "GET" else self._may_write
        if not may_send():
            raise FencedError(f"{method} {path}: not sent, as this process leads no more")
        token = _fence.set(may_send)
        try:
            method, url, headers, *_ = await self._client.param_serialize(
                method,
                path,
                query_params=query,
                header_params={"Accept": accept, "Content-Type": content_type},
                auth_settings=["BearerToken"],
            )
            # The body goes by as it is: it is plain JSON, of which the client would make a copy for its typed models.
            answer = await self._client.call_api(method, url, headers, body, _request_timeout=REQUEST_SECONDS)
            data = await answer.read()
        except (TimeoutError, aiohttp.ClientError, OSError) as error:
            self._on_answer(method, 0)
            raise UnavailableError(f"{method} {path}: {type(error).__name__} {error}") from error
        finally:
            _fence.reset(token)
        self._on_answer(method, answer.status)
        return answer.status, data, _seconds(answer.headers.get("Retry-After"))


def _trace() -> aiohttp.TraceConfig:
    """Asks the fence once more when a request has got its connection, for which it may have waited."""

    async def look(*_: object) -> None:
        if not _fence.get()():
            raise FencedError("a request was not sent, as this process leads no more")

    trace = aiohttp.TraceConfig()
    trace.on_connection_create_end.append(look)
    trace.on_connection_reuseconn.append(look)
    return trace


def _seconds(retry_after: str | None) -> float:
    return float(retry_after) if retry_after is not None and retry_after.isdecimal() else 1.0


def _path(api_version: str, kind: str, namespace: str | None, name: str | None = None) -> str:
    root = f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"
    within = f"/namespaces/{namespace}" if namespace else ""
    path = f"{root}{within}/{PLURALS[api_version, kind]}"
    return f"{path}/{name}" if name else path


def _items(answer: Json | None) -> list[Json]:
    """An empty list of metadata only comes with `"items": null`."""
    return (answer or {}).get("items") or []


def _error(status: int, data: bytes, request: str) -> ApiError:
    try:
        message = str(json.loads(data)["message"])
    except (ValueError, KeyError, TypeError):
        message = f"HTTP {status}"
    text = f"{request}: {message}"
    match status:
        case 409:
            return ConflictError(text)
        case 400 | 422:
            return InvalidError(text)
        case 401 | 403:
            return ForbiddenError(text)
        case 429 | 500 | 502 | 503 | 504:
            return UnavailableError(text)
        case _:
            return ApiError(text)

"""An API server's storage in memory, for faults that a real one cannot be made to show at a given request.

It does what the operator relies on: names are unique, a write is conditional on the resourceVersion or the UID, a
merge patch merges. Everything above the HTTP request is the operator's own code.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from prometheus_client import CollectorRegistry

from finetune_operator.adapters import kube
from finetune_operator.adapters.api_errors import ApiError, ConflictError
from finetune_operator.adapters.kube import Json
from finetune_operator.adapters.telemetry import Telemetry
from finetune_operator.adapters.watched import WatchedKube
from finetune_operator.core.facts import Defaults
from finetune_operator.manifests.naming import MANAGER
from finetune_operator.manifests.rayjobs import Platform
from finetune_operator.reconcile.clocks import SteadyClock
from finetune_operator.reconcile.finetunejob import FineTuneJobReconciler
from finetune_operator.reconcile.mailbox import Mailbox
from tests.unit.operator.stories import DEFAULTS, SPEC, START

PLURALS = {plural: (version, kind) for (version, kind), plural in kube.PLURALS.items()}
PATH = re.compile(
    r"^/apis?/(?P<version>.+?)/namespaces/(?P<ns>[^/]+)/(?P<plural>[^/]+)(/(?P<name>[^/]+))?(/status)?$"
)
KEY = ("team", "triage")

Fault = Callable[[str, str], Exception | None]
"""By method and path: what the request fails with; None: it goes through."""


class MemoryApi(WatchedKube):
    """`before` fails a request that then has no effect; `after` loses the answer of one that had."""

    def __init__(self) -> None:
        super().__init__(None)
        self.objects: dict[tuple[str, str], Json] = {}
        self.requests: list[str] = []
        self.before: Fault = lambda method, path: None
        self.after: Fault = lambda method, path: None
        self.time = START
        self.pruned: frozenset[str] = frozenset()
        """Fields of a status that the CRD does not have."""
        self._versions = itertools.count(1)

    def put(self, body: Mapping[str, Any], *, told: bool = True) -> Json:
        """Somebody else writes an object. `told`: the watches tell of it at once."""
        stored = copy.deepcopy(dict(body))
        metadata = stored["metadata"]
        number = next(self._versions)
        metadata.setdefault("namespace", KEY[0])
        metadata.setdefault("uid", f"uid-{number}")
        metadata.setdefault("creationTimestamp", self.time.strftime("%Y-%m-%dT%H:%M:%SZ"))
        metadata["resourceVersion"] = str(number)
        plural = kube.PLURALS[stored["apiVersion"], stored["kind"]]
        self.objects[plural, metadata["name"]] = stored
        if told:
            self.sightings.notice("MODIFIED", stored)
        return stored

    def remove(self, plural: str, name: str, *, told: bool = True) -> None:
        gone = self.objects.pop((plural, name))
        if told:
            self.sightings.notice("DELETED", gone)

    def named(self, plural: str) -> list[str]:
        return sorted(name for kind, name in self.objects if kind == plural)

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
        self.requests.append(f"{method} {path}")
        if (error := self.before(method, path)) is not None:
            raise error
        answer = self._answer(method, path, body, dict(query or []))
        if (error := self.after(method, path)) is not None:
            raise error
        if answer is None and not missing_ok:
            raise ApiError(f"{method} {path}: not found")
        return copy.deepcopy(answer)

    def _answer(self, method: str, path: str, body: Any, query: dict[str, str]) -> Json | None:
        found = PATH.match(path)
        if found is None:
            return {}  # discovery
        plural, name = found["plural"], found["name"]
        version, kind = PLURALS[plural]
        if name is None and method == "GET":
            wanted = [pair.split("=", 1) for pair in query.get("labelSelector", "").split(",") if pair]
            fitting = [
                one
                for (of, _), one in self.objects.items()
                if of == plural and all(one["metadata"].get("labels", {}).get(k) == v for k, v in wanted)
            ]
            return {"items": fitting}
        if method == "POST":
            if plural == "events":
                return dict(body)
            name = body["metadata"]["name"]
            if (plural, name) in self.objects:
                raise ConflictError(f"{plural} {name} already exists")
            return self.put({"apiVersion": version, "kind": kind, **body}, told=False)
        stored = self.objects.get((plural, name or ""))
        if method == "GET" or stored is None:
            return stored
        if method == "DELETE":
            if stored["metadata"]["uid"] != body["preconditions"]["uid"]:
                raise ConflictError("another UID")
            del self.objects[plural, name or ""]
            return {}
        return self._patch(stored, body, is_status=path.endswith("/status"))

    def _patch(self, stored: Json, body: Json, *, is_status: bool) -> Json:
        expected = body["metadata"].get("resourceVersion", stored["metadata"]["resourceVersion"])
        if expected != stored["metadata"]["resourceVersion"]:
            raise ConflictError("the object has been modified")
        if is_status:
            before = copy.deepcopy(stored)
            status = {name: value for name, value in body["status"].items() if name not in self.pruned}
            merge(stored.setdefault("status", {}), status)
            if stored == before:
                return stored
        return self.put(stored, told=False)


def merge(target: Json, patch: Mapping[str, Any]) -> None:
    """RFC 7396."""
    for key, value in patch.items():
        if value is None:
            target.pop(key, None)
        elif isinstance(value, dict):
            merge(target.setdefault(key, {}), value)
        else:
            target[key] = value


class Stage:
    """One FineTuneJob and the operator over a `MemoryApi`."""

    def __init__(self, *, uid: str = "0123abcd-1111", **spec: Any) -> None:
        self.api = MemoryApi()
        self.mailbox = Mailbox()
        self.clock = SteadyClock(wall=lambda: START, elapsed=self._seconds, awake=self._seconds)
        self.reconcile = FineTuneJobReconciler(
            kube=self.api,
            mailbox=self.mailbox,
            telemetry=Telemetry(CollectorRegistry()),
            defaults=Defaults(output_uri=DEFAULTS.output_uri, image=DEFAULTS.image),
            platform=lambda: Platform("K8sJobMode", "http://operator:8090", None, 30),
            clock=self.clock,
        )
        self.apply(uid=uid, **spec)

    def _seconds(self) -> float:
        return (self.api.time - START).total_seconds()

    def apply(self, *, uid: str, **spec: Any) -> None:
        self.api.put(
            {
                "apiVersion": "finetune.dev/v1alpha1",
                "kind": "FineTuneJob",
                "metadata": {"name": KEY[1], "uid": uid, "generation": 1},
                "spec": SPEC | spec,
            }
        )

    @property
    def job(self) -> Json:
        return self.api.objects["finetunejobs", KEY[1]]

    @property
    def status(self) -> Json:
        return dict(self.job.get("status", {}))

    async def passes(self, number: int = 1, *, after: float = 1) -> None:
        """So many passes; `after` seconds go by after each."""
        for _ in range(number):
            await self.reconcile(KEY)
            self.api.time += timedelta(seconds=after)

    def kuberay(self, deployment: str, job: str = "", *, name: str = "triage-a1", **status: Any) -> None:
        """KubeRay writes a RayJob's status."""
        body = copy.deepcopy(self.api.objects["rayjobs", name])
        body["status"] = {"jobDeploymentStatus": deployment, "jobStatus": job, **status}
        self.api.put(body)

    def pod(
        self, name: str, *, attempt: int = 1, told: bool = True, manager: str = MANAGER, **status: Any
    ) -> None:
        labels = {
            "app.kubernetes.io/managed-by": manager,
            "finetune.dev/job": KEY[1],
            "finetune.dev/attempt": str(attempt),
        }
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}}
        self.api.put(
            {**body, "spec": {"nodeName": "n1"}, "status": {"phase": "Running", **status}}, told=told
        )

    def report(self, report: Any, *, attempt: int = 1) -> None:
        uid = self.job["metadata"]["uid"]
        assert self.mailbox.put(KEY, uid=uid, attempt=attempt, report=report)


def waiting(reason: str) -> dict[str, Any]:
    """The status of a pod whose container waits."""
    return {
        "phase": "Pending",
        "containerStatuses": [{"name": "ray-head", "state": {"waiting": {"reason": reason}}}],
    }

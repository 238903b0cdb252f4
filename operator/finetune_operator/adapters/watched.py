"""The API server as far as the watches have told: reads of what is watched cost no request.

What is kept is never believed where being behind could do harm. A status is written only onto the version that was
read (409 otherwise, and the object is read anew), an object that is not known is looked up, and whoever is about to do
something that must not happen twice reads with `fresh`: what the API server itself answered, at most a second ago.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from finetune_operator.adapters.api_errors import (
    ApiError,
    ConflictError,
    ForbiddenError,
    InvalidError,
    UnavailableError,
)
from finetune_operator.adapters.kube import Json, Kube
from finetune_operator.adapters.sightings import JOB_LABEL, Name, Sightings, name_of
from finetune_operator.api.base import API_VERSION
from finetune_operator.api.finetunejob import KIND

WATCHED = frozenset({(API_VERSION, KIND), ("ray.io/v1", "RayJob"), ("v1", "Pod")})
GROUP_SECONDS = 300.0  # for which an API group that was there counts as there


class WatchedKube(Kube):
    """Reads from the sightings first, and adds what its own writes answer."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.sightings = Sightings()
        self._groups: dict[str, float] = {}  # and when each was last seen, by time.monotonic
        self._unsure: set[Name] = set()

    async def get(
        self, api_version: str, kind: str, namespace: str, name: str, *, fresh: bool = False
    ) -> Json | None:
        known = self.sightings.get((api_version, kind, namespace, name), fresh=fresh)
        if known is not None:
            return known
        body = await super().get(api_version, kind, namespace, name)
        if (api_version, kind) in WATCHED:
            self._unsure.discard((api_version, kind, namespace, name))
            if body is not None:
                self.sightings.note(body, written=False)
            else:
                self.sightings.forget((api_version, kind, namespace, name))
        return body

    async def find(
        self,
        api_version: str,
        kind: str,
        namespace: str,
        *,
        labels: Mapping[str, str],
        fresh: bool = False,
    ) -> list[Json]:
        if (
            kind == "Pod"
            and not fresh
            and JOB_LABEL in labels
            and self.sightings.knows_pods(namespace, labels)
        ):
            return self.sightings.pods(namespace, labels)
        asked = self.sightings.now()
        found = await super().find(api_version, kind, namespace, labels=labels)
        if kind == "Pod" and JOB_LABEL in labels:
            self.sightings.replace_pods(namespace, labels, found, asked=asked)
        return found

    def is_unheard_of(self, api_version: str, kind: str, namespace: str, name: str) -> bool:
        """Whether no watch and no write has told of such an object, nor a refusal that it exists."""
        full = (api_version, kind, namespace, name)
        return not self.sightings.knows(full) and full not in self._unsure

    async def create(self, body: Json) -> Json:
        try:
            answer = await super().create(body)
        except (InvalidError, ForbiddenError):
            raise
        except ApiError as error:  # it exists, or nobody knows whether it was created
            if (body["apiVersion"], body["kind"]) in WATCHED:
                self._unsure.add(name_of(body))
            if not isinstance(error, ConflictError | UnavailableError):  # 404: no such kind any more
                self._groups.pop(body["apiVersion"], None)
            raise
        self._note(answer)
        return answer

    async def delete(self, api_version: str, kind: str, namespace: str, name: str, *, uid: str) -> None:
        full = (api_version, kind, namespace, name)
        self.sightings.forget(full)
        try:
            await super().delete(api_version, kind, namespace, name, uid=uid)
        except ApiError:
            self._unsure.add(full)
            raise

    async def patch_status(
        self, kind: str, namespace: str, name: str, *, resource_version: str, patch: Json
    ) -> Json:
        try:
            answer = await super().patch_status(
                kind, namespace, name, resource_version=resource_version, patch=patch
            )
        except ConflictError:
            self.sightings.forget((API_VERSION, kind, namespace, name))
            raise
        self._note(answer)
        return answer

    async def has_group_version(self, group_version: str) -> bool:
        now = time.monotonic()
        if now - self._groups.get(group_version, float("-inf")) < GROUP_SECONDS:
            return True
        found = await super().has_group_version(group_version)
        if found:
            self._groups[group_version] = now
        return found

    def _note(self, body: Json) -> None:
        if body and (body.get("apiVersion"), body.get("kind")) in WATCHED:
            self.sightings.note(body, written=True)

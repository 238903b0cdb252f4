"""The durable copy of the route snapshot, the ConfigMap `finetune-routes`: starting routers and operators read it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import ValidationError

from finetune_operator.adapters.api_errors import ApiError, UnavailableError
from finetune_operator.adapters.kube import Kube
from finetune_operator.api.routes import Snapshot
from finetune_operator.manifests import routes as manifests

logger = logging.getLogger(__name__)

RETRY_SECONDS = 1.0
LAST_RETRY_SECONDS = 30.0  # while the API server refuses: a right or the namespace is missing
STORE_SECONDS = 3.0  # a rollback does not wait longer for an API server that does not answer


class TooLargeError(ApiError):
    """The snapshot does not fit into its ConfigMap; `str()` says by how much and what to do."""


@dataclass(frozen=True)
class Contents:
    """What the ConfigMap says."""

    snapshot: Snapshot = field(default_factory=Snapshot)
    engines: Mapping[str, set[str]] = field(default_factory=dict)
    """Alias -> agents that were asked to load something for it."""


class DurableCopy:
    """Writes the snapshot where it differs from what is stored, and only over what we know."""

    def __init__(self, kube: Kube, namespace: str) -> None:
        self._kube = kube
        self._namespace = namespace
        self._resource_version: str | None = None
        self._stored = ""
        self._oversized = ""
        self._refusals = 0
        self.problem: str | None = None
        """Why the newest snapshot cannot be stored, and what to do. An API server that is away is no such problem."""

    async def read(self) -> Contents | None:
        """What is stored; None where there is nothing. One that cannot be read is replaced; routers keep theirs until
        then. Raises ApiError."""
        body = await self._kube.get("v1", "ConfigMap", self._namespace, manifests.NAME)
        self._resource_version = body["metadata"]["resourceVersion"] if body else None
        if body is None:
            return None
        data = body.get("data", {})
        try:
            snapshot = Snapshot.model_validate_json(data.get(manifests.ROUTES_KEY, ""))
            engines = json.loads(data.get(manifests.ENGINES_KEY, "{}"))
            return Contents(
                snapshot, {str(alias): set(map(str, agents)) for alias, agents in engines.items()}
            )
        except (ValidationError, ValueError, AttributeError, TypeError) as error:
            logger.error("ConfigMap %s/%s cannot be read: %s", self._namespace, manifests.NAME, error)
            return Contents()

    async def reread(self) -> int | None:
        """After a conflict: what to write over. Returns the version that somebody else has stored, None where nothing
        readable is. Raises ApiError."""
        found = await self.read()
        self._stored = ""
        return found.snapshot.version if found else None

    def is_settled(self, contents: Contents) -> bool:
        """Whether storing it again would change nothing: it is stored, or known to be too large."""
        return _text(contents) in (self._stored, self._oversized)

    async def store(self, contents: Contents) -> None:
        """Raises ConflictError when somebody else has written, TooLargeError, and any other ApiError."""
        text = _text(contents)
        if text == self._stored and self._resource_version is not None:
            return
        body = manifests.build_config_map(
            namespace=self._namespace,
            routes=manifests.to_text(contents.snapshot),
            engines={alias: sorted(agents) for alias, agents in contents.engines.items()},
            resource_version=self._resource_version,
        )
        problem = manifests.why_too_large(body, contents.snapshot)
        if problem is not None:
            self.problem, self._oversized = problem, text
            raise TooLargeError(problem)
        write = self._kube.create if self._resource_version is None else self._kube.apply
        try:
            async with asyncio.timeout(STORE_SECONDS):
                answer = await write(body)
        except TimeoutError:
            raise UnavailableError(f"no answer within {STORE_SECONDS:g} s") from None
        self._resource_version = answer["metadata"]["resourceVersion"]
        self._stored, self._oversized, self.problem = text, "", None
        self._refusals = 0

    def miss(self, error: ApiError) -> float | None:
        """Note that it could not be stored. Returns the seconds after which another try makes sense, if any does."""
        if isinstance(error, UnavailableError):
            return RETRY_SECONDS
        self.problem = str(error)
        if isinstance(error, TooLargeError):
            return None
        self._refusals += 1
        return min(LAST_RETRY_SECONDS, RETRY_SECONDS * 2.0 ** min(self._refusals - 1, 10))


def _text(contents: Contents) -> str:
    engines = {alias: sorted(agents) for alias, agents in contents.engines.items()}
    return manifests.to_text(contents.snapshot) + json.dumps(engines, sort_keys=True)

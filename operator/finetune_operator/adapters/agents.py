"""The agents beside the engines: what is loaded, load this, unload that, score these rows (agent/v1).

An engine that cannot be reached is an ordinary event: it comes back as `Unheard`, never as an exception.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated
from urllib.parse import quote

import aiohttp
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

from finetune_operator.adapters.fetching import Reply, TokenFile, UnreachableError, fetch, parse
from finetune_operator.api.adapterdeployment_strategy import EvaluationSpec

STATUS_SECONDS = 2.0  # an agent answers from memory; who waits longer delays a rollback
ORDER_SECONDS = 5.0
MAX_SAID = 1000  # characters; an agent that says more than a status holds must not cost the guardrails


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_SAID else f"{text[: MAX_SAID - 1]}…"


Said = Annotated[str, AfterValidator(_shortened)]
"""Words of an agent."""


class AgentModel(BaseModel):
    """A part of an agent's answer. Agents may be newer than their operator."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True, allow_inf_nan=False
    )


class Engine(AgentModel):
    ready: bool
    instance: str = ""
    base_model: str | None = None
    base_models: tuple[str, ...] = ()
    message: Said = ""


class Capacity(AgentModel):
    """Null, or 0 from older agents: the engine's limit is not known."""

    max_loras: int | None = None
    loaded_loras: int | None = None
    max_lora_rank: int | None = None


class Adapter(AgentModel):
    name: str
    digest: str = ""
    uri: str = ""
    state: str
    reason: Said | None = None
    message: Said = ""


class AgentStatus(AgentModel):
    """Answer of GET /agent/v1/status."""

    engine: Engine
    capacity: Capacity = Capacity()
    adapters: tuple[Adapter, ...] = ()


class Score(AgentModel):
    score: float
    rows: int = 0


class Evaluation(AgentModel):
    """Answer of GET /agent/v1/evaluations/{id}."""

    id: str
    state: str
    message: Said = ""
    scores: dict[str, Score] = Field(default_factory=dict)


@dataclass(frozen=True)
class Unheard:
    """No answer, or none that makes sense; `reason` says which."""

    reason: str


@dataclass(frozen=True)
class Missing:
    """The agent answers, and knows nothing of what it was asked about."""


@dataclass(frozen=True)
class Agents:
    session: aiohttp.ClientSession
    token: TokenFile = field(default_factory=lambda: TokenFile(None))

    async def status(self, url: str) -> AgentStatus | Unheard:
        reply = await self._ask("GET", f"{url}/agent/v1/status", seconds=STATUS_SECONDS)
        return reply if isinstance(reply, Unheard) else parse(AgentStatus, reply, Unheard)

    async def load(self, url: str, *, name: str, uri: str, digest: str) -> Unheard | None:
        """Ask for an adapter; None once the agent has taken the order. Safe to repeat."""
        body = {"uri": uri, "digest": digest}
        return await self._order("PUT", f"{url}/agent/v1/adapters/{quote(name, safe='')}", body)

    async def unload(self, url: str, *, name: str) -> Unheard | None:
        """Ask for the removal of an adapter; None once the agent has taken the order. Safe to repeat."""
        return await self._order("DELETE", f"{url}/agent/v1/adapters/{quote(name, safe='')}", None)

    async def evaluate(
        self, url: str, *, identity: str, models: Sequence[str], evaluation: EvaluationSpec
    ) -> Unheard | None:
        """Start an evaluation; None once the agent has taken the order. Safe to repeat."""
        body = {
            "id": identity,
            "models": list(models),
            "dataset": evaluation.uri,
            "scorer": str(evaluation.scorer),
            "fields": evaluation.fields,
            "maxRows": evaluation.max_rows,
            "maxTokens": evaluation.max_tokens,
        }
        given = {name: value for name, value in body.items() if value is not None}
        return await self._order("POST", f"{url}/agent/v1/evaluations", given)

    async def evaluation(self, url: str, *, identity: str) -> Evaluation | Missing | Unheard:
        path = f"{url}/agent/v1/evaluations/{quote(identity, safe='')}"
        reply = await self._ask("GET", path, seconds=STATUS_SECONDS)
        if isinstance(reply, Unheard):
            return reply
        if reply.status == 404:
            return Missing()
        return parse(Evaluation, reply, Unheard)

    async def _order(self, method: str, url: str, body: object) -> Unheard | None:
        reply = await self._ask(method, url, body=body, seconds=ORDER_SECONDS)
        if isinstance(reply, Unheard):
            return reply
        return None if reply.ok else Unheard(reply.summary())

    async def _ask(self, method: str, url: str, *, seconds: float, body: object = None) -> Reply | Unheard:
        try:
            return await fetch(self.session, method, url, body=body, token=self.token.read(), seconds=seconds)
        except UnreachableError as error:
            return Unheard(str(error))

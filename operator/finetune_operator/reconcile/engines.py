"""Which engines serve a deployment, and what each of them says."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit, urlunsplit

from finetune_operator.adapters.addresses import Resolver, UnknownHostError
from finetune_operator.adapters.agents import Agents, AgentStatus, Evaluation, Missing, Unheard
from finetune_operator.adapters.kube import Json, Kube
from finetune_operator.api.adapterdeployment_traffic import ServingSpec
from finetune_operator.core.endpoints import AllowList
from finetune_operator.core.rollout_facts import EngineFacts, EvaluationFacts
from finetune_operator.reconcile import deployment_facts

SHARED_SECONDS = 0.1
AT_ONCE = 64  # agents that one deployment asks at the same time: one with a thousand pods is not alone
SILENT_SECONDS = 0.25  # that a pass waits for an agent that was silent before


@dataclass(frozen=True)
class Place:
    """An engine and the agent beside it."""

    url: str
    agent_url: str


class NoEnginesError(Exception):
    """There is no engine; `str()` says why and what to do."""


class RefusedError(NoEnginesError):
    """spec names engines that the operator does not talk to."""


@dataclass(frozen=True)
class Sight:
    """The engines of a deployment, and why there is none, where there is none."""

    engines: Sequence[EngineFacts] = ()
    problem: str | None = None
    refusal: str | None = None
    """The same, where spec asks for engines that are not allowed."""


@dataclass(frozen=True)
class Engines:
    kube: Kube
    agents: Agents
    resolver: Resolver
    allowed: AllowList
    """Who may be asked: every request carries the operator's token."""
    default_url: str | None = None
    """Engine of deployments that name none."""
    default_agent_url: str | None = None
    """Its agent, where that is not on the engine's host at serving.agentPort."""
    _evaluators: dict[str, str] = field(default_factory=dict)
    """Evaluation -> agent that knows it."""
    _asked: dict[str, tuple[float, asyncio.Task[AgentStatus | Unheard]]] = field(default_factory=dict)
    """Agent -> when it was last asked, and its answer."""
    _silent: dict[str, Unheard] = field(default_factory=dict)
    """Agents that did not answer the last request, and what was wrong."""

    async def observe(self, namespace: str, serving: ServingSpec) -> Sight:
        """All engines of a deployment at once."""
        try:
            places = await self._places(namespace, serving)
        except RefusedError as error:
            return Sight(problem=str(error), refusal=str(error))
        except NoEnginesError as error:
            return Sight(problem=str(error))
        gate = asyncio.Semaphore(AT_ONCE)

        async def ask(place: Place) -> AgentStatus | Unheard:
            async with gate:
                return await self._status(place.agent_url)

        told = await asyncio.gather(*(ask(place) for place in places))
        return Sight(
            tuple(
                deployment_facts.engine_facts(place.url, place.agent_url, answer)
                for place, answer in zip(places, told, strict=True)
            )
        )

    async def evaluation(self, identity: str, engines: Sequence[EngineFacts]) -> EvaluationFacts | None:
        """What is known of an evaluation; None where the agents that could tell do not answer."""
        known = self._evaluators.get(identity)
        urls = [engine.agent_url for engine in engines if known in (None, engine.agent_url)]
        answers = await asyncio.gather(*(self.agents.evaluation(url, identity=identity) for url in urls))
        for url, answer in zip(urls, answers, strict=True):
            if isinstance(answer, Evaluation):
                self._evaluators[identity] = url
                return deployment_facts.evaluation_facts(identity, answer)
        self._evaluators.pop(identity, None)
        if any(isinstance(answer, Unheard) for answer in answers):
            return None
        return deployment_facts.evaluation_facts(identity, Missing())

    async def _status(self, agent_url: str) -> AgentStatus | Unheard:
        """Many deployments share an engine: those that look at the same moment share one request. Who was silent
        before is asked again and hardly waited for, so that agents that hang do not use up the passes of others."""
        now = asyncio.get_running_loop().time()
        asked, task = self._asked.get(agent_url, (float("-inf"), None))
        if task is None or (task.done() and now - asked > SHARED_SECONDS):
            task = asyncio.create_task(self._ask(agent_url))
            self._asked[agent_url] = (now, task)
        before = self._silent.get(agent_url)
        if before is None:
            return await asyncio.shield(task)
        done, _ = await asyncio.wait({task}, timeout=SILENT_SECONDS)
        return task.result() if done else before

    async def _ask(self, agent_url: str) -> AgentStatus | Unheard:
        answer = await self.agents.status(agent_url)
        if isinstance(answer, Unheard):
            self._silent[agent_url] = answer
        else:
            self._silent.pop(agent_url, None)
        return answer

    async def _places(self, namespace: str, serving: ServingSpec) -> list[Place]:
        if serving.pod_selector is not None:
            return await self._pods(namespace, serving)
        endpoint = serving.endpoint or self.default_url
        if endpoint is None:
            raise NoEnginesError(
                "spec.serving names no engines, and the operator has no default engine: set spec.serving.endpoint or "
                "spec.serving.podSelector (or FINETUNE_ENGINE_URL of the operator)"
            )
        if serving.endpoint is None and self.default_agent_url is not None:
            return [Place(endpoint.rstrip("/"), self.default_agent_url.rstrip("/"))]
        try:
            self._check(endpoint, serving)
            urls = await self.resolver.spread(endpoint)
            return [Place(url.rstrip("/"), _with_port(url, serving.agent_port)) for url in urls]
        except UnknownHostError as error:
            raise NoEnginesError(f"the engines of spec.serving.endpoint cannot be found: {error}") from error
        except ValueError as error:
            raise NoEnginesError(f"spec.serving.endpoint {endpoint!r} is no URL: {error}") from error

    def _check(self, endpoint: str, serving: ServingSpec) -> None:
        """Raises RefusedError, and ValueError where it is no URL. Names are checked, before they become addresses."""
        if serving.endpoint is None:
            return
        agent = _with_port(endpoint, serving.agent_port)
        if not self.allowed.allows(endpoint):
            raise RefusedError(self.allowed.refuse("spec.serving.endpoint", endpoint))
        if not self.allowed.allows(agent):
            raise RefusedError(self.allowed.refuse("spec.serving.agentPort", agent))

    async def _pods(self, namespace: str, serving: ServingSpec) -> list[Place]:
        if not self.allowed.allows_pods_of(namespace):
            raise RefusedError(self.allowed.refuse("spec.serving.podSelector", f"pods/{namespace}"))
        labels = serving.pod_selector.match_labels if serving.pod_selector else {}
        pods = await self.kube.find("v1", "Pod", namespace, labels=labels)
        hosts = sorted(_host(pod["status"]["podIP"]) for pod in pods if _is_ready(pod))
        if not hosts:
            text = ",".join(f"{name}={value}" for name, value in labels.items())
            raise NoEnginesError(
                f"none of the {len(pods)} pods with labels {text} in namespace {namespace} is Ready"
                if pods
                else f"no pod in namespace {namespace} has the labels {text} of spec.serving.podSelector"
            )
        return [
            Place(f"http://{host}:{serving.port}", f"http://{host}:{serving.agent_port}") for host in hosts
        ]


def _is_ready(pod: Json) -> bool:
    status = pod.get("status", {})
    ready = any(c["type"] == "Ready" and c["status"] == "True" for c in status.get("conditions", []))
    return ready and bool(status.get("podIP")) and "deletionTimestamp" not in pod["metadata"]


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address


def _with_port(url: str, port: int) -> str:
    """The agent's base URL: host of the engine, port of the agent. Raises ValueError."""
    parts = urlsplit(url)
    if not parts.hostname or parts.port == 0:  # `port` raises ValueError above 65535
        raise ValueError("it has no host, or no possible port")
    return urlunsplit((parts.scheme, f"{_host(parts.hostname)}:{port}", "", "", ""))

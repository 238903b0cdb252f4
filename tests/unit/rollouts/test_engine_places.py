"""Engines that spec.serving.podSelector selects: the ready pods of its own namespace, each with its agent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import pytest

from finetune_operator.adapters.addresses import Resolver
from finetune_operator.adapters.agents import Agents, AgentStatus
from finetune_operator.adapters.kube import Kube
from finetune_operator.api.adapterdeployment_traffic import ServingSpec
from finetune_operator.core import endpoints
from finetune_operator.reconcile.engines import Engines

LABELS = {"app": "vllm", "team": "a"}


def pod(address: str | None = "10.0.0.1", *, ready: str | None = "True", **metadata: Any) -> dict[str, Any]:
    conditions = [{"type": "PodScheduled", "status": "True"}]
    if ready is not None:
        conditions.append({"type": "Ready", "status": ready})
    status = {"conditions": conditions, **({"podIP": address} if address else {})}
    return {"metadata": {"name": "p", **metadata}, "status": status}


class Pods:
    """An API server that has pods, and what it was asked."""

    def __init__(self, *pods: dict[str, Any]) -> None:
        self.pods = pods
        self.asked: list[tuple[str, str, str, Mapping[str, str]]] = []

    async def find(
        self, version: str, kind: str, namespace: str, *, labels: Mapping[str, str]
    ) -> list[dict[str, Any]]:
        self.asked.append((version, kind, namespace, labels))
        return list(self.pods)


class Answering:
    async def status(self, url: str) -> AgentStatus:
        return AgentStatus.model_validate({"engine": {"ready": True, "baseModels": ["tiny"]}})


def engines(pods: Pods, allowed: str = "") -> Engines:
    return Engines(
        cast("Kube", pods), cast("Agents", Answering()), Resolver(), endpoints.parse(allowed), "http://d:1"
    )


def serving(**more: Any) -> ServingSpec:
    return ServingSpec.model_validate({"podSelector": {"matchLabels": LABELS}, **more})


async def test_ready_pods_are_engines_and_their_agents_are_beside_them() -> None:
    pods = Pods(
        pod("10.0.0.2"),
        pod("10.0.0.1"),
        pod("fd00::7"),
        pod("10.0.0.3", ready="False"),
        pod("10.0.0.4", ready=None),
        pod(None),
        pod("10.0.0.5", deletionTimestamp="2026-01-01T00:00:00Z"),
    )
    sight = await engines(pods).observe("team-a", serving(port=9000, agentPort=9001))
    assert [(e.url, e.agent_url) for e in sight.engines] == [
        ("http://10.0.0.1:9000", "http://10.0.0.1:9001"),
        ("http://10.0.0.2:9000", "http://10.0.0.2:9001"),
        ("http://[fd00::7]:9000", "http://[fd00::7]:9001"),
    ]
    assert all(engine.reachable and engine.ready for engine in sight.engines)
    assert pods.asked == [("v1", "Pod", "team-a", LABELS)], "never of another namespace"


@pytest.mark.parametrize(
    ("pods", "words"),
    [
        ((), "no pod in namespace team-a has the labels app=vllm,team=a"),
        ((pod(ready="False"), pod(None)), "none of the 2 pods with labels app=vllm,team=a"),
    ],
)
async def test_without_a_ready_pod_the_message_says_which_were_meant(
    pods: tuple[dict[str, Any], ...], words: str
) -> None:
    sight = await engines(Pods(*pods)).observe("team-a", serving())
    assert (sight.engines, sight.refusal) == ((), None)
    assert words in (sight.problem or "")


async def test_pods_of_a_namespace_that_is_not_allowed_are_not_even_looked_for() -> None:
    pods = Pods(pod())
    sight = await engines(pods, "pods/engines, *.engines.svc").observe("team-a", serving())
    assert (sight.engines, pods.asked) == ((), [])
    assert "spec.serving.podSelector: pods/team-a" in (sight.refusal or "")
    assert (await engines(pods, "pods/team-*").observe("team-a", serving())).engines

"""What the agent beside a vLLM tells, read by the operator's client and decided on by the rollout."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetune_operator.adapters import fetching
from finetune_operator.adapters.agents import Agents, AgentStatus
from finetune_operator.core import rollouts
from finetune_operator.core.rollout_facts import EngineFacts, Load, Wanted
from finetune_operator.reconcile import deployment_facts
from finetune_server import agent_app
from finetune_server.agent import Settings
from finetune_server.ports import listen
from tests.integration.server.vllm_double import Engine
from tests.unit.rollouts.world import START, World, artifact, spec_of


def decided(engine: EngineFacts) -> tuple[list[Any], dict[str, str]]:
    """Loads that the first two passes over a new deployment order, and the conditions after them."""
    world = World(spec=spec_of("a", baseModelRef={"name": "base"}), wanted=Wanted(artifact=artifact("a")))
    seen = replace(world.observe(), engines=[engine])
    first = rollouts.decide(seen, now=START)
    deployment = replace(seen.deployment, status=first.status)
    second = rollouts.decide(replace(seen, deployment=deployment), now=START)
    loads = [a for plan in (first, second) for a in plan.actions if isinstance(a, Load)]
    return loads, {c.type: f"{c.status} {c.message}" for c in second.status.conditions}


@pytest.mark.parametrize("max_lora", [0, 2])
async def test_a_vllm_whose_limits_nobody_told_gets_the_adapter(tmp_path: Path, max_lora: int) -> None:
    settings = Settings(cache=tmp_path / "cache", state_file=None)
    async with (
        listen(Engine(max_lora=max_lora).application(), "127.0.0.1", 0) as (host, port),
        agent_app.serve(
            engine_url=f"http://{host}:{port}",
            api_key=None,
            settings=settings,
            token_file=None,
            host="127.0.0.1",
            port=0,
        ) as (agent_host, agent_port),
        fetching.open_session() as session,
    ):
        url = f"http://{agent_host}:{agent_port}"
        told = await Agents(session).status(url)
        assert isinstance(told, AgentStatus), told
        engine = deployment_facts.engine_facts("http://e:8000", url, told)
    loads, conditions = decided(engine)
    assert [load.served_name for load in loads[:1]] == ["bot--aaaaaaaa"], conditions
    assert conditions["BaseModelCompatible"].startswith("True")
    assert conditions["CapacityOK"].startswith("True")


@pytest.mark.parametrize(
    ("capacity", "loads", "bad"),
    [
        ({}, True, None),
        ({"maxLoras": None, "loadedLoras": None, "maxLoraRank": None}, True, None),
        ({"maxLoras": 0, "loadedLoras": 0, "maxLoraRank": 0}, True, None),
        ({"maxLoras": 2, "loadedLoras": 1, "maxLoraRank": 16}, True, None),
        ({"maxLoras": 2, "loadedLoras": 2, "maxLoraRank": 16}, False, "CapacityOK"),
        ({"maxLoras": 2, "loadedLoras": 1, "maxLoraRank": 8}, False, "BaseModelCompatible"),
    ],
)
def test_only_a_limit_that_was_told_is_one(capacity: dict[str, Any], loads: bool, bad: str | None) -> None:
    document = {"engine": {"ready": True, "baseModels": ["base"]}, "capacity": capacity, "adapters": []}
    told = AgentStatus.model_validate(document)
    ordered, conditions = decided(deployment_facts.engine_facts("http://e:8000", "http://e:8001", told))
    assert bool(ordered) is loads, conditions
    assert [kind for kind in ("CapacityOK", "BaseModelCompatible") if conditions[kind].startswith("F")] == (
        [bad] if bad else []
    )


def test_an_agent_that_says_too_much_costs_no_pass() -> None:
    trace = "Traceback: é" * 10_000
    adapters = [{"name": "bot--aaaaaaaa", "state": "Failed", "reason": trace, "message": trace}]
    document = {
        "engine": {"ready": True, "baseModels": [trace], "message": trace},
        "adapters": adapters,
    }
    told = AgentStatus.model_validate(document)
    engine = deployment_facts.engine_facts("http://e:8000", "http://e:8001", told)
    _, conditions = decided(engine)
    assert "Failed (Traceback" in conditions["AdaptersLoaded"]
    assert len(conditions["AdaptersLoaded"]) < 3000
    assert conditions["BaseModelCompatible"].startswith("False http://e:8000 serves Traceback")

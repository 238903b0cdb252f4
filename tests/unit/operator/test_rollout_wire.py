"""The borders of rollouts: facts from JSON, aliases, configuration, metrics, and HTTP to Prometheus and webhooks."""

from __future__ import annotations

import json
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest

from finetune_operator import config
from finetune_operator.adapters import agents, fetching
from finetune_operator.adapters.agents import Agents
from finetune_operator.adapters.environment import ConfigurationError
from finetune_operator.adapters.prometheus import Prometheus, QueryError
from finetune_operator.adapters.rollout_telemetry import RolloutTelemetry
from finetune_operator.adapters.webhooks import AlertError, Alerts, Webhooks
from finetune_operator.api.adapterdeployment_status import (
    AdapterDeploymentStatus,
    Check,
    CheckKind,
    CheckPhase,
    CompletionStatus,
    HistoryEntry,
    Interval,
    RolloutPhase,
    Stage,
    Weights,
)
from finetune_operator.reconcile import deployment_facts, facts, orphans
from finetune_operator.reconcile.aliases import Aliases, Claim, key_of

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)


@asynccontextmanager
async def answering(text: str, *, status: int = 200) -> AsyncIterator[tuple[str, list[Any]]]:
    """A server that answers everything alike; what it was sent."""
    sent: list[Any] = []

    async def answer(request: web.Request) -> web.Response:
        sent.append((request.path_qs, dict(request.headers), await request.text()))
        return web.Response(text=text, status=status, headers={"Location": "http://127.0.0.1:9/"})

    application = web.Application()
    application.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(application)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", sent
    finally:
        await runner.cleanup()


# -- facts


def test_a_status_never_holds_a_number_that_json_does_not_have() -> None:
    check = Check(
        name="e",
        kind=CheckKind.OBJECTIVE,
        phase=CheckPhase.INCONCLUSIVE,
        estimate=math.nan,
        e_value=math.inf,
        interval=Interval(low=-math.inf, high=1.0),
    )
    stored = facts.to_json(AdapterDeploymentStatus(analysis=[check], weights=Weights(stable=math.nan)))
    json.dumps(stored, allow_nan=False)
    assert stored["analysis"] == [
        {"name": "e", "kind": "Objective", "phase": "Inconclusive", "interval": {"high": 1.0}}
    ]
    AdapterDeploymentStatus.model_validate(stored)


def test_a_spec_that_cannot_be_read_is_a_problem_and_no_error() -> None:
    metadata = {"namespace": "team", "name": "bot", "uid": "u"}
    found = deployment_facts.deployment_facts({"metadata": metadata, "spec": {"adapter": {}, "new": 1}})
    assert found.spec is None
    assert found.problem is not None
    assert "spec.baseModelRef" in found.problem
    assert (
        "spec.new: this field is of a newer CRD than the operator knows: upgrade the operator"
        in found.problem
    )


def job(phase: str, method: str = "LoRA", *, objective: str = "SFT", artifact: bool = True) -> dict[str, Any]:
    status: dict[str, Any] = {"phase": phase, "message": "out of memory"}
    if artifact:
        status["artifact"] = {
            "uri": "s3://b/a/",
            "digest": "sha256:" + "ab" * 32,
            "sizeBytes": 1,
            "baseModel": "hf://m/n",
            "rank": 8,
        }
    spec = {
        "objective": objective,
        "model": {"uri": "hf://m/n"},
        "method": {"type": method},
        "dataset": {"sources": [{"uri": "s3://d/x"}]},
    }
    return {"metadata": {"namespace": "team", "name": "j", "uid": "u"}, "spec": spec, "status": status}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (None, "FineTuneJobNotFound"),
        (job("Running", artifact=False), "WaitingForFineTuneJob"),
        (job("Failed", artifact=False), "FineTuneJobFailed"),
        (job("Succeeded", "Full"), "NotAnAdapter"),
        (job("Succeeded", objective="RewardModel"), "NotALanguageModel"),
    ],
)
def test_why_a_job_has_no_adapter_yet(body: dict[str, Any] | None, reason: str) -> None:
    wanted = deployment_facts.wanted_by_job("j", body)
    assert (wanted.artifact, wanted.reason) == (None, reason)
    assert "FineTuneJob j" in (wanted.message or "")


def test_the_artifact_of_a_job_that_succeeded_is_wanted() -> None:
    artifact = deployment_facts.wanted_by_job("j", job("Succeeded")).artifact
    assert artifact is not None
    assert (artifact.revision, artifact.uri, artifact.rank) == ("abababab", "s3://b/a", 8)


# -- aliases


def claim(name: str, created: str, alias: str = "bot") -> Claim:
    return Claim(("team", name), f"uid-{name}", created, alias)


def test_the_holder_of_an_alias_keeps_it_and_the_oldest_who_waits_is_next() -> None:
    aliases = Aliases()
    assert aliases.claim(claim("first", "2026-03")) is None
    assert aliases.claim(claim("young", "2026-05")) == ("team", "first")
    assert aliases.claim(claim("old", "2026-01")) == ("team", "first"), "older, but it came later"
    assert aliases.release(("team", "first")) == [("team", "old"), ("team", "young")]
    assert aliases.claim(claim("old", "2026-01")) is None
    assert aliases.release(("team", "young")) == []
    assert aliases.holder("bot") == ("team", "old")


def test_after_a_restart_holders_come_before_age() -> None:
    aliases = Aliases()
    claims = [claim("old", "2026-01"), claim("holder", "2026-05"), claim("x", "2026-03", "free")]
    aliases.claim_all(claims, holders={"bot": ("team", "holder")})
    assert (aliases.holder("bot"), aliases.holder("free")) == (("team", "holder"), ("team", "x"))


def test_an_object_that_is_made_anew_may_take_another_alias() -> None:
    aliases = Aliases()
    aliases.claim(claim("a", "2026-01"))
    assert aliases.claim(claim("a", "2026-02", "other")) is None
    assert not aliases.is_claimed("bot")


def test_only_names_that_we_gave_are_orphans() -> None:
    assert orphans.is_of("bot--0a1b2c3d", "bot")
    for name in (
        "bot--0a1b2c3",
        "bot--0A1B2C3D",
        "robot--0a1b2c3d",
        "bot",
        "bot--x--0a1b2c3d",
        "bot-0a1b2c3d",
    ):
        assert not orphans.is_of(name, "bot")
    assert key_of("team/bot/uid-1") == ("team", "bot")


# -- configuration


def test_addresses_are_read_and_tidied(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("t")
    settings = config.load(
        {
            "FINETUNE_ROUTER_ADMIN_URLS": "http://a:1/, http://b:2,,",
            "FINETUNE_ROUTER_TOKEN_FILE": str(token),
            "FINETUNE_ENGINE_URL": "http://engine:8000/",
        }
    )
    assert settings.router_admin_urls == ("http://a:1", "http://b:2")
    assert (settings.engine_url, settings.agent_url, settings.namespace) == (
        "http://engine:8000",
        None,
        "finetune-system",
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("FINETUNE_ROUTER_ADMIN_URLS", "router:8081"),
        ("FINETUNE_ROUTER_ADMIN_URLS", "http://router:99999"),
        ("FINETUNE_ENGINE_URL", "ftp://engine"),
        ("FINETUNE_AGENT_TOKEN_FILE", "/nowhere/token"),
        ("FINETUNE_ALERT_PROVIDERS_FILE", "/nowhere/alerts.json"),
        ("FINETUNE_DRAIN_SECONDS", "-1"),
    ],
)
def test_a_bad_address_is_named_with_its_variable(name: str, value: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{name}='{value}': "):
        config.load({name: value})


# -- Prometheus


def vector(*values: str) -> str:
    result = [{"metric": {}, "value": [1.0, value]} for value in values]
    return json.dumps({"status": "success", "data": {"resultType": "vector", "result": result}})


NUMBER = '{"status":"success","data":{"resultType":"scalar","result":[1,%s]}}'


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (vector("1.5"), 1.5),
        (vector("1" + "0" * 400), None),
        (vector("-Inf"), None),
        (vector(), None),
        (vector("NaN"), None),
        (vector("+Inf"), None),
        ('{"status":"success","data":{"resultType":"scalar","result":[1,"2"]}}', 2.0),
    ],
)
async def test_a_query_gives_one_number_or_nothing(text: str, value: float | None) -> None:
    async with answering(text) as (url, sent), fetching.open_session() as session:
        assert await Prometheus(session).query(url + "/", 'up{a="b"}') == value
        assert sent[0][0] == "/api/v1/query?query=up%7Ba%3D%22b%22%7D"


@pytest.mark.parametrize(
    ("text", "status", "problem"),
    [
        (vector("1", "2"), 200, "2 series"),
        (vector("one"), 200, "not a number"),
        ("<html>", 200, "not an answer of Prometheus"),
        ('{"status":"error","errorType":"bad_data","error":"parse error"}', 400, "parse error"),
        ('{"status":"success","data":{"resultType":"matrix","result":[]}}', 200, "matrix"),
        ("", 302, "not an answer"),
        ("[" * 200_000, 200, "not an answer"),
        (NUMBER % ("1" + "0" * 400), 200, "not a number"),
        (NUMBER % ("1" + "0" * 5000), 200, "not an answer"),
        (NUMBER % ("[" * 100 + "]" * 100), 200, "not a number"),
    ],
)
async def test_any_other_answer_is_an_error_that_says_why(text: str, status: int, problem: str) -> None:
    async with answering(text, status=status) as (url, _), fetching.open_session() as session:
        with pytest.raises(QueryError, match=problem):
            await Prometheus(session).query(url, "up")


# -- webhooks and alerts


async def test_a_webhook_accepts_by_2xx_and_a_redirect_is_not_followed() -> None:
    async with fetching.open_session() as session:
        webhooks = Webhooks(session)
        for status, accepted in ((200, True), (204, True), (302, False), (403, False), (500, False)):
            async with answering("no" if status == 403 else "", status=status) as (url, sent):
                answer = await webhooks.ask(url, {"name": "bot"}, seconds=2)
                assert answer.accepted is accepted
                assert json.loads(sent[0][2]) == {"name": "bot"}
        assert not (await webhooks.ask("http://127.0.0.1:9", {}, seconds=2)).accepted


async def test_alerts_go_to_providers_by_name_and_never_tell_their_urls(tmp_path: Path) -> None:
    providers = tmp_path / "alerts.json"
    async with answering("ok") as (url, sent), fetching.open_session() as session:
        providers.write_text(json.dumps({"slack": url, "gone": "http://127.0.0.1:9/secret"}))
        alerts = Alerts(session, providers)
        await alerts.send("slack", {"text": "hello"})
        assert json.loads(sent[0][2]) == {"text": "hello"}
        for name, problem in (("gone", "gone"), ("unknown", "not in the operator's file")):
            with pytest.raises(AlertError, match=problem) as caught:
                await alerts.send(name, {})
            assert "secret" not in str(caught.value)
        with pytest.raises(AlertError, match="FINETUNE_ALERT_PROVIDERS_FILE"):
            await Alerts(session).send("slack", {})


# -- agents


@pytest.mark.parametrize("text", ["{}", "[]", "nonsense", '{"engine": {"ready": "maybe"}}'])
async def test_an_agent_that_cannot_be_understood_is_not_heard(text: str) -> None:
    async with answering(text) as (url, _), fetching.open_session() as session:
        assert isinstance(await Agents(session).status(url), agents.Unheard)


async def test_an_agent_that_is_away_is_a_fact() -> None:
    async with fetching.open_session() as session:
        told = await Agents(session).status("http://127.0.0.1:9")
        assert isinstance(told, agents.Unheard)
        engine = deployment_facts.engine_facts("http://e", "http://a", told)
        assert not engine.reachable
        assert engine.message


async def test_an_endless_answer_is_cut_off() -> None:
    async with answering("x" * 100_000) as (url, _), fetching.open_session() as session:
        with pytest.raises(fetching.UnreachableError, match="longer than"):
            await fetching.fetch(session, "GET", url, seconds=2, limit=1000)


# -- metrics


def test_series_of_a_deployment_live_and_die_with_it() -> None:
    registry = CollectorRegistry()
    telemetry = RolloutTelemetry(registry)
    before = AdapterDeploymentStatus(
        phase=RolloutPhase.PROGRESSING, stage=Stage.CANARY, weights=Weights(stable=95, candidate=5)
    )
    ended = HistoryEntry(
        revision="ab",
        digest="sha256:x",
        uri="u",
        completion_status=CompletionStatus.ABORTED,
        reason="GuardrailBreached",
        start_time=NOW,
        end_time=NOW,
    )
    after = AdapterDeploymentStatus(phase=RolloutPhase.DEGRADED, stage=Stage.FAILED, history=[ended])
    telemetry.show("team", "bot", before=before, status=before)
    assert 'phase="Progressing",stage="Canary"} 1.0' in generate_latest(registry).decode()
    telemetry.show("team", "bot", before=before, status=after)
    telemetry.show("team", "bot", before=after, status=after)
    text = generate_latest(registry).decode()
    assert 'phase="Progressing"' not in text
    assert (
        'adapterdeployment_completions_total{name="bot",namespace="team",'
        'reason="GuardrailBreached",status="Aborted"} 1.0' in text
    )
    telemetry.forget("team", "bot")
    telemetry.forget("team", "bot")
    assert "{name=" not in generate_latest(registry).decode()

"""Rollouts under real routers' traffic: killed parts, deletion in the middle of a stream, a real Prometheus."""

from __future__ import annotations

import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import aiohttp
import pytest

from finetune_local.cluster import Cluster
from tests.clients import Json, Kubectl
from tests.integration.rollout_lab import Engine
from tests.integration.rollout_operator import BAD, BETTER, GOOD, serves
from tests.integration.rollout_traffic import RealLab, Users
from tests.integration.router.engines import Behaviour
from tests.integration.router.routers import ADMIN_TOKEN
from tests.prometheus_program import scraping
from tests.waiting import wait_until

pytestmark = pytest.mark.integration


@pytest.fixture
def lab(cluster: Cluster, kubectl: Kubectl, tmp_path: Path) -> Iterator[RealLab]:
    made = RealLab(cluster, kubectl, tmp_path)
    with made.running():
        yield made


def canary(*steps: Json) -> Json:
    return {"canary": {"steps": list(steps)}}


@pytest.mark.faults
def test_a_router_that_is_killed_in_a_canary_costs_only_what_it_had_under_way(lab: RealLab) -> None:
    lab.deploy(GOOD)
    lab.wait(serves(GOOD))
    users = Users(lab)
    try:
        lab.deploy(BETTER, strategy=canary({"setWeight": 30}, {"pause": {}}, {"setWeight": 60}))
        lab.wait(lambda s: s.get("phase") == "Paused" and s["weights"]["verified"])
        lab.eventually(lambda: lab.candidate_requests() > 10)
        killed = time.monotonic()
        lab.fronts[0].kill()
        lab.wait(lambda s: s.get("evidenceMissingSince") is not None)
        assert lab.weights()[1] == 30, "the weight is held"
        port, admin = lab.fronts[0].port, lab.fronts[0].admin_port
        lab.fronts[0]._flags[1], lab.fronts[0]._flags[3] = str(port), str(admin)
        lab.fronts[0].start()
        back = time.monotonic()
        lab.annotate("promote/1")
        lab.wait(serves(BETTER))
        time.sleep(1)
    finally:
        users.close()
    assert min(users.answered()[GOOD], users.answered()[BETTER]) > 20
    for reply in users.failures:
        assert (reply.status, reply.front) == (0, 0), reply
        assert reply.sent <= killed, "what was under way at that very router"
    sides: dict[str, set[str]] = {}
    for reply in users.replies:
        if killed <= reply.sent <= back and reply.status == 200:
            sides.setdefault(reply.user, set()).add(reply.revision)
    assert all(len(met) == 1 for met in sides.values()), "users keep their side at the other router"


def test_no_request_fails_while_other_engines_take_over_in_a_canary(lab: RealLab) -> None:
    lab.kill()
    lab.environment["FINETUNE_ENGINE_ENDPOINTS"] = "127.0.0.1"
    lab.start()
    other = Engine(lab.loop)
    other.load_seconds = 3
    other.start()
    served = lab.serve(other)
    steps = canary({"setWeight": 30}, {"pause": {}})
    lab.deploy(GOOD)
    lab.wait(serves(GOOD))
    users = Users(lab)
    try:
        lab.deploy(BETTER, strategy=steps)
        lab.wait(lambda s: s.get("phase") == "Paused" and s["weights"]["verified"])
        lab.deploy(BETTER, strategy=steps, serving={"endpoint": served.url, "agentPort": other.port})
        lab.eventually(lambda: served.served(f"bot--{BETTER}") > 0)
        lab.wait(lambda s: s["weights"]["verified"])
        moved, before = time.monotonic(), served.served(f"bot--{BETTER}")
        lab.eventually(lambda: served.served(f"bot--{BETTER}") > before + 10)
    finally:
        users.close()
        other.stop()
    assert not users.failures
    sides: dict[str, set[str]] = {}
    for reply in users.replies:
        if reply.sent > moved:
            sides.setdefault(reply.user, set()).add(reply.revision)
    assert all(len(met) == 1 for met in sides.values()), "users keep their side at the other engine"


def test_a_stream_that_runs_when_its_deployment_is_deleted_ends_well(lab: RealLab) -> None:
    lab.deploy(GOOD)
    lab.wait(serves(GOOD))
    lab.behave(GOOD, Behaviour(text="one two three four five six seven eight nine ten", chunk_delay=0.5))
    url = f"{lab.fronts[0].url}/v1/chat/completions"
    body = {"model": "bot", "stream": True, "messages": [{"role": "user", "content": "count"}]}

    async def read() -> bytes:
        data = b""
        async with aiohttp.ClientSession() as session, session.post(url, json=body) as answer:
            assert answer.status == 200
            async for piece in answer.content.iter_any():
                if not data:
                    began.append(time.monotonic())
                data += piece
        return data

    began: list[float] = []
    whole: list[bytes] = []
    reading = Thread(target=lambda: whole.append(lab.loop.run(read())), daemon=True)
    reading.start()
    wait_until(lambda: bool(began), seconds=30, what="the stream does not begin")
    lab.kubectl("delete", "adep", "bot")
    gone = {**body, "stream": False}

    async def status() -> int:
        async with aiohttp.ClientSession() as session, session.post(url, json=gone) as answer:
            return answer.status

    lab.eventually(lambda: lab.loop.run(status()) == 404)
    assert reading.is_alive(), "new requests are refused while the stream goes on"
    reading.join(timeout=20)
    assert whole, "the stream broke"
    assert whole[0].rstrip().endswith(b"data: [DONE]")
    assert all(word in whole[0] for word in (b"one ", b"ten "))
    lab.eventually(lambda: lab.engine.unloads == [f"bot--{GOOD}"])


# -- Prometheus


@pytest.fixture
def prometheus(tmp_path: Path, lab: RealLab) -> Iterator[str]:
    """A real Prometheus that scrapes the real routers; its URL."""
    targets = [f"127.0.0.1:{front.admin_port}" for front in lab.fronts]
    with scraping(targets, tmp_path, authorization={"credentials": ADMIN_TOKEN}) as url:
        yield url


FAILED = (
    # A revision without a failure has no such series.
    '(sum(rate(adapter_router_requests_total{alias="{{alias}}",revision="{{candidate}}",code=~"5.."}[10s]))'
    ' or vector(0)) / sum(rate(adapter_router_requests_total{alias="{{alias}}",revision="{{candidate}}"}[10s]))'
)


def measured(address: str, **more: object) -> Json:
    prometheus = {"address": address, "query": FAILED}
    metric = {"name": "failed", "prometheus": prometheus, "successCondition": "result <= 0.1", **more}
    # No other check may decide in its place.
    return {"interval": "1s", "metrics": [metric], "guardrails": [], "dryRun": []}


def test_a_query_over_the_routers_own_metrics_decides(lab: RealLab, prometheus: str) -> None:
    spec: Json = {
        "strategy": canary({"setWeight": 50}, {"analysis": {}}),
        "analysis": measured(prometheus, count=3, failureLimit=1, inconclusiveLimit=60),
        "traffic": {"fallback": {"onCandidateError": "Fail"}},
    }
    lab.deploy(GOOD, **spec)
    lab.wait(serves(GOOD))
    users = Users(lab, rate=30)
    try:
        lab.behave(BAD, Behaviour(status=500))
        lab.deploy(BAD, **spec)
        status = lab.wait(lambda s: s.get("stage") == "Failed")
        assert status["abort"]["reason"] == "MetricFailed"
        check = next(c for c in status["analysis"] if c["name"] == "failed")
        assert check["estimate"] > 0.5, check
        lab.deploy(BETTER, **spec)
        status = lab.wait(serves(BETTER), seconds=120)
        check = next(c for c in status["analysis"] if c["name"] == "failed")
        assert check["measurements"]["successful"] >= 3
    finally:
        users.close()


class Slow(BaseHTTPRequestHandler):
    """Takes longer than a query may."""

    def do_GET(self) -> None:
        time.sleep(15)

    def log_message(self, *_: object) -> None:
        return


@pytest.mark.faults
def test_a_prometheus_that_hangs_holds_up_neither_a_rollback_nor_a_push(lab: RealLab) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    server.daemon_threads = True
    Thread(target=server.serve_forever, daemon=True).start()
    analysis = measured(f"http://127.0.0.1:{server.server_address[1]}", consecutiveErrorLimit=1)
    analysis["guardrails"] = [{"name": "errors", "event": "error"}]
    lab.deploy(GOOD)
    lab.wait(serves(GOOD))
    users = Users(lab, rate=30)
    try:
        lab.deploy(BETTER, strategy=canary({"setWeight": 50}, {"analysis": {}}), analysis=analysis)
        status = lab.wait(lambda s: s.get("phase") == "Paused", seconds=60)
        assert [pause["reason"] for pause in status["pauseConditions"]] == ["MetricsUnavailable"]
        assert "no answer within 10 s" in status["message"]
        lab.behave(BETTER, Behaviour(status=500))
        began = time.monotonic()
        status = lab.wait(lambda s: s.get("stage") == "Failed", seconds=30)
        assert status["abort"]["reason"] == "GuardrailBreached"
        assert time.monotonic() - began < 10
    finally:
        users.close()
        server.shutdown()

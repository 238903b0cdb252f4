"""What a rollout asks and tells the world around it: Prometheus, webhooks, chat rooms, people, the stored routes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_local.cluster import Cluster
from tests.clients import Json, Kubectl
from tests.integration.rollout_operator import BETTER, GOOD, Lab, serves
from tests.integration.rollouts.webhooks import Receiver
from tests.prometheus_program import scraping

pytestmark = pytest.mark.integration


@pytest.fixture
def lab(cluster: Cluster, kubectl: Kubectl, tmp_path: Path, receiver: Receiver) -> Iterator[Lab]:
    made = Lab(cluster, kubectl, tmp_path)
    providers = tmp_path / "alerts.json"
    providers.write_text(json.dumps({"room": f"{receiver.url}/room"}))
    made.environment["FINETUNE_ALERT_PROVIDERS_FILE"] = str(providers)
    with made.running():
        yield made


def canary(*steps: Json) -> Json:
    return {"canary": {"steps": list(steps)}}


# -- webhooks and alerts


def test_webhooks_are_asked_before_and_told_after(lab: Lab, receiver: Receiver) -> None:
    hooks = [
        {"name": name, "type": name, "url": f"{receiver.url}/{name}"}
        for name in ("confirm-rollout", "confirm-traffic-increase", "confirm-promotion", "event")
    ]
    receiver.statuses["/confirm-traffic-increase"] = 403
    lab.deploy(GOOD)
    lab.wait(serves(GOOD))
    lab.deploy(BETTER, strategy=canary({"setWeight": 50}), webhooks=hooks)
    lab.eventually(lambda: len(receiver.at("/confirm-traffic-increase")) >= 2)
    assert lab.status()["weights"]["candidate"] == 0, "nobody said yes"
    receiver.statuses.clear()
    lab.wait(serves(BETTER))
    asked = receiver.at("/confirm-promotion")[0]
    assert (asked["name"], asked["alias"], asked["candidateRevision"]) == ("bot", "bot", BETTER)
    lab.eventually(lambda: "Promoted" in [body["event"]["reason"] for body in receiver.at("/event")])


def test_a_rollback_webhook_and_alerts_by_severity(lab: Lab, receiver: Receiver) -> None:
    receiver.statuses["/rollback"] = 404
    spec: dict[str, Any] = {
        "webhooks": [{"name": "brake", "type": "rollback", "url": f"{receiver.url}/rollback"}],
        "alerts": [
            {"severity": "error", "providerRef": {"name": "room"}},
            {"severity": "info", "providerRef": {"name": "unknown"}},
        ],
    }
    lab.deploy(GOOD)
    lab.wait(serves(GOOD))
    lab.deploy(BETTER, strategy=canary({"setWeight": 10}, {"pause": {}}), **spec)
    lab.wait(lambda s: s.get("weights", {}).get("candidate") == 10)
    lab.eventually(lambda: len(receiver.at("/rollback")) >= 2)
    receiver.statuses.clear()
    status = lab.wait(lambda s: s.get("stage") == "Failed")
    assert status["abort"]["reason"] == "RollbackWebhook"
    lab.eventually(lambda: bool(receiver.at("/room")))
    (alert,) = receiver.at("/room")
    assert "RollbackWebhook" in alert["text"] or "brake" in alert["text"]
    assert alert["attachments"][0]["color"] == "danger"
    lab.eventually(lambda: "AlertNotDelivered" in lab.told(), seconds=60)  # to the unknown one


# -- people


def test_a_verb_is_obeyed_once_and_the_annotation_goes(lab: Lab) -> None:
    lab.deploy(GOOD)
    lab.wait(serves(GOOD))
    lab.deploy(BETTER, strategy=canary({"setWeight": 10}, {"pause": {}}, {"setWeight": 20}, {"pause": {}}))
    lab.wait(lambda s: s.get("phase") == "Paused")
    lab.annotate("promote/0000aaaa")
    status = lab.wait(lambda s: s.get("step", "").startswith("4/4"))
    assert status["lastAction"]["value"] == "promote/0000aaaa"
    lab.eventually(lambda: "finetune.dev/action" not in annotations_of(lab))
    lab.wait(lambda s: not s["lastAction"]["pending"])
    lab.annotate("dance")
    status = lab.wait(lambda s: s["lastAction"]["value"] == "dance")
    assert status["lastAction"]["refused"] is True
    lab.eventually(lambda: "finetune.dev/action" not in annotations_of(lab))
    lab.annotate("abort/1111bbbb")
    assert lab.wait(lambda s: s.get("stage") == "Failed")["abort"]["reason"] == "UserAbort"
    assert all(router.weight("bot") == 0 for router in lab.routers)


def annotations_of(lab: Lab) -> Json:
    found: Json = (lab.kubectl.get("adep", "bot") or {})["metadata"].get("annotations", {})
    return found


# -- evaluation


def test_an_eval_gate_compares_before_any_user_meets_the_candidate(lab: Lab) -> None:
    evaluations = [{"name": "golden", "uri": "file:///data/golden.jsonl"}]
    steps = canary({"evalGate": {"evalRef": "golden", "maxRegression": 0.1}}, {"setWeight": 50})
    lab.engine.scores = {"base-model": 0.5, f"bot--{GOOD}": 0.8, f"bot--{BETTER}": 0.6}
    lab.deploy(GOOD, strategy=steps, evaluations=evaluations)
    lab.wait(serves(GOOD))
    lab.deploy(BETTER, strategy=steps, evaluations=evaluations)
    status = lab.wait(lambda s: s.get("stage") == "Failed")
    assert status["abort"]["reason"] == "EvalGateFailed"
    assert (status["evaluation"]["candidate"], status["evaluation"]["stable"]) == (0.6, 0.8)
    weights = [route.weight for router in lab.routers for _, s in router.applied for route in s.routes]
    assert set(weights) == {0.0}


# -- the stored routes


def stored(lab: Lab) -> Json:
    body = lab.kubectl.get("configmap", "finetune-routes") or {}
    routes: Json = json.loads(body["data"]["routes.json"])
    return routes


def test_the_durable_copy_says_what_the_routers_apply(lab: Lab) -> None:
    lab.deploy(GOOD)
    lab.wait(serves(GOOD))
    snapshot = lab.routers[0].snapshot
    assert snapshot is not None
    assert stored(lab) == snapshot.model_dump(mode="json", by_alias=True, exclude_none=True)


def test_a_durable_copy_that_is_lost_or_edited_is_written_again(lab: Lab) -> None:
    lab.deploy(GOOD)
    lab.wait(serves(GOOD))
    lab.kubectl("delete", "configmap", "finetune-routes")
    lab.deploy(BETTER, name="second")
    lab.wait(serves(BETTER), name="second")
    assert [route["alias"] for route in stored(lab)["routes"]] == ["bot", "second"]
    version = stored(lab)["version"]
    edit = {"data": {"routes.json": json.dumps({"version": version + 100})}}
    lab.kubectl("patch", "configmap", "finetune-routes", "--type=merge", "-p", json.dumps(edit))
    lab.deploy(GOOD, name="third")
    lab.wait(serves(GOOD), name="third")
    assert [route["alias"] for route in stored(lab)["routes"]] == ["bot", "second", "third"]
    assert stored(lab)["version"] > version + 100
    for router in lab.routers:
        versions = [snapshot.version for _, snapshot in router.applied]
        assert versions == sorted(set(versions))
        assert router.snapshot is not None
        assert len(router.snapshot.routes) == 3


def test_routers_that_are_ahead_of_the_durable_copy_are_never_sent_back(lab: Lab) -> None:
    """The API server was gone when the last routes were pushed, and then the operator died."""
    lab.deploy(GOOD)
    lab.wait(serves(GOOD))
    old = json.dumps(stored(lab))
    lab.deploy(BETTER, strategy=canary({"setWeight": 30}, {"pause": {}}))
    lab.wait(lambda s: s.get("phase") == "Paused" and s["weights"]["candidate"] == 30)
    lab.kill()
    patch = json.dumps({"data": {"routes.json": old}})
    lab.kubectl("patch", "configmap", "finetune-routes", "--type=merge", "-p", patch)
    before = [router.snapshot for router in lab.routers]
    lab.start()
    lab.eventually(lambda: stored(lab)["version"] > (before[0].version if before[0] else 0))
    time.sleep(1)
    for router in lab.routers:
        assert router.weight("bot") == 30
        assert all(snapshot.routes[0].weight == 30 for _, snapshot in router.applied[-2:])


def test_many_deployments_share_snapshots_and_all_are_verified(lab: Lab) -> None:
    for number in range(12):
        lab.engine.max_loras = 99
        lab.deploy(f"{number:08x}", name=f"bot{number}")
    for number in range(12):
        lab.wait(serves(f"{number:08x}"), name=f"bot{number}", seconds=60)
    snapshot = lab.routers[1].snapshot
    assert snapshot is not None
    assert len(snapshot.routes) == 12
    assert len(lab.routers[1].applied) < 12 * 3, "changes of one moment share a snapshot"


# -- Prometheus


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[str]:
    """A real Prometheus that scrapes itself; its URL."""
    with scraping([], tmp_path) as url:
        yield url


def metric(address: str, query: str, **more: Any) -> Json:
    return {
        "interval": "1s",
        "metrics": [
            {
                "name": "number",
                "prometheus": {"address": address, "query": query},
                "successCondition": "result <= 1",
                **more,
            }
        ],
    }


def tally(status: Json) -> Json:
    found: Json = next((c for c in status.get("analysis", []) if c["kind"] == "Metric"), {})
    return found


def roll_out(lab: Lab, analysis: Json, until: Callable[[Json], bool]) -> Json:
    lab.deploy(GOOD)
    lab.wait(serves(GOOD))
    lab.deploy(BETTER, analysis=analysis, strategy=canary({"setWeight": 50}, {"analysis": {}}))
    return lab.wait(until, seconds=45)


def test_a_metric_that_holds_promotes(lab: Lab, prometheus: str) -> None:
    status = roll_out(lab, metric(prometheus, "vector(0.5)", count=2), serves(BETTER))
    assert tally(status)["measurements"]["successful"] >= 2
    assert tally(status)["estimate"] == 0.5


def test_a_metric_that_fails_rolls_back(lab: Lab, prometheus: str) -> None:
    named = f'label_replace(vector(1), "a", "{BETTER}", "", "")'
    query = '3 * count(absent(nothing{a="{{candidate}}"}) and on(a) ' + named + ")"
    analysis = metric(prometheus, query, failureLimit=1)
    status = roll_out(lab, analysis, lambda s: s.get("stage") == "Failed")
    assert status["abort"]["reason"] == "MetricFailed"


@pytest.mark.parametrize("query", ["vector(0) / 0", "nothing_has_this_name", "vector(1) / 0"])
def test_nan_and_nothing_never_roll_back(lab: Lab, prometheus: str, query: str) -> None:
    status = roll_out(
        lab, metric(prometheus, query, inconclusiveLimit=2), lambda s: s.get("phase") == "Paused"
    )
    assert [pause["reason"] for pause in status["pauseConditions"]] == ["InconclusiveAnalysis"]
    assert status["weights"]["candidate"] == 50
    assert tally(status)["measurements"]["inconclusive"] >= 3
    assert "NaN" not in json.dumps(status)


def test_a_prometheus_that_is_away_holds(lab: Lab) -> None:
    analysis = metric("http://127.0.0.1:9", "up", consecutiveErrorLimit=1)
    status = roll_out(lab, analysis, lambda s: s.get("phase") == "Paused")
    assert [pause["reason"] for pause in status["pauseConditions"]] == ["MetricsUnavailable"]
    assert tally(status)["measurements"]["error"] >= 2

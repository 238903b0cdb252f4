"""What a rollout does when the operator can neither read nor write, or is not allowed to: nothing is lost or leaked."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from finetune_local.cluster import Cluster
from tests.clients import Json, Kubectl
from tests.integration.rollout_lab import Engine
from tests.integration.rollout_operator import BAD, BETTER, GOOD, Lab, deployment, serves

pytestmark = [pytest.mark.integration, pytest.mark.faults]

WAITS = {"canary": {"steps": [{"setWeight": 30}, {"pause": {}}]}}


@pytest.fixture
def lab(cluster: Cluster, kubectl: Kubectl, tmp_path: Path) -> Iterator[Lab]:
    made = Lab(cluster, kubectl, tmp_path, routers=3)
    with made.running():
        yield made


def canary(lab: Lab, broken: list[str]) -> None:
    """A candidate at 30 percent that fails as soon as its revision is in `broken`, and some evidence of good times."""
    lab.deploy(GOOD)
    lab.wait(serves(GOOD))
    lab.send(lambda revision: revision in broken, rate=150)
    lab.deploy(BAD, strategy=WAITS)
    lab.wait(lambda s: s.get("phase") == "Paused" and s["weights"]["verified"])
    lab.eventually(lambda: lab.candidate_requests() > 20)


def weights(lab: Lab) -> list[float | None]:
    return [router.weight("bot") for router in lab.routers]


# ---------------------------------------------------------------- harm while the API server is away


def test_harm_leaves_all_routers_while_the_api_server_is_away_and_is_recorded_afterwards(lab: Lab) -> None:
    broken: list[str] = []
    canary(lab, broken)
    lab.stop_api_server()
    try:
        time.sleep(3)
        assert weights(lab) == [30, 30, 30]
        broken.append(BAD)
        began = time.monotonic()
        lab.eventually_offline(lambda: weights(lab) == [0, 0, 0])
        print(
            f"first bad answer to weight 0 on all routers without an API server: {time.monotonic() - began:.1f} s"
        )
        version = lab.routers[0].version
        broken.clear()
        time.sleep(5)
        assert weights(lab) == [0, 0, 0]
        assert {router.version for router in lab.routers} == {version}, "it does not flap"
    finally:
        lab.start_api_server()
    status = lab.wait(lambda s: s.get("stage") == "Failed", seconds=60)
    assert status["abort"]["reason"] == "GuardrailBreached"
    assert "when the status could not be written" in status["abort"]["message"]
    assert status["abort"]["weight"] == 30
    assert weights(lab) == [0, 0, 0]
    stored = json.loads((lab.kubectl.get("configmap", "finetune-routes") or {})["data"]["routes.json"])
    assert stored["routes"][0]["weight"] == 0
    for router in lab.routers:
        versions = [snapshot.version for _, snapshot in router.applied]
        assert versions == sorted(set(versions))
        after = [snapshot.routes[0].weight for _, snapshot in router.applied if snapshot.version >= version]
        assert set(after) == {0}
    assert lab.failed_requests == 0
    lab.eventually(lambda: lab.told().count("GuardrailBreached") == 1)


def test_an_operator_that_is_killed_in_the_outage_finds_the_harm_again(lab: Lab) -> None:
    broken: list[str] = []
    canary(lab, broken)
    lab.stop_api_server()
    try:
        broken.append(BAD)
        lab.eventually_offline(lambda: weights(lab) == [0, 0, 0])
        lab.kill()
        time.sleep(1)
        assert weights(lab) == [0, 0, 0], "routers keep what they have"
        for router in lab.routers:
            router.applied.clear()
    finally:
        lab.start_api_server()
    lab.start()
    status = lab.wait(lambda s: s.get("stage") == "Failed", seconds=60)
    assert status["abort"]["reason"] == "GuardrailBreached"
    assert weights(lab) == [0, 0, 0]
    assert {route.weight for router in lab.routers for _, s in router.applied for route in s.routes} <= {0}


def test_a_status_that_cannot_be_written_does_not_keep_harm_in_the_route(lab: Lab) -> None:
    """The API server answers and refuses: here, because somebody took the operator's right to write away."""
    broken: list[str] = []
    canary(lab, broken)
    role = json.loads(lab.kubectl("get", "clusterrole", "finetune-operator", "-o", "json"))
    rules = [rule for rule in role["rules"] if rule["resources"] != ["adapterdeployments/status"]]
    assert len(rules) == len(role["rules"]) - 1
    try:
        lab.kubectl("replace", "-f", "-", body={**_bare(role), "rules": rules})
        broken.append(BAD)
        lab.eventually(lambda: weights(lab) == [0, 0, 0])
        assert lab.status()["weights"]["candidate"] == 30, "it is not recorded"
    finally:
        lab.kubectl("replace", "-f", "-", body=_bare(role))
    status = lab.wait(lambda s: s.get("stage") == "Failed", seconds=90)
    assert status["abort"]["reason"] == "GuardrailBreached"


def _bare(body: Json) -> Json:
    return {
        "apiVersion": body["apiVersion"],
        "kind": body["kind"],
        "metadata": {"name": body["metadata"]["name"]},
        "rules": body["rules"],
    }


# ---------------------------------------------------------------- what was announced and not told


def test_what_a_killed_operator_has_announced_is_told_by_the_next_one_and_once(lab: Lab) -> None:
    lab.deploy(GOOD)
    lab.wait(serves(GOOD))
    lab.eventually(lambda: "Promoted" in lab.told())
    lab.kill()
    before = lab.told()
    lost = {
        "name": "bot.0123456789abcdef",
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "severity": "warn",
        "reason": "SampleRatioMismatch",
        "message": "as if it had died between the write and the Event",
    }
    waiting = [*lab.status().get("announcements", []), lost]
    patch = json.dumps({"status": {"announcements": waiting}})
    lab.kubectl("patch", "adep", "bot", "--subresource=status", "--type=merge", "-p", patch)
    for _ in range(2):
        lab.start()
        lab.eventually(lambda: "SampleRatioMismatch" in lab.told())
        time.sleep(2)
        lab.kill()
    assert lab.told() == sorted([*before, "SampleRatioMismatch"])


# ---------------------------------------------------------------- engines that may not be asked


def test_the_token_goes_to_no_engine_that_is_not_allowed(lab: Lab) -> None:
    stranger = Engine(lab.loop)
    stranger.start()
    try:
        serving = {"endpoint": stranger.url, "agentPort": stranger.port}
        lab.deploy(GOOD, serving=serving)
        status = lab.wait(lambda s: s.get("reason") == "EndpointNotAllowed")
        for part in ("spec.serving.endpoint", stranger.url, "FINETUNE_ENGINE_ENDPOINTS"):
            assert part in status["message"]
        (condition,) = [c for c in status["conditions"] if c["type"] == "InvalidSpec"]
        assert (condition["status"], condition["reason"]) == ("True", "EndpointNotAllowed")
        time.sleep(2)
        assert stranger.asked == 0
        lab.kill()
        lab.environment["FINETUNE_ENGINE_ENDPOINTS"] = "127.0.0.1"
        lab.start()
        lab.wait(serves(GOOD))
        assert stranger.has(f"bot--{GOOD}")
    finally:
        stranger.stop()


# ---------------------------------------------------------------- routes that do not fit


def test_routes_that_are_too_many_bytes_are_served_and_said(lab: Lab) -> None:
    def large(name: str, revision: str) -> None:
        schema: Json = {"type": "object", "description": "x" * 600_000}
        spec: dict[str, Any] = {"traffic": {"outputSchema": schema}}
        lab.kubectl("apply", "--server-side", "-f", "-", body=deployment(name, revision, **spec))

    large("bot", GOOD)
    lab.wait(serves(GOOD))
    large("second", BETTER)
    status = lab.wait(lambda s: "NotStored" in json.dumps(s), name="second", seconds=60)
    (condition,) = [c for c in status["conditions"] if c["type"] == "RoutesStored"]
    assert condition["status"] == "False"
    for part in ("1048576", "2 aliases", "spec.traffic.outputSchema"):
        assert part in condition["message"]
    lab.wait(serves(BETTER), name="second")
    assert all(router.route("second") is not None for router in lab.routers), "users are served all the same"
    lab.kubectl("delete", "adep", "second")
    lab.wait(lambda s: "NotStored" not in json.dumps(s["conditions"]), seconds=60)
    stored = json.loads((lab.kubectl.get("configmap", "finetune-routes") or {})["data"]["routes.json"])
    assert [route["alias"] for route in stored["routes"]] == ["bot"]

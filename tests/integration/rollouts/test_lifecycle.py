"""Rollouts on a real API server, by a real operator process, with simulated engines and routers."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta

import pytest

from finetune_operator.api.routes import Route, Snapshot
from tests.clients import Json
from tests.integration.rollout_lab import Router
from tests.integration.rollout_operator import BAD, BETTER, GOOD, Lab, serves, training

pytestmark = pytest.mark.integration


def test_the_first_adapter_serves_without_steps(lab: Lab) -> None:
    lab.deploy(GOOD)
    status = lab.wait(serves(GOOD))
    assert lab.engine.loads == [f"bot--{GOOD}"]
    for router in lab.routers:
        route = router.route("bot")
        assert route is not None
        assert route.stable is not None
        assert route.stable.served_name == f"bot--{GOOD}"
        assert route.candidate is None
        assert [base.name for base in router.snapshot.base_models] == ["base-model"]  # type: ignore[union-attr]
    assert status["weights"]["verified"] is True
    assert status["completionStatus"] == "Promoted"


def test_a_better_adapter_is_canaried_and_promoted(lab: Lab) -> None:
    lab.deploy(GOOD)
    lab.wait(serves(GOOD))
    lab.send()
    lab.deploy(BETTER)
    lab.wait(lambda s: s.get("weights", {}).get("candidate") == 50 and s["weights"]["verified"])
    status = lab.wait(serves(BETTER))
    (guardrail,) = [check for check in status["analysis"] if check["kind"] == "Guardrail"]
    assert min(guardrail["n"]["stable"], guardrail["n"]["candidate"]) > 20
    assert status["sampleRatio"]["eValue"] == next(
        check["eValue"] for check in status["analysis"] if check["kind"] == "SampleRatio"
    )
    assert [entry["completionStatus"] for entry in status["history"]] == ["Promoted", "Promoted"]
    assert lab.failed_requests == 0


def test_an_adapter_that_fails_is_rolled_back_on_all_routers_at_once(lab: Lab) -> None:
    lab.deploy(GOOD)
    lab.wait(serves(GOOD))
    lab.send(lambda revision: revision == BAD, rate=50)
    canary = {"steps": [{"setWeight": 20}, {"pause": {}}], "abortScaleDownDelaySeconds": 5}
    lab.deploy(BAD, strategy={"canary": canary})
    lab.eventually(lambda: any(router.weight("bot") for router in lab.routers))
    began = time.monotonic()
    status = lab.wait(lambda s: s.get("stage") == "Failed")
    assert status["abort"]["reason"] == "GuardrailBreached"
    assert status["phase"] == "Degraded"
    assert status["stableRevision"] == GOOD
    (guardrail,) = [check for check in status["analysis"] if check["kind"] == "Guardrail"]
    assert guardrail["phase"] == "Failed"
    assert guardrail["eValue"] >= guardrail["threshold"]
    decided = lab.log_time(r"bot: GuardrailBreached")
    withdrawn = [
        next(at for at, snapshot in router.applied if at > began and route_of(snapshot).weight == 0)
        for router in lab.routers
    ]
    assert max(withdrawn) - min(withdrawn) < 0.5
    assert max(withdrawn) - began < 8, "from the first bad answers to weight 0 everywhere"
    assert max(withdrawn) - decided < 1, "from the decision to weight 0 everywhere"
    print(f"first bad answer to weight 0 on all routers: {max(withdrawn) - began:.2f} s")
    lab.wait(lambda s: [a["revision"] for a in s["adapters"]] == [GOOD], seconds=60)
    assert lab.engine.unloads == [f"bot--{BAD}"]
    lab.deploy(BETTER)
    lab.wait(serves(BETTER))


def test_an_operator_that_is_killed_in_mid_rollout_goes_on_where_it_was(lab: Lab) -> None:
    lab.deploy(GOOD)
    lab.wait(serves(GOOD))
    lab.send(rate=100)
    lab.deploy(BETTER, strategy={"canary": {"steps": [{"setWeight": 30}, {"pause": {}}, {"setWeight": 60}]}})
    before = lab.wait(lambda s: s.get("phase") == "Paused" and s.get("step", "").startswith("2/3"))
    time.sleep(2)  # some evidence
    counted = lab.candidate_requests()
    routes = [router.route("bot") for router in lab.routers]
    lab.kill()
    time.sleep(2)
    assert [router.route("bot") for router in lab.routers] == routes, "routers go on without an operator"
    for router in lab.routers:
        router.applied.clear()
    lab.start()
    lab.eventually(lambda: lab.candidate_requests() > counted)
    after = lab.status()
    assert (after["stage"], after["currentStepIndex"]) == (before["stage"], before["currentStepIndex"])
    assert after["rolloutStartTime"] == before["rolloutStartTime"]
    assert [router.route("bot") for router in lab.routers] == routes, "same weight, same users"
    lab.annotate("promote/1")
    lab.wait(serves(BETTER))
    for router in lab.routers:
        assert all(route_of(snapshot).stable is not None for _, snapshot in router.applied)
    assert lab.engine.loads == [f"bot--{GOOD}", f"bot--{BETTER}"], "nothing was loaded twice"
    assert lab.failed_requests == 0


def test_the_operator_may_be_killed_at_any_moment(lab: Lab) -> None:
    lab.deploy(GOOD)
    lab.wait(serves(GOOD))
    lab.send(rate=50)
    lab.deploy(BETTER)
    for pause in (1.5, 2.0, 2.5, 3.0, 3.5):
        time.sleep(pause)
        lab.kill()
        lab.start()
    status = lab.wait(serves(BETTER), seconds=60)
    assert [entry["completionStatus"] for entry in status["history"]] == ["Promoted", "Promoted"]
    assert lab.engine.loads == [f"bot--{GOOD}", f"bot--{BETTER}"]
    for router in lab.routers:
        versions = [snapshot.version for _, snapshot in router.applied]
        assert versions == sorted(set(versions))
        aliases = [[route.alias for route in snapshot.routes] for _, snapshot in router.applied]
        assert aliases[next(i for i, a in enumerate(aliases) if a) :].count([]) == 0, "an alias was lost"
    lab.eventually(lambda: lab.told().count("Promoted") == 2)
    told = lab.told()
    once = {"RolloutStarted": 2, "Promoting": 2, "Promoted": 2, "CanaryPauseStep": 1}
    assert {reason: told.count(reason) for reason in once} == once, "nothing is lost and nothing told twice"
    assert lab.failed_requests == 0


def test_a_router_that_comes_back_or_comes_new_gets_the_newest_routes(lab: Lab) -> None:
    lab.routers[1].stop()
    lab.deploy(GOOD)
    lab.eventually(lambda: lab.routers[0].weight("bot") is not None)
    lab.eventually(lambda: lab.engine.has(f"bot--{GOOD}"))
    status = lab.wait(lambda s: s.get("stableRevision") == GOOD)
    assert not status["weights"]["verified"], "a router that cannot be reached has not confirmed"
    lab.routers[1].start()  # added
    lab.wait(serves(GOOD))
    assert lab.routers[1].route("bot") == lab.routers[0].route("bot")

    lab.routers[0].stop()
    lab.routers[0].forget()  # a new pod in its place
    lab.routers[0].start()
    lab.eventually(lambda: lab.routers[0].route("bot") == lab.routers[1].route("bot"), seconds=30)


def test_a_router_that_lies_holds_the_rollout(lab: Lab) -> None:
    lab.deploy(GOOD)
    lab.wait(serves(GOOD))
    lab.send(rate=50)
    lab.routers[1].claims = 0  # it says that it applies nothing
    lab.deploy(BETTER)
    lab.wait(lambda s: s.get("reason") == "RoutersBehind")
    time.sleep(3)
    assert lab.status()["stableRevision"] == GOOD
    lab.routers[1].claims = None
    lab.wait(serves(BETTER))


def test_counters_that_make_no_sense_count_as_none(lab: Lab) -> None:
    lab.deploy(GOOD)
    lab.wait(serves(GOOD))
    lab.send(rate=50)
    lab.routers[1].garbage = b'{"instance": "x", "version": 99, "epochs": [{"epoch": "e", "arms": NaN}]}'
    steps = [{"setWeight": 50}, {"pause": {"duration": "20s"}}]  # longer than a silence that is borne
    lab.deploy(BETTER, strategy={"canary": {"steps": steps}})
    status = lab.wait(lambda s: bool(s.get("evidenceMissingSince")), seconds=60)
    assert status["stableRevision"] == GOOD
    over = datetime.fromisoformat(status["stepStartTime"]) + timedelta(seconds=20 + 3)
    time.sleep(max(0, (over - datetime.now(UTC)).total_seconds()))
    assert lab.status()["weights"]["candidate"] == 50, "held"
    lab.routers[1].garbage = None
    lab.wait(serves(BETTER), seconds=60)


def test_an_engine_that_restarts_gets_no_requests_until_it_has_its_adapters_again(lab: Lab) -> None:
    lab.deploy(GOOD)
    lab.wait(serves(GOOD))
    lab.deploy(BETTER, strategy={"canary": {"steps": [{"setWeight": 30}, {"pause": {"duration": "4s"}}]}})
    lab.wait(lambda s: s.get("weights", {}).get("candidate") == 30 and s["weights"]["verified"])
    lab.engine.restart(seconds=4)
    lab.eventually(lambda: stable_upstreams(lab.routers[0]) == ())
    held = lab.wait(lambda s: condition(s, "AdaptersLoaded") == "False")
    assert held["stage"] == "Canary"
    assert condition(held, "MetricsAvailable") != "False", "routers are heard all the time"
    status = lab.wait(serves(BETTER))
    assert status["completionStatus"] == "Promoted"
    assert stable_upstreams(lab.routers[0]) != ()


def test_traffic_goes_on_while_the_api_server_is_away(lab: Lab) -> None:
    lab.deploy(GOOD)
    lab.wait(serves(GOOD))
    lab.send(rate=50)
    lab.deploy(BETTER, strategy={"canary": {"steps": [{"setWeight": 30}, {"pause": {"duration": "3s"}}]}})
    lab.wait(lambda s: s.get("weights", {}).get("candidate") == 30 and s["weights"]["verified"])
    routes = [router.route("bot") for router in lab.routers]
    lab.stop_api_server()
    time.sleep(15)
    assert [router.route("bot") for router in lab.routers] == routes
    assert lab.is_alive(), lab.log()[-3000:]
    lab.start_api_server()
    lab.wait(serves(BETTER), seconds=60)
    assert lab.failed_requests == 0


def test_edits_in_mid_rollout_are_followed_and_never_overwritten(lab: Lab) -> None:
    lab.deploy(GOOD)
    lab.wait(serves(GOOD))
    steps = [{"setWeight": 10}, {"pause": {"duration": "3s"}}, {"setWeight": 60}]
    lab.deploy(BAD, strategy={"canary": {"steps": steps}})
    stop = threading.Event()

    def edit() -> None:
        number = 0
        while not stop.wait(0.05):
            number += 1
            lab.kubectl("label", "adep", "bot", f"edited=n{number}", "--overwrite")

    editor = threading.Thread(target=edit)
    editor.start()
    try:
        lab.wait(lambda s: s.get("weights", {}).get("candidate") == 10)
        lab.deploy(BETTER, strategy={"canary": {"steps": steps}})  # supersedes
        status = lab.wait(serves(BETTER), seconds=60)
    finally:
        stop.set()
        editor.join()
    assert [entry["completionStatus"] for entry in status["history"]] == [
        "Promoted",
        "Superseded",
        "Promoted",
    ]


def test_what_is_deleted_gets_no_requests_and_leaves_nothing_in_the_engines(lab: Lab) -> None:
    lab.engine.adapters["other--12345678"] = {"name": "other--12345678", "digest": "x", "state": "Loaded"}
    lab.deploy(GOOD)
    lab.wait(serves(GOOD))
    lab.deploy(BETTER, strategy={"canary": {"steps": [{"setWeight": 10}, {"pause": {}}]}})
    lab.wait(lambda s: s.get("phase") == "Paused")
    lab.kubectl("wait", "--for=create", "configmap/bot-evidence", "--timeout=10s")
    lab.kubectl("delete", "adep", "bot")
    lab.eventually(lambda: all(router.route("bot") is None for router in lab.routers))
    lab.eventually(lambda: set(lab.engine.adapters) == {"other--12345678"})
    lab.kubectl("wait", "--for=delete", "configmap/bot-evidence", "--timeout=30s")
    assert "adapterdeployment_info{" not in lab.metrics()


def test_what_is_deleted_while_the_operator_is_away_is_cleaned_up_as_well(lab: Lab) -> None:
    lab.deploy(GOOD)
    lab.deploy(BETTER, name="other")
    lab.wait(serves(GOOD))
    lab.wait(serves(BETTER), name="other")
    lab.kill()
    lab.kubectl("delete", "adep", "bot")
    lab.start()
    lab.eventually(lambda: all(router.route("bot") is None for router in lab.routers))
    lab.eventually(lambda: set(lab.engine.adapters) == {f"other--{BETTER}"})
    assert all(router.route("other") is not None for router in lab.routers)


def test_an_alias_belongs_to_whoever_had_it_first(lab: Lab) -> None:
    lab.deploy(GOOD)
    lab.wait(serves(GOOD))
    lab.deploy(BETTER, name="thief", alias="bot")
    status = lab.wait(lambda s: bool(s.get("reason")), name="thief")
    assert lab.kubectl.namespace + "/bot" in status["message"]
    assert stable_revision(lab.routers[0]) == GOOD
    lab.kubectl("delete", "adep", "bot")
    lab.wait(serves(BETTER), name="thief")
    assert stable_revision(lab.routers[0]) == BETTER


def test_a_deployment_of_a_job_begins_when_the_job_has_succeeded(lab: Lab) -> None:
    lab.deploy(GOOD, adapter={"fineTuneJobRef": {"name": "tickets"}})
    lab.wait(lambda s: s.get("reason") == "FineTuneJobNotFound")
    lab.kubectl.apply(training("tickets"))
    lab.wait(lambda s: s.get("reason") == "WaitingForFineTuneJob")
    lab.end_job("tickets", "d" * 8)
    status = lab.wait(serves("d" * 8), seconds=10)  # woken: it does not wait for the next look
    assert status["history"][0]["fineTuneJob"] == "tickets"


def test_metrics_tell_the_rollout(lab: Lab) -> None:
    lab.deploy(GOOD)
    lab.wait(serves(GOOD))
    lab.send()
    lab.deploy(BETTER, strategy={"canary": {"steps": [{"setWeight": 50}, {"pause": {}}]}})
    lab.wait(lambda s: s.get("phase") == "Paused")
    of = f'name="bot",namespace="{lab.kubectl.namespace}"'
    lab.eventually(lambda: f'adapterdeployment_analysis_evalue{{metric="errors",{of}}}' in lab.metrics())
    text = lab.metrics()
    for line in (
        f'adapterdeployment_info{{{of},phase="Paused",stage="Canary"}} 1.0',
        f'adapterdeployment_weight{{arm="candidate",{of}}} 50.0',
        f"adapterdeployment_step_index{{{of}}} 1.0",
        f'adapterdeployment_completions_total{{{of},reason="",status="Promoted"}} 1.0',
        f'adapterdeployment_adapter_loaded{{{of},replica="http://127.0.0.1:9",revision="{BETTER}"}} 1.0',
    ):
        assert line in text, text


def condition(status: Json, kind: str) -> str | None:
    return next((c["status"] for c in status.get("conditions", []) if c["type"] == kind), None)


def route_of(snapshot: Snapshot) -> Route:
    (route,) = [route for route in snapshot.routes if route.alias == "bot"]
    return route


def stable_upstreams(router: Router) -> tuple[str, ...]:
    route = router.route("bot")
    return route.stable.upstreams if route and route.stable else ()


def stable_revision(router: Router) -> str | None:
    route = router.route("bot")
    return route.stable.revision if route and route.stable else None

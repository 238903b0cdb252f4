"""The API server refuses, is slow, loses answers, cuts watches, and goes away: jobs still end as they should."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.rayjob_player import Story
from finetune_local.cluster import Cluster
from finetune_operator.manifests import naming
from tests.clusters import pid_of
from tests.integration.api_proxy import ApiProxy, Fault, Kind
from tests.integration.operators import PARTS, Operator, Stage, compact
from tests.integration.test_kills import check, ending_of, quick_retries
from tests.waiting import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.faults]

LATE_SECONDS = 4.0  # by which watches are behind
NOTICED_SECONDS = 80.0  # an active job is looked at every minute
AWAY_SECONDS = float(os.environ.get("FINETUNE_TEST_AWAY_SECONDS", "60"))


@pytest.fixture
def story() -> Story:
    return ending_of


@pytest.fixture
def operator(proxy: ApiProxy, stage: Stage, tmp_path: Path) -> Iterator[Operator]:
    running = Operator(tmp_path / "operator", proxy.kubeconfig, stage.kubectl.namespace)
    running.start()
    try:
        running.wait_healthy()
        yield running
        assert running.is_alive(), running.log()[-3000:]
    finally:
        running.kill()


NAMES = [f"{kind}-{number}" for number in range(4) for kind in ("well", "lost", "bad")]
OWN = r"(finetunejobs|rayjobs|configmaps|events|pods|rayclusters|tokenreviews|apis/ray.io/v1$)"


@pytest.mark.parametrize(
    "fault",
    [
        Fault(Kind.REFUSE, OWN, status=429, chance=0.3),
        Fault(Kind.REFUSE, OWN, status=500, chance=0.3),
        Fault(Kind.REFUSE, r"^(POST|PATCH|PUT|DELETE) .*" + OWN, status=409, chance=0.3),
        Fault(Kind.DROP, OWN, chance=0.3),
        Fault(Kind.LOSE, r"^(POST|PATCH|PUT|DELETE) .*" + OWN, chance=0.3),
        Fault(Kind.DELAY, OWN, seconds=1.0, chance=0.3),
    ],
    ids=["429", "500", "409", "dropped", "answers-lost", "slow"],
)
def test_a_third_of_all_requests_goes_wrong(
    fault: Fault, operator: Operator, proxy: ApiProxy, stage: Stage
) -> None:
    proxy.add(fault)
    stage.apply(*NAMES, **quick_retries(""))
    check(stage, NAMES, seconds=240)
    assert fault.hits > 10


@pytest.mark.parametrize("status", [403, 404, 413])
def test_a_status_that_is_refused_is_one_line_of_the_log(
    status: int, operator: Operator, proxy: ApiProxy, stage: Stage
) -> None:
    """A right that is missing, an object that went meanwhile: where it was asked for says nothing to people."""
    proxy.add(fault := Fault(Kind.REFUSE, r"^PATCH .*finetunejobs", status=status, times=4))
    stage.apply("well-refused", "lost-refused")
    check(stage, ["well-refused", "lost-refused"], seconds=60)
    assert fault.hits == 4
    assert "has to wait" in operator.log()
    assert "Traceback" not in operator.log()


@pytest.mark.parametrize("gone", [False, True], ids=["cut", "410-gone"])
def test_watches_end_again_and_again(gone: bool, operator: Operator, proxy: ApiProxy, stage: Stage) -> None:
    cut = 0
    for number in range(5):
        stage.apply(f"well-{number}", f"lost-{number}", **quick_retries(""))
        time.sleep(0.5)
        cut += proxy.cut_watches(gone=gone)
    check(stage, [f"{kind}-{number}" for number in range(5) for kind in ("well", "lost")], seconds=120)
    assert cut > 5


def test_the_api_server_is_away(operator: Operator, proxy: ApiProxy, stage: Stage) -> None:
    stage.apply("well-before", "lost-before", **quick_retries(""))
    wait_until(lambda: len(stage.rayjobs_ever()) == 2, seconds=30)
    proxy.away.set()
    stage.apply("well-meanwhile")
    time.sleep(AWAY_SECONDS)
    assert operator.get("/healthz") == "ok\n", "it is not the operator's fault"
    log = operator.log()
    assert "Request attempt #4/" in log, "Kopf's watches are told"
    assert "Request attempt #5/" not in log, "and not each time"
    proxy.away.clear()
    check(stage, ["well-before", "lost-before", "well-meanwhile"], seconds=120)


def test_the_api_server_and_etcd_are_killed_and_etcd_forgets_its_past(
    api: Cluster, operator: Operator, stage: Stage
) -> None:
    """After a compaction a watch that goes on from before gets 410 Gone from the real server."""
    stage.apply("well-before", "lost-before", **quick_retries(""))
    wait_until(lambda: len(stage.rayjobs_ever()) == 2, seconds=30)
    for part in ("kube-apiserver", "etcd"):
        os.kill(pid_of(api, part), signal.SIGKILL)
    time.sleep(2)
    api.up(PARTS)
    compact(api)
    stage.apply("well-after")
    check(stage, ["well-before", "lost-before", "well-after"], seconds=180)


# ---------------------------------------------------------------- watches that are behind


@pytest.fixture
def late(proxy: ApiProxy, operator: Operator) -> Fault:
    """What the operator hears of is seconds old; what it asks for is not."""
    return proxy.add(Fault(Kind.HOLD, seconds=LATE_SECONDS))


def check_owners(stage: Stage) -> None:
    """No RayJob was created twice, and none is left whose job is gone."""
    assert stage.created_twice() == {}

    def orphans() -> set[str]:
        jobs = {body["metadata"]["uid"] for body in stage.kubectl.items("finetunejobs")}
        owners = {body["metadata"]["ownerReferences"][0]["uid"] for body in stage.kubectl.items("rayjobs")}
        return owners - jobs

    wait_until(lambda: not orphans(), seconds=60, what="RayJobs of jobs that are gone")


def test_jobs_are_suspended_and_resumed_while_watches_are_late(late: Fault, stage: Stage) -> None:
    names = ["held-0", "held-1"]
    stage.apply(*names, **quick_retries(""))
    for name in names:
        stage.reached(name, "Running")
    pace, stage.player.pace = stage.player.pace, 60.0  # no attempt is over while kubectl is slow
    for wanted in (True, False, True, False, True):
        for name in names:
            stage.suspend(name, wanted)
        time.sleep(1)
    for name in names:
        stage.reached(name, "Suspended")
    stage.player.pace = pace
    for name in names:
        stage.suspend(name, False)
    check(stage, names, seconds=120)
    check_owners(stage)
    assert late.hits > 0


def test_jobs_take_the_names_of_deleted_ones_while_watches_are_late(late: Fault, stage: Stage) -> None:
    names = ["well-0", "lost-0", "late-0"]
    for _ in range(4):
        stage.apply(*names, **quick_retries(""))
        time.sleep(1.5)
        stage.kubectl("delete", "ftj", *names, "--wait=false")
    stage.apply(*names, **quick_retries(""))
    statuses = stage.finished(*names, seconds=120)
    assert {name: statuses[name]["phase"] for name in names} == dict.fromkeys(names, "Succeeded")
    check_owners(stage)


def test_answers_to_creations_are_lost_while_watches_are_late(
    late: Fault, proxy: ApiProxy, stage: Stage
) -> None:
    lost = proxy.add(Fault(Kind.LOSE, r"^POST .*/rayjobs", chance=0.7))
    names = [f"{kind}-{number}" for number in range(3) for kind in ("well", "lost", "late")]
    stage.apply(*names, **quick_retries(""))
    check(stage, names, seconds=240)
    check_owners(stage)
    assert lost.hits > 3


# ---------------------------------------------------------------- what no watch tells


def test_what_is_deleted_where_no_watch_sees_it_is_missed_within_the_resync(
    operator: Operator, proxy: ApiProxy, stage: Stage
) -> None:
    """After 410 Gone a list says what there is, and nobody says what there is no more."""
    stage.apply("torn-0", "dropped-0", "waiting-0", **quick_retries(""))
    for name in ("torn-0", "dropped-0"):
        stage.reached(name, "Running")
    add_unschedulable_pod(stage, "waiting-0")
    wait_until(lambda: "no room" in stage.statuses()["waiting-0"].get("message", ""), seconds=60)
    blind = proxy.add(Fault(Kind.DROP, r"[?&](watch|limit)="))
    proxy.cut_watches(gone=True)
    stage.kubectl("delete", "pod", "waiting-0-head", "--force", "--grace-period=0")
    stage.kubectl("delete", "rayjob", "torn-0-a1", "--wait=false")
    stage.kubectl("delete", "ftj", "dropped-0", "--wait=false")
    wait_until(lambda: len(stage.kubectl.items("rayjobs")) == 1, seconds=60, what="the RayJobs do not go")
    proxy.faults.remove(blind)
    noticed = time.monotonic() + NOTICED_SECONDS

    def missed() -> list[str]:
        statuses = stage.statuses()
        return [
            *(["pod"] if "no room" in statuses["waiting-0"]["message"] else []),
            *(["RayJob"] if len(statuses["torn-0"]["attempts"]) < 2 else []),
            *(["FineTuneJob"] if '"dropped-0"' in operator.get("/metrics") else []),
        ]

    wait_until(lambda: not missed(), seconds=noticed - time.monotonic(), what=lambda: str(missed()))
    assert stage.finished("torn-0", seconds=60)["torn-0"]["phase"] == "Succeeded"
    stage.apply("dropped-0")  # nothing is left of the one before it
    assert len(stage.reached("dropped-0", "Running")["attempts"]) == 1
    check_owners(stage)


def add_unschedulable_pod(stage: Stage, job: str) -> None:
    """The pod of the job's first attempt, as the scheduler marks one that has no place."""
    name = f"{job}-head"
    stage.kubectl.apply(
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": name, "labels": naming.labels(job, 1)},
            "spec": {"containers": [{"name": "ray-head", "image": "none"}]},
        }
    )
    told = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "no room"}
    patch = json.dumps({"status": {"conditions": [told]}})
    stage.kubectl("patch", "pod", name, "--subresource=status", "--type=merge", "-p", patch)

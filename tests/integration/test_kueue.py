"""Jobs in a queue of the real Kueue, with the real KubeRay: what test_queues.py plays, as it really comes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator

import pytest

from finetune_local.cluster import Cluster
from tests import kueue, namespaces
from tests.clients import Json, Kubectl
from tests.clusters import WITHOUT_RAY, started
from tests.integration.test_waits import job

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if not namespaces.are_allowed():
        pytest.skip("Kueue's certificates have a fixed path: needs user namespaces")
    folder = tmp_path_factory.mktemp("kueue")
    with started(folder / "cluster", WITHOUT_RAY) as running, kueue.started(running, folder):
        yield running


def queued(name: str, queue: str = "team", *, cpu: str = "300m") -> Json:
    return job(name, scheduling={"queueName": queue}, resources={"cpu": cpu, "memory": "64Mi"})


def is_true(condition: str, status: Json) -> bool:
    return any((one["type"], one["status"]) == (condition, "True") for one in status.get("conditions", []))


def is_let_in(status: Json) -> bool:
    return is_true("QuotaReserved", status)


def has_its_pods(status: Json) -> bool:
    return is_true("ResourcesReady", status)


def has_place(place: int) -> Callable[[Json], bool]:
    return lambda status: bool(status.get("queue", {}).get("position") == place)


def test_a_full_queue_lets_the_next_one_in_when_there_is_room(kubectl: Kubectl) -> None:
    kueue.queue(kubectl, "team", cpu="500m")
    kubectl.apply(queued("first"))
    kubectl.wait_job("first", is_let_in, seconds=30)
    kubectl.apply(queued("second"))
    status = kubectl.wait_job("second", lambda s: s.get("reason") == "Queued", seconds=30)["status"]
    status = kubectl.wait_job("second", lambda s: "quota" in s.get("message", ""), seconds=15)["status"]
    assert status["phase"] == "Queued"
    assert "insufficient unused quota for cpu in flavor default, 100m more needed" in status["message"]
    assert status["queue"]["name"] == "team"
    assert status["queue"]["workload"].startswith("rayjob-second-a1-")
    rayjob = kubectl.get("rayjob", "second-a1")
    assert rayjob is not None
    assert rayjob["spec"]["suspend"] is True
    kubectl("delete", "ftj", "first")
    # Kueue reserves the quota, and lets the RayJob go a moment later.
    status = kubectl.wait_job("second", lambda s: is_let_in(s) and "queue" not in s, seconds=60)["status"]
    assert len(status["attempts"]) == 1


def test_the_place_in_the_queue_is_told_within_15_seconds(kubectl: Kubectl) -> None:
    kueue.queue(kubectl, "team", cpu="500m")
    kubectl.apply(queued("first"))
    kubectl.wait_job("first", is_let_in, seconds=30)
    for place, name in enumerate(("second", "third"), start=1):
        kubectl.apply(queued(name))
        kubectl.wait_job(name, lambda s: bool(s.get("queue", {}).get("workload")), seconds=30)
        status = kubectl.wait_job(name, has_place(place), seconds=15)["status"]
        assert f"(position {place})" in status["message"]
        time.sleep(1.1)  # of two jobs of one second Kueue takes either first
    kubectl("delete", "ftj", "first")
    kubectl.wait_job("second", is_let_in, seconds=60)
    kubectl.wait_job("third", has_place(1), seconds=30)


def test_a_job_that_is_too_large_for_its_queue_is_told_so(kubectl: Kubectl) -> None:
    kueue.queue(kubectl, "team", cpu="500m")
    kubectl.apply(queued("large", cpu="900m"))
    status = kubectl.wait_job("large", lambda s: "quota" in s.get("message", ""), seconds=30)["status"]
    assert status["phase"] == "Queued"
    assert "insufficient quota for cpu" in status["message"]


def test_a_queue_that_does_not_exist_is_named_until_somebody_makes_it(kubectl: Kubectl) -> None:
    kubectl.apply(queued("lost", "nowhere"))
    status = kubectl.wait_job("lost", lambda s: s.get("reason") == "QueueMissing", seconds=30)["status"]
    assert f"there is no LocalQueue nowhere in namespace {kubectl.namespace}" in status["message"]
    kueue.queue(kubectl, "nowhere", cpu="1")
    kubectl.wait_job("lost", is_let_in, seconds=30)


def test_a_stopped_queue_is_named_and_holds_what_runs(kubectl: Kubectl) -> None:
    kueue.queue(kubectl, "team", cpu="1")
    kubectl.apply(queued("held"))
    kubectl.wait_job("held", has_its_pods, seconds=30)  # what has no pods yet loses nothing: no preemption
    stop = json.dumps({"spec": {"stopPolicy": "HoldAndDrain"}})
    kubectl("patch", "clusterqueue", f"{kubectl.namespace}-team", "--type=merge", "-p", stop)
    status = kubectl.wait_job("held", lambda s: s.get("phase") == "Queued", seconds=60)["status"]
    assert status["queue"]["name"] == "team"
    assert status["retries"].get("user", 0) == status["retries"].get("infrastructure", 0) == 0
    let = json.dumps({"spec": {"stopPolicy": "None"}})
    kubectl("patch", "clusterqueue", f"{kubectl.namespace}-team", "--type=merge", "-p", let)
    status = kubectl.wait_job("held", is_let_in, seconds=60)["status"]
    assert len(status["attempts"]) == 1
    assert status["retries"]["preemption"] == 1


def test_a_workload_that_is_taken_out_says_how_to_bring_it_back(kubectl: Kubectl) -> None:
    kueue.queue(kubectl, "team", cpu="100m")
    kubectl.apply(queued("shelved"))
    status = kubectl.wait_job("shelved", lambda s: s.get("queue", {}).get("workload"), seconds=30)["status"]
    off = json.dumps({"spec": {"active": False}})
    kubectl("patch", "workload", status["queue"]["workload"], "--type=merge", "-p", off)
    status = kubectl.wait_job("shelved", lambda s: s.get("reason") == "Deactivated", seconds=30)["status"]
    assert "kubectl patch workload" in status["message"]

"""Anything goes wrong, in any order: the invariants hold all the time, and when all is healed every job succeeds.

`make chaos SEED=7 FAULTS=500` repeats a schedule or draws a longer one. The seed is printed at the start.
"""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_local import parts
from finetune_local.cluster import Cluster
from tests import clusters, observers
from tests.chaos import checks, real_fleet, schedules
from tests.chaos.fleets import Fleet, up_again
from tests.chaos.played_fleet import PlayedFleet
from tests.chaos.played_trainers import INTERVAL
from tests.chaos.real_fleet import RealFleet
from tests.chaos.replicas import Replicas
from tests.chaos.rollouts import Rollouts
from tests.clients import Json, Kubectl
from tests.integration.rollout_operator import Serving

pytestmark = pytest.mark.integration

SEED = int(os.environ.get("FINETUNE_CHAOS_SEED") or 7)  # `make chaos` draws another one each time
FAULTS = int(os.environ.get("FINETUNE_CHAOS_FAULTS") or 20)
HEALING_SECONDS = 600.0  # the machine may be busy


def let_loose(fleet: Fleet, weights: dict[str, float], *, count: int, pause: float) -> None:
    """The faults of the schedule, one after the other; then everything is healed and every job comes to its end."""
    print(f"chaos: seed {SEED}, {count} faults (make chaos SEED={SEED} FAULTS={FAULTS})")
    fleet.fill()
    for number, happening in enumerate(schedules.draw(SEED, weights, count=count, pause=pause)):
        time.sleep(happening.after)
        whom = fleet.happen(happening.fault, happening.pick)
        print(f"chaos: {number + 1:4d} {happening.fault}: {whom}")
        if number % 5 == 0:
            fleet.fill()
    deadline = time.monotonic() + HEALING_SECONDS
    while left := fleet.unfinished():
        fleet.heal()
        assert time.monotonic() < deadline, f"seed {SEED}: not over: {_told(fleet, left)}"
        time.sleep(1)


def _told(fleet: Fleet, names: list[str]) -> str:
    told = [
        f"{job['metadata']['name']}: {job['status'].get('reason')}: {job['status'].get('message')}"
        for job in fleet.jobs()
        if job["metadata"]["name"] in names
    ]
    return "\n".join(told)


def check_end(fleet: Fleet, jobs: list[Json]) -> None:
    """Whoever was not ended by a person, nor has used up its retries, has succeeded, and nothing runs on."""
    print(f"chaos: ends {dict(Counter(job['status']['reason'] for job in jobs))}, attempts {_classes(jobs)}")
    for job in jobs:
        name, status = job["metadata"]["name"], job["status"]
        good = checks.ended_well(job, excused=name in fleet.excused)
        assert good, f"seed {SEED}: {name} {status['phase']}: {status['message']}"
        wrong = checks.wrong_budgets(job)
        assert not wrong, (
            f"seed {SEED}: {name} {status['phase']} {status['reason']}: {wrong}: {status['attempts']}"
        )
        for attempt in status.get("attempts", []):
            assert "endTime" in attempt, f"seed {SEED}: attempt {attempt['number']} of {name} has no end"
    fleet.kubectl("wait", "--for=delete", "pod", "--all", "--timeout=90s")


def _classes(jobs: list[Json]) -> dict[str, int]:
    """What became of the attempts: a schedule that hurts nobody shows nothing."""
    return dict(
        Counter(attempt.get("class", "?") for job in jobs for attempt in job["status"].get("attempts", []))
    )


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    made = Serving(tmp_path, routers=3)
    try:
        yield made
    finally:
        made.close()


@pytest.fixture
def quick_cluster(tmp_path: Path) -> Iterator[Cluster]:
    """API server, garbage collection and KWOK; KubeRay has left its CRDs behind and is away."""
    running = Cluster(tmp_path / "chaos")
    try:
        up_again(running, (*parts.CONTROL_PLANE, "kuberay"))
        os.kill(clusters.pid_of(running, "kuberay"), signal.SIGKILL)
        yield running
    finally:
        running.down()


def test_a_fleet_of_played_trainers_and_two_rollouts(
    quick_cluster: Cluster, serving: Serving, tmp_path: Path
) -> None:
    kubectl = Kubectl(quick_cluster.kubeconfig, "fleet")
    kubectl("create", "namespace", "fleet")
    rollouts = Rollouts(serving, kubectl)
    replicas = Replicas(quick_cluster, kubectl, tmp_path / "replicas", parts.CONTROL_PLANE)
    fleet = PlayedFleet(
        quick_cluster,
        kubectl,
        parts.CONTROL_PLANE,
        size=min(30, max(6, FAULTS // 5)),
        seed=SEED,
        rollouts=rollouts,
        replicas=replicas,
    )
    with (
        observers.observe(quick_cluster, "fleet", processes=False, interval=INTERVAL) as seen,
        replicas.running(serving.operator_environment()),
        fleet.playing(),
        rollouts.under_traffic(),
    ):
        let_loose(fleet, fleet.WEIGHTS, count=FAULTS, pause=0.7)
        rollouts.settle()
        jobs = fleet.jobs()
        check_end(fleet, jobs)
        time.sleep(2)
        assert fleet.call(lambda: list(fleet.player.trainers.alive)) == []
        assert fleet.jobs() == jobs, "something changed after the end"
    check_truth(fleet, jobs, seen)
    assert replicas.ends() <= 0, "an operator ended by itself"


def check_truth(fleet: PlayedFleet, jobs: list[Json], seen: observers.Observer) -> None:
    """What the statuses say beside what really happened."""
    trainers = fleet.player.trainers
    assert not trainers.wrong, f"seed {SEED}: {trainers.wrong}"
    for job in jobs:
        digest = job["status"].get("artifact", {}).get("digest")
        if job["status"]["phase"] == "Succeeded":
            assert digest == trainers.committed[job["metadata"]["uid"]]
        else:
            assert digest is None
    for (uid, attempt), times in seen.begun_anew.items():
        name = seen.last_seen[uid]["metadata"]["name"]
        assert times < trainers.begun[uid, attempt], (
            f"seed {SEED}: attempt {attempt} of {name} did not begin anew"
        )
    attempts = {name: uids for name, uids in fleet.player.uids.items() if "-a" in name.rpartition("/")[2]}
    twice = {name: uids for name, uids in attempts.items() if len(uids) > 1}
    assert not twice, f"seed {SEED}: RayJobs were created twice: {twice}"


@pytest.mark.faults
def test_a_fleet_of_real_trainers(
    cluster: Cluster, kubectl: Kubectl, tiny_model: Path, tiny_rows: Path
) -> None:
    fleet = RealFleet(cluster, kubectl, parts.TRAINING, size=2, model=tiny_model, data=tiny_rows, steps=300)
    with observers.observe(cluster, kubectl.namespace, interval=real_fleet.INTERVAL):
        let_loose(fleet, fleet.WEIGHTS, count=max(4, FAULTS // 10), pause=6.0)
        jobs = fleet.jobs()
        check_end(fleet, jobs)
    for job in jobs:
        if job["status"]["phase"] == "Succeeded":
            assert not checks.wrong_artifact(job["status"]), f"seed {SEED}: {job['metadata']['name']}"

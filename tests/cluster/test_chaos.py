"""Anything goes wrong with real pods, in an order that follows from a seed, and the promises of tests/chaos hold.

FINETUNE_CHAOS_SEED repeats a run, FINETUNE_CHAOS_FAULTS draws more faults. The seed is printed at the start.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator

import pytest

from tests.chaos import checks, schedules
from tests.clients import Kubectl
from tests.cluster.conftest import install
from tests.cluster.objects import JOB_SECONDS, NAMESPACE, Settings, at_work, delete, enforce, wait_for
from tests.cluster.pod_fleet import INTERVAL, PodFleet
from tests.cluster.stories import Stage

SEED = int(os.environ.get("FINETUNE_CHAOS_SEED") or 7)
FAULTS = int(os.environ.get("FINETUNE_CHAOS_FAULTS") or 8)
HEALING_SECONDS = 600  # two cores, and an attempt begins with a minute of imports
GONE_SECONDS = 180


@pytest.fixture
def fleet(settings: Settings, team: Kubectl) -> Iterator[PodFleet]:
    """Its namespace does not enforce `restricted`, as SidecarMode asks for."""
    if settings.kubelet is None or settings.host_path is None:
        pytest.skip("needs a node that is this machine: FINETUNE_E2E_KUBELET_PID, FINETUNE_E2E_HOST_PATH")
    enforce(team, NAMESPACE, "baseline")
    yield PodFleet(team, settings, volume=settings.host_path, size=3)
    enforce(team, NAMESPACE, "restricted")
    install(settings)


def test_a_fleet_in_real_pods(fleet: PodFleet, stage: Stage) -> None:
    """The watcher checks meanwhile, at each stored status: one live attempt, no way back, no end undone, no budget
    exceeded, no more lost than an interval."""
    print(f"chaos: seed {SEED}, {FAULTS} faults (FINETUNE_CHAOS_SEED, FINETUNE_CHAOS_FAULTS)")
    stage.watcher.interval = INTERVAL
    fleet.fill()
    fleet.kubectl.wait_job(
        fleet.names[0], lambda s: s.get("progress", {}).get("step", 0) > 0, seconds=JOB_SECONDS
    )
    for number, happening in enumerate(schedules.draw(SEED, fleet.WEIGHTS, count=FAULTS, pause=10)):
        time.sleep(happening.after)
        whom = fleet.happen(happening.fault, happening.pick)
        print(f"chaos: {number + 1:4d} {happening.fault}: {whom}")
    deadline = time.monotonic() + HEALING_SECONDS
    while left := fleet.unfinished():
        fleet.heal()
        assert time.monotonic() < deadline, f"seed {SEED}: not over: {left}"
        time.sleep(2)
    check_end(fleet)
    stage.watcher.interval = None
    for name in fleet.names:
        delete(fleet.kubectl, name)


def check_end(fleet: PodFleet) -> None:
    for name in fleet.names:
        job = fleet.kubectl.job(name)
        status = job["status"]
        told = f"seed {SEED}: {name}: {json.dumps(status, indent=1)}"
        # A platform that heals itself: only who has used up its retries may fail, and each failure was charged once.
        assert checks.ended_well(job, excused=False), told
        assert not checks.wrong_budgets(job), told
        # What is downloaded and served is what was trained.
        if status["phase"] == "Succeeded":
            assert not checks.wrong_artifact(status, fleet.volume), told
    # Nobody pays for pods of jobs that are over.
    wait_for("no pod runs", lambda: not at_work(fleet.kubectl), seconds=GONE_SECONDS)

"""The operator is killed at every write of a job's life, and at random instants; every job still ends as it should.

It is killed from outside, by the API proxy that sees its requests: the product holds no code for it.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from benchmarks.rayjob_player import Ending, Story
from tests.clients import Json, KubectlError
from tests.integration.api_proxy import SEED, ApiProxy, Fault, Kind
from tests.integration.operators import Keeper, Operator, Stage
from tests.waiting import wait_until

pytestmark = pytest.mark.integration

WRITES = r"^(POST|PUT|PATCH|DELETE) (?!.*tokenreviews)"
KILLS = int(os.environ.get("FINETUNE_TEST_KILLS", "12"))
BUSY_SECONDS = 300.0  # for what takes moments where nobody else needs the cores


@dataclass(frozen=True)
class Kindred:
    """Jobs whose names begin alike: how their first attempt goes, and how they end."""

    first: Ending
    phase: str = "Succeeded"
    attempts: tuple[int, ...] = (2,)
    """How many there may be; the second one goes well."""


KINDS = {
    "well": Kindred(Ending.WELL, attempts=(1,)),
    "lost": Kindred(Ending.LOST),
    "bad": Kindred(Ending.USER_FAULT, "Failed", (1,)),
    "late": Kindred(Ending.LATE),
    # Where the loss is known before the report, nobody looks for the artifact, and the next attempt finds it.
    "unheard": Kindred(Ending.UNHEARD, attempts=(1, 2)),
    "stalled": Kindred(Ending.HANGS),
    "held": Kindred(Ending.HANGS),
    "cancelled": Kindred(Ending.HANGS, "Cancelled", (1,)),
    "old": Kindred(Ending.WELL, attempts=(1,)),
    "torn": Kindred(Ending.HANGS),
    "dropped": Kindred(Ending.HANGS),
    "waiting": Kindred(Ending.WAITS),
}
# Each named point is a request of the operator in the life of such a job: the kill falls right before or right after
# the server did it.
POINTS = {
    "record": ("late", r"^PATCH .*/finetunejobs/{job}/status"),
    "run-file": ("lost", r"^POST .*/configmaps"),  # created, as another's of that name must not be changed
    "create": ("lost", r"^POST .*/rayjobs"),
    "event": ("lost", r"^POST .*/events"),
    "run-file-of-inspection": ("unheard", r"^POST .*/configmaps"),
    "create-inspection": ("late", r"^POST .*/rayjobs"),
    "delete-when-held": ("held", r"^DELETE .*/rayjobs/{job}-"),
    "delete-when-cancelled": ("cancelled", r"^DELETE .*/rayjobs/{job}-"),
    "delete-when-stalled": ("stalled", r"^DELETE .*/rayjobs/{job}-"),
    "delete-when-old": ("old", r"^DELETE .*/finetunejobs/{job}"),
}
IN_SHORT = ("create",)  # not left to the long tests


def ending_of(job: str, attempt: int) -> Ending:
    return KINDS[kind_of(job)].first if attempt == 1 else Ending.WELL


def kind_of(job: str) -> str:
    return job.partition("-")[0]


@pytest.fixture
def story() -> Story:
    return ending_of


@pytest.fixture
def keeper(proxy: ApiProxy, stage: Stage, tmp_path: Path) -> Iterator[Keeper]:
    operator = Operator(tmp_path / "operator", proxy.kubeconfig, stage.kubectl.namespace)
    kept = Keeper(operator)
    try:
        operator.wait_healthy()
        yield kept
    finally:
        kept.close()


def quick_retries(name: str) -> Json:
    more: Json = {"deadlines": {"stallSeconds": 10}} if name.startswith("stalled") else {}
    if name.startswith("old"):
        more = {"ttlSecondsAfterFinished": 0}
    return {"retry": {"maxInfraRetries": 3, "backoffSeconds": {"min": 1, "max": 2}}, **more}


def check(stage: Stage, names: list[str], *, seconds: float = 90) -> None:
    """The invariants: each job ended as its story says, no RayJob was created twice, and none that has no attempt."""
    statuses = stage.finished(*names, seconds=seconds)
    for name in names:
        status, kind = statuses[name], KINDS[kind_of(name)]
        assert status["phase"] == kind.phase, f"{name}: {status['phase']}: {status.get('message')}"
        attempts = [attempt["rayJob"] for attempt in status["attempts"]]
        assert len(attempts) in kind.attempts, f"{name}: {status['attempts']}"
        ends = [condition["type"] for condition in status["conditions"] if condition["status"] == "True"]
        assert ("Complete" in ends) != ("Failed" in ends), f"{name}: {ends}"
    ever = stage.rayjobs_ever()
    assert {name: count for name, count in ever.items() if count > 1} == {}, "created twice"
    recorded = {attempt["rayJob"] for status in statuses.values() for attempt in status.get("attempts", [])}
    inspections = {
        attempt["inspection"]
        for status in statuses.values()
        for attempt in status.get("attempts", [])
        if "inspection" in attempt
    }
    assert set(ever) - recorded - inspections == set(), "created and not recorded"


def live(stage: Stage, name: str) -> None:
    """One job, from its creation to its end; what a person does in its story is done."""
    stage.apply(name, **quick_retries(name))
    match kind_of(name):
        case "held":
            stage.reached(name, "Running", seconds=BUSY_SECONDS)
            stage.suspend(name, True)
            stage.reached(name, "Suspended", seconds=BUSY_SECONDS)
            stage.suspend(name, False)
        case "cancelled":
            stage.reached(name, "Running", seconds=BUSY_SECONDS)
            stage.kubectl("annotate", "ftj", name, "finetune.dev/action=cancel")
        case "old":
            wait_until(lambda: _is_gone(stage, name), seconds=BUSY_SECONDS, what=f"{name} is not deleted")
            return
    stage.finished(name, seconds=BUSY_SECONDS)


def _is_gone(stage: Stage, name: str) -> bool:
    """Both the job and its RayJob, which was there."""
    with contextlib.suppress(KubectlError):
        left = [body["metadata"]["name"] for body in stage.kubectl.items("ftj,rayjob")]
        return f"{name}-a1" in stage.rayjobs_ever() and not {name, f"{name}-a1"} & set(left)
    return False


@pytest.mark.parametrize("when", [Kind.CALL_BEFORE, Kind.CALL_AFTER], ids=["before", "after"])
@pytest.mark.parametrize(
    "point", [pytest.param(point, marks=() if point in IN_SHORT else pytest.mark.faults) for point in POINTS]
)
def test_a_kill_at_a_named_point(
    point: str, when: Kind, keeper: Keeper, proxy: ApiProxy, stage: Stage
) -> None:
    """Each occurrence of the point in turn, until a job lived through without meeting it."""
    kind, requests = POINTS[point]
    names = []
    for occurrence in itertools.count():
        name = f"{kind}-{occurrence}"
        pattern = requests.format(job=name)
        fault = proxy.add(Fault(when, pattern, skip=occurrence, times=1, then=keeper.operator.kill))
        names.append(name)
        live(stage, name)
        proxy.faults.remove(fault)
        if not fault.hits:
            break
    assert len(names) > 1, "the point was never met"
    assert stage.created_twice() == {}
    if kind != "old":  # those are gone
        check(stage, names)


@pytest.mark.faults
def test_kills_at_random_instants(keeper: Keeper, stage: Stage) -> None:
    print(f"seed {SEED}, {KILLS} kills (FINETUNE_TEST_SEED, FINETUNE_TEST_KILLS)")
    dice = random.Random(SEED)
    names: list[str] = []
    for number in range(KILLS):
        new = [f"{kind}-{number}" for kind in ("well", "late" if number % 2 else "lost", "bad")]
        stage.apply(*new, **quick_retries(""))
        names += new
        time.sleep(dice.uniform(0.0, 3.0))
        keeper.operator.kill()
        time.sleep(dice.uniform(0.0, 0.5))
    check(stage, names, seconds=480)
    assert keeper.starts > KILLS // 2


@pytest.mark.faults
def test_kills_at_random_writes(keeper: Keeper, proxy: ApiProxy, stage: Stage) -> None:
    """Denser than instants: every kill falls on a write."""
    dice = random.Random(SEED + 1)
    names = [f"{kind}-{number}" for number in range(8) for kind in ("well", "lost", "late", "bad")]
    faults = [
        proxy.add(
            Fault(
                dice.choice((Kind.CALL_BEFORE, Kind.CALL_AFTER)),
                WRITES,
                skip=dice.randrange(2, 30),
                times=1,
                then=keeper.operator.kill,
            )
        )
        for _ in range(KILLS)
    ]
    stage.apply(*names, **quick_retries(""))
    check(stage, names, seconds=480)
    assert sum(fault.hits for fault in faults) >= KILLS // 2

"""The operator is killed at every write of a job's life, and at random instants; every job still ends as it should.

It is killed from outside, by the API proxy that sees its requests: the product holds no code for it.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.rayjob_player import Ending
from finetune_local.cluster import Cluster
from tests.integration.api_proxy import ApiProxy, Fault, Kind
from tests.integration.operators import Keeper, Operator, Stage, played_cluster, staged
from tests.waiting import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.faults]

WRITES = r"^(POST|PUT|PATCH|DELETE) (?!.*tokenreviews)"
# Each named point is a request of the operator: the kill falls right before or right after the server did it.
POINTS = {
    "record": r"^PATCH .*/finetunejobs/{job}/status",
    "run-file": r"^PATCH .*/configmaps/{job}-a1",
    "create": r"^POST .*/rayjobs",
    "event": r"^POST .*/events",
}
SEED = int(os.environ.get("FINETUNE_TEST_SEED", "20261121"))
KILLS = int(os.environ.get("FINETUNE_TEST_KILLS", "12"))
_numbers = itertools.count(1)


def story(job: str, attempt: int) -> Ending:
    """Jobs called lost-… lose their first attempt, and those called bad-… fail by their user's fault."""
    if job.startswith("bad"):
        return Ending.USER_FAULT
    return Ending.LOST if job.startswith("lost") and attempt == 1 else Ending.WELL


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with played_cluster(tmp_path_factory.mktemp("api")) as cluster:
        yield cluster


@pytest.fixture
def stage(api: Cluster) -> Iterator[Stage]:
    with staged(api, f"kills-{next(_numbers)}", story=story) as playing:
        yield playing


@pytest.fixture
def proxy(api: Cluster, tmp_path: Path) -> Iterator[ApiProxy]:
    running = ApiProxy(api, tmp_path, seed=SEED)
    yield running
    running.close()


@pytest.fixture
def keeper(proxy: ApiProxy, stage: Stage, tmp_path: Path) -> Iterator[Keeper]:
    operator = Operator(tmp_path / "operator", proxy.kubeconfig, stage.kubectl.namespace)
    kept = Keeper(operator)
    wait_until(lambda: operator.get("/healthz") == "ok\n", seconds=30)
    yield kept
    kept.close()


def quick_retries(name: str) -> dict[str, object]:
    del name
    return {"retry": {"maxInfraRetries": 3, "backoffSeconds": {"min": 1, "max": 2}}}


def check(stage: Stage, names: list[str], *, seconds: float = 90) -> None:
    """The invariants: each job ended as its story says, no RayJob was created twice, and none that has no attempt."""
    statuses = stage.finished(*names, seconds=seconds)
    for name in names:
        status = statuses[name]
        expected = "Failed" if name.startswith("bad") else "Succeeded"
        assert status["phase"] == expected, f"{name}: {status['phase']}: {status.get('message')}"
        attempts = [attempt["rayJob"] for attempt in status["attempts"]]
        assert len(attempts) == (2 if name.startswith("lost") else 1), f"{name}: {attempts}"
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


@pytest.mark.parametrize("when", [Kind.CALL_BEFORE, Kind.CALL_AFTER], ids=["before", "after"])
@pytest.mark.parametrize("point", list(POINTS))
def test_a_kill_at_a_named_point(
    point: str, when: Kind, keeper: Keeper, proxy: ApiProxy, stage: Stage
) -> None:
    """Each occurrence of the point in turn, until a job lived through without meeting it."""
    names = []
    for occurrence in itertools.count():
        name = f"lost-{occurrence}"
        pattern = POINTS[point].format(job=name)
        fault = proxy.add(Fault(when, pattern, skip=occurrence, times=1, then=keeper.operator.kill))
        names.append(name)
        stage.apply(name, **quick_retries(name))
        stage.finished(name, seconds=60)
        proxy.faults.remove(fault)
        if not fault.hits:
            break
    assert len(names) > 1, "the point was never met"
    check(stage, names)


def test_kills_at_random_instants(keeper: Keeper, stage: Stage) -> None:
    print(f"seed {SEED}, {KILLS} kills (FINETUNE_TEST_SEED, FINETUNE_TEST_KILLS)")
    dice = random.Random(SEED)
    names: list[str] = []
    for number in range(KILLS):
        new = [f"{kind}-{number}" for kind in ("well", "lost", "bad")]
        stage.apply(*new, **quick_retries(""))
        names += new
        time.sleep(dice.uniform(0.0, 3.0))
        keeper.operator.kill()
        time.sleep(dice.uniform(0.0, 0.5))
    check(stage, names, seconds=480)
    assert keeper.starts > KILLS // 2


def test_kills_at_random_writes(keeper: Keeper, proxy: ApiProxy, stage: Stage) -> None:
    """Denser than instants: every kill falls on a write."""
    dice = random.Random(SEED + 1)
    names = [f"{kind}-{number}" for number in range(8) for kind in ("well", "lost", "bad")]
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

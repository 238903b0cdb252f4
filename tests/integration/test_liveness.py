"""A real operator that is stuck, in each of the ways that there are: what its liveness probe sees of it.

The operator is started by a few lines that let a signal block its event loop, and that make five minutes short. The
product holds no code for it.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.api_proxy import ApiProxy, Fault, Kind
from tests.integration.operators import Operator, Stage
from tests.waiting import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.faults]

STUCK = 4.0  # seconds; five minutes in the product
BLOCKED = 25.0  # seconds; longer than the 15 after which the log tells of it
PROGRAM = f"""
import runpy, signal, time
from finetune_operator import health

def block(*_):
    time.sleep({BLOCKED})

health.STUCK_SECONDS = {STUCK}
signal.signal(signal.SIGUSR1, block)
runpy.run_module("finetune_operator", run_name="__main__")
"""
SILENCE = 70.0  # seconds after which Kopf takes a watch for dead


@pytest.fixture
def operator(proxy: ApiProxy, stage: Stage, tmp_path: Path) -> Iterator[Operator]:
    running = Operator(tmp_path / "operator", proxy.kubeconfig, stage.kubectl.namespace)
    running.program = [sys.executable, "-c", PROGRAM]
    running.start()
    wait_until(lambda: is_well(running), seconds=30)
    yield running
    running.kill()


def is_well(operator: Operator) -> bool:
    return operator.get("/healthz") == "ok\n"


def answers_nothing(operator: Operator) -> bool:
    """A probe with the time limit of the chart's, 5 s, gets no answer."""
    return operator.is_alive() and operator.get("/healthz") == ""


def test_an_event_loop_that_is_blocked_answers_no_probe_and_the_log_says_where(
    operator: Operator, stage: Stage
) -> None:
    operator.signal(signal.SIGUSR1)
    assert answers_nothing(operator)
    wait_until(lambda: "in block" in operator.log(), seconds=BLOCKED, what="a traceback in the log")
    wait_until(lambda: is_well(operator), seconds=BLOCKED)
    stage.apply("after")
    assert stage.finished("after")["after"]["phase"] == "Succeeded"


def test_a_process_that_is_stopped_answers_no_probe(operator: Operator, stage: Stage) -> None:
    operator.signal(signal.SIGSTOP)
    assert answers_nothing(operator)
    operator.signal(signal.SIGCONT)
    wait_until(lambda: is_well(operator), seconds=10)
    stage.apply("after")
    assert stage.finished("after")["after"]["phase"] == "Succeeded"


def test_a_pass_that_hangs_fails_the_probe(operator: Operator, proxy: ApiProxy, stage: Stage) -> None:
    held = proxy.add(Fault(Kind.DELAY, r"PATCH .*/finetunejobs/stuck/status", seconds=4 * STUCK, times=1))
    stage.apply("stuck")
    wait_until(
        lambda: operator.get("/healthz").startswith("500 a reconcile pass has been running for"),
        seconds=30,
        what=lambda: operator.get("/healthz"),
    )
    assert held.hits == 1
    stage.apply("other")  # one that hangs does not hold up the others
    assert stage.finished("other", seconds=30)["other"]["phase"] == "Succeeded"
    wait_until(lambda: is_well(operator), seconds=30)
    assert stage.finished("stuck")["stuck"]["phase"] == "Succeeded"


def test_an_api_server_that_is_away_fails_no_probe(operator: Operator, proxy: ApiProxy, stage: Stage) -> None:
    """It would be no better after a restart."""
    stage.apply(*(f"job-{number}" for number in range(20)))
    proxy.away.set()
    deadline = time.monotonic() + 3 * STUCK
    while time.monotonic() < deadline:
        assert is_well(operator), operator.get("/healthz")
        time.sleep(0.2)
    proxy.away.clear()
    found = stage.finished(*(f"job-{number}" for number in range(20)), seconds=120)
    assert {status["phase"] for status in found.values()} == {"Succeeded"}


def test_watches_from_which_nothing_comes_are_opened_anew(
    operator: Operator, proxy: ApiProxy, stage: Stage
) -> None:
    """A connection that is dead without a word, as a load balancer leaves it behind."""
    dead = proxy.add(Fault(Kind.DELAY, r"finetunejobs\?.*watch=true", seconds=600, times=1))
    proxy.cut_watches()
    wait_until(lambda: dead.hits, seconds=10)
    applied = time.monotonic()
    stage.apply("unseen")
    assert stage.finished("unseen", seconds=SILENCE + 60)["unseen"]["phase"] == "Succeeded"
    assert time.monotonic() - applied > SILENCE / 2, "the watch was not dead"
    assert is_well(operator)

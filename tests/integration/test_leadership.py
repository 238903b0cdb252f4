"""Two operators on one API server: one acts, and the other takes over whatever becomes of the first."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_local.cluster import Cluster
from tests.integration.api_proxy import ApiProxy, Fault, Kind
from tests.integration.operators import Operator, Stage
from tests.waiting import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.faults]

LEASE = 6.0  # seconds; shorter than the default, so that the tests are
TERMS = {
    "FINETUNE_LEADER_ELECTION": "true",
    "FINETUNE_LEASE_SECONDS": f"{LEASE:g}",
    "FINETUNE_LEASE_RENEW_SECONDS": "4",
    "FINETUNE_LEASE_RETRY_SECONDS": "1",
}
RETRY = 1.2  # with the jitter
START = 8.0  # seconds from leading to acting: Kopf finds out what there is


@pytest.fixture
def proxies(api: Cluster, tmp_path: Path) -> Iterator[tuple[ApiProxy, ApiProxy]]:
    """One API proxy per replica, so that it is known who sent what."""
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    pair = (ApiProxy(api, folders[0]), ApiProxy(api, folders[1]))
    yield pair
    for proxy in pair:
        proxy.close()


@pytest.fixture
def pair(
    proxies: tuple[ApiProxy, ApiProxy], stage: Stage, tmp_path: Path
) -> Iterator[tuple[Operator, Operator]]:
    """The leader and its stand-by, behind one address: trainers report to the stand-by's port."""
    first = Operator(tmp_path / "a", proxies[0].kubeconfig, stage.kubectl.namespace, **TERMS)
    url = f"http://127.0.0.1:{first.ports['status']}"
    second = Operator(
        tmp_path / "b", proxies[1].kubeconfig, stage.kubectl.namespace, **TERMS, FINETUNE_STATUS_URL=url
    )
    try:
        first.start()
        wait_until(first.leads, seconds=30)
        second.start()
        wait_until(lambda: second.get("/healthz") == "ok\n", seconds=30)
        yield first, second
    finally:
        for operator in (first, second):
            operator.kill()


def writes(proxy: ApiProxy, *, since: float) -> list[str]:
    """What a replica wrote, other than the Lease."""
    return [
        request.text
        for request in proxy.requests
        if request.at >= since and not request.text.startswith("GET") and "/leases" not in request.text
    ]


def holder(stage: Stage) -> str:
    lease = stage.kubectl.get("lease", "finetune-operator") or {}
    return str(lease.get("spec", {}).get("holderIdentity", ""))


def test_only_the_leader_acts_and_both_are_ready(
    pair: tuple[Operator, Operator], proxies: tuple[ApiProxy, ApiProxy], stage: Stage
) -> None:
    stage.apply("calm")
    status = stage.finished("calm")["calm"]
    assert status["phase"] == "Succeeded", status
    assert stage.rayjobs_ever() == {"calm-a1": 1}
    assert writes(proxies[0], since=0)
    assert writes(proxies[1], since=0) == []
    assert [operator.get("/readyz") for operator in pair] == ["ok\n", "ok\n"]
    assert not pair[1].leads()
    assert "finetune_api_requests_total{" in pair[1].get("/metrics"), "a stand-by that is cut off must show"


def test_after_a_kill_the_other_one_goes_on_within_the_lease(
    pair: tuple[Operator, Operator], stage: Stage
) -> None:
    stage.player.pace = 1.0  # jobs last for seconds, so that the kill falls into their middle
    stage.apply("one", "two")
    wait_until(lambda: len(stage.rayjobs_ever()) == 2, seconds=30)
    pair[0].kill()
    began = time.monotonic()
    wait_until(pair[1].leads, seconds=30)
    assert time.monotonic() - began <= LEASE + RETRY + 1.0
    pair[0].start()  # as its kubelet does; what trainers report to it goes to the other one
    stage.apply("three")
    found = stage.finished("one", "two", "three", seconds=120)
    assert set(stage.rayjobs_ever().values()) == {1}
    assert {s["phase"] for s in found.values()} == {"Succeeded"}
    assert {s["attempts"][0]["rayJob"] for s in found.values()} == {"one-a1", "two-a1", "three-a1"}


def test_a_leader_that_ends_hands_over_at_once(pair: tuple[Operator, Operator], stage: Stage) -> None:
    pair[0].signal(signal.SIGTERM)
    began = time.monotonic()
    wait_until(pair[1].leads, seconds=30)
    assert time.monotonic() - began < RETRY + 2, "the Lease was not released, or only after a while"
    assert pair[0].process is not None
    assert pair[0].process.wait(timeout=15) == 0


def refuse_a_watch(
    pair: tuple[Operator, Operator],
    proxies: tuple[ApiProxy, ApiProxy],
    stage: Stage,
    plural: str,
    *,
    status: int,
) -> None:
    """The leader's watch is refused when it is opened anew: it ends without the Lease, and the other one leads."""
    proxies[0].add(Fault(Kind.REFUSE, rf"{plural}\?.*watch=true", status=status, times=1))
    time.sleep(START)  # until the watches are open
    leader = holder(stage)
    proxies[0].cut_watches()
    assert pair[0].process is not None
    assert pair[0].process.wait(timeout=15) == 1
    assert holder(stage) != leader, "the Lease was not released"
    wait_until(pair[1].leads, seconds=30)


def test_a_leader_whose_credentials_are_refused_says_so_in_one_sentence_and_hands_over(
    pair: tuple[Operator, Operator], proxies: tuple[ApiProxy, ApiProxy], stage: Stage
) -> None:
    """A token that has run out in a kubeconfig, for example: a pod's own is renewed in its file."""
    refuse_a_watch(pair, proxies, stage, "rayjobs", status=401)
    assert "the operator ends: the API server refuses the operator's credentials" in pair[0].log()
    assert "Traceback" not in pair[0].log()


def test_a_leader_whose_watch_fails_for_good_ends_and_hands_over(
    pair: tuple[Operator, Operator], proxies: tuple[ApiProxy, ApiProxy], stage: Stage
) -> None:
    """Kopf leaves its other watches behind then."""
    refuse_a_watch(pair, proxies, stage, "finetunejobs", status=404)
    assert "the operator ends" in pair[0].log()


def test_a_stand_by_ends_quickly_on_sigterm(pair: tuple[Operator, Operator], stage: Stage) -> None:
    pair[1].signal(signal.SIGTERM)
    assert pair[1].process is not None
    assert pair[1].process.wait(timeout=5) == 0
    assert pair[0].leads()


def test_a_leader_that_was_stopped_does_nothing_when_it_goes_on(
    pair: tuple[Operator, Operator], proxies: tuple[ApiProxy, ApiProxy], stage: Stage
) -> None:
    """Frozen in the middle of a pass, past its Lease, while the other one works through its jobs."""
    names = [f"job-{number}" for number in range(12)]
    held = proxies[0].add(Fault(Kind.DELAY, r"PATCH .*/finetunejobs/.*/status", seconds=0.5))
    stage.apply(*names)
    wait_until(lambda: held.hits >= 2, seconds=30)
    pair[0].signal(signal.SIGSTOP)
    wait_until(pair[1].leads, seconds=LEASE + 5)
    stage.apply("later")
    time.sleep(START)
    new = holder(stage)
    thawed = time.time()
    pair[0].signal(signal.SIGCONT)
    assert pair[0].process is not None
    assert pair[0].process.wait(timeout=10) == 1
    assert "leads no more" in pair[0].log()
    assert writes(proxies[0], since=thawed) == []
    assert holder(stage) == new
    pair[0].start()  # as its kubelet does; trainers report to its address
    found = stage.finished(*names, "later", seconds=120)
    assert {s["phase"] for s in found.values()} == {"Succeeded"}
    assert set(stage.rayjobs_ever().values()) == {1}


def test_a_leader_cut_off_from_the_api_server_writes_no_more_and_ends_when_it_can_read(
    pair: tuple[Operator, Operator], proxies: tuple[ApiProxy, ApiProxy], stage: Stage
) -> None:
    proxies[0].away.set()
    wait_until(pair[1].leads, seconds=LEASE * 2)
    assert "nothing is written until it is" in pair[0].log()
    stage.apply("meanwhile")
    wait_until(lambda: "meanwhile-a1" in stage.rayjobs_ever(), seconds=30)
    back = time.time()
    proxies[0].away.clear()
    assert pair[0].process is not None
    assert pair[0].process.wait(timeout=15) == 1
    assert writes(proxies[0], since=back) == []
    pair[0].start()
    assert stage.finished("meanwhile", seconds=120)["meanwhile"]["phase"] == "Succeeded"


def test_an_api_server_that_was_away_for_both_costs_no_restart(
    pair: tuple[Operator, Operator], proxies: tuple[ApiProxy, ApiProxy], stage: Stage
) -> None:
    for proxy in proxies:
        proxy.away.set()
    time.sleep(LEASE + 4)
    for proxy in proxies:
        proxy.away.clear()
    stage.apply("after")
    assert stage.finished("after", seconds=120)["after"]["phase"] == "Succeeded"
    assert pair[0].is_alive()
    assert pair[1].is_alive()
    assert stage.rayjobs_ever() == {"after-a1": 1}


def test_a_report_reaches_the_leader_through_any_replica(
    pair: tuple[Operator, Operator], stage: Stage
) -> None:
    """The first replica's address is what trainers know; it stands by now, and the second one leads."""
    pair[0].signal(signal.SIGTERM)
    assert pair[0].process is not None
    pair[0].process.wait(timeout=15)
    wait_until(pair[1].leads, seconds=30)
    pair[0].start()
    wait_until(lambda: pair[0].get("/healthz") == "ok\n", seconds=30)
    stage.apply("far")
    status = stage.finished("far")["far"]
    assert (status["phase"], status["artifact"]["uri"]) == ("Succeeded", "file:///artifacts/far")
    assert not pair[0].leads()
    assert 'finetune_reports_total{code="200"}' in pair[0].get("/metrics")

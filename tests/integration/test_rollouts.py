"""Rollouts on a real API server, by a real operator process, with simulated engines and routers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_local.cluster import Cluster
from tests.clients import Kubectl
from tests.integration.rollout_operator import BETTER, GOOD, Lab, serves

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An API server and its garbage collector."""
    running = Cluster(tmp_path_factory.mktemp("api-server"))
    try:
        running.up(("etcd", "kube-apiserver", "kube-controller-manager"))
        yield running
    finally:
        running.down()


@pytest.fixture
def lab(cluster: Cluster, kubectl: Kubectl, tmp_path: Path) -> Iterator[Lab]:
    made = Lab(cluster, kubectl, tmp_path)
    made.start()
    try:
        yield made
    finally:
        made.close()


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
    assert [entry["completionStatus"] for entry in status["history"]] == ["Promoted", "Promoted"]
    assert lab.failed_requests == 0

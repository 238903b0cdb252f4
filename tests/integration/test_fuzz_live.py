"""Specs of all kinds at once under an operator that runs: each gets a state that says what it waits for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests import specs
from tests.clients import Kubectl
from tests.integration.operators import Operator, played_cluster
from tests.properties.test_job_specs import SEED
from tests.specs import Json
from tests.waiting import wait_until

pytestmark = pytest.mark.integration

JOBS = 100


def drawn(number: int) -> list[Json]:
    """So many valid specs, the same for the same seed."""
    found: list[Json] = []

    @hypothesis.seed(SEED)
    @settings(
        max_examples=number,
        phases=[Phase.generate],
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(spec=specs.valid_specs())
    def draw(spec: Json) -> None:
        found.append(spec)

    draw()
    return found


def errors(operator: Operator) -> float:
    lines = operator.get("/metrics").splitlines()
    return sum(
        float(line.split()[-1]) for line in lines if line.startswith("finetune_reconcile_errors_total{")
    )


def settled(job: Json) -> bool:
    """Whether the operator has done what it can do: its RayJob is there, or the status says why it is not."""
    status = job.get("status", {})
    attempts = status.get("attempts") or [{}]
    return bool(attempts[-1].get("uid")) or (bool(status.get("reason")) and not attempts[-1])


def test_whatever_is_taken_is_dealt_with(tmp_path: Path) -> None:
    wanted = drawn(JOBS)
    with played_cluster(tmp_path / "cluster") as cluster:
        kubectl = Kubectl(cluster.kubeconfig, "default")
        operator = Operator(tmp_path / "operator", cluster.layout.user_kubeconfig("operator"), "default")
        try:
            operator.start()
            operator.wait_healthy()
            client = cluster.client()
            path = "/apis/finetune.dev/v1alpha1/namespaces/default/finetunejobs"
            for number, spec in enumerate(wanted):
                metadata: Json = {"name": f"fuzz-{number}"}
                kind: Json = {"apiVersion": "finetune.dev/v1alpha1", "kind": "FineTuneJob"}
                client.call("POST", path, {**kind, "metadata": metadata, "spec": spec})
            _wait_settled(kubectl, len(wanted))
            assert (errors(operator), operator.is_alive()) == (0, True)
            operator.kill()  # and the next one finds all of them at once
            operator.start()
            operator.wait_healthy()
            _wait_settled(kubectl, len(wanted))
            assert (errors(operator), operator.is_alive()) == (0, True)
            assert "Traceback" not in operator.log()
        finally:
            operator.kill()


def _wait_settled(kubectl: Kubectl, number: int) -> None:
    jobs: list[Json] = []

    def all_settled() -> bool:
        jobs[:] = kubectl.items("finetunejobs")
        return len(jobs) == number and all(settled(job) for job in jobs)

    wait_until(all_settled, seconds=120, what="some jobs are not dealt with")
    refused = [job for job in jobs if job["status"].get("reason") in ("BadConfig", "Internal")]
    assert not refused, [(job["spec"], job["status"]["message"]) for job in refused]
    reasons = Counter(job["status"]["reason"] for job in jobs)
    assert len(reasons) > 3, f"a sample that says little: {reasons}"

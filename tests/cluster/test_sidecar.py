"""SidecarMode with real pods: KubeRay's submitter is a container of the head pod."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.clients import Kubectl
from tests.cluster.conftest import install
from tests.cluster.objects import (
    JOB_SECONDS,
    LONG,
    NAMESPACE,
    Settings,
    enforce,
    head_pod,
    job,
    wait_for,
)


@pytest.fixture(scope="module")
def sidecar(settings: Settings, team: Kubectl) -> Iterator[Kubectl]:
    install(settings, submission_mode="SidecarMode")
    yield team
    enforce(team, NAMESPACE, "restricted")
    install(settings)


@pytest.fixture
def baseline(sidecar: Kubectl) -> Kubectl:
    """KubeRay's container has no security context, so the namespace must not enforce `restricted`."""
    enforce(sidecar, NAMESPACE, "baseline")
    return sidecar


def test_a_restricted_namespace_is_named_as_the_reason(sidecar: Kubectl) -> None:
    sidecar.apply(job("refused"))
    status = sidecar.wait_job("refused", lambda s: "PodSecurity" in s.get("message", ""), seconds=60)[
        "status"
    ]
    assert "restricted" in status["message"]
    assert status["phase"] in ("Pending", "Provisioning")
    sidecar("delete", "ftj", "refused", "--wait", "--timeout=60s")


def test_a_job_succeeds(baseline: Kubectl) -> None:
    baseline.apply(job("beside"))
    status = baseline.finished("beside", seconds=JOB_SECONDS)
    assert status["phase"] == "Succeeded", json.dumps(status, indent=1)
    assert [one["class"] for one in status["attempts"]] == ["Succeeded"]


def test_a_job_that_fails_at_once_does_not_hang(baseline: Kubectl) -> None:
    """KubeRay itself would wait for ever: a container that has ended makes the head pod unready."""
    baseline.apply(job("at-once", dataset={"sources": [{"uri": "pvc://files/nowhere.jsonl"}]}))
    status = baseline.finished("at-once", seconds=JOB_SECONDS)
    assert (status["phase"], status["reason"]) == ("Failed", "BadData"), json.dumps(status, indent=1)
    assert len(status["attempts"]) == 1
    wait_for(
        "its pods gone", lambda: not baseline.items("pods", "-l", "finetune.dev/job=at-once"), seconds=90
    )


def test_a_killed_head_pod_costs_one_interval_at_most(baseline: Kubectl) -> None:
    checkpoint = {"uri": "pvc://files/checkpoints/headless", "everySteps": 50}
    baseline.apply(job("headless", hyperparameters={**LONG, "maxSteps": 300}, checkpoint=checkpoint))
    baseline.wait_job("headless", lambda s: s.get("progress", {}).get("step", 0) > 50, seconds=JOB_SECONDS)
    pod = head_pod(baseline, "headless")["metadata"]["name"]
    baseline("delete", "pod", pod, "--grace-period=0", "--force", "--wait=false")
    status = baseline.finished("headless", seconds=2 * JOB_SECONDS)
    assert status["phase"] == "Succeeded", json.dumps(status, indent=1)
    assert len(status["attempts"]) == 2
    assert status["attempts"][0]["lostSteps"] <= 50

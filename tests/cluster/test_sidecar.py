"""SidecarMode with real pods: KubeRay's submitter is a container of the head pod."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.clients import Kubectl
from tests.cluster import stories
from tests.cluster.conftest import install
from tests.cluster.objects import JOB_SECONDS, NAMESPACE, Settings, delete, enforce, job
from tests.cluster.stories import Stage, Story, Told


@pytest.fixture(scope="module")
def sidecar(settings: Settings, team: Kubectl) -> Iterator[Kubectl]:
    install(settings, submission_mode="SidecarMode")
    yield team
    enforce(team, NAMESPACE, "restricted")
    install(settings)


def test_a_restricted_namespace_is_named_as_the_reason(sidecar: Kubectl) -> None:
    sidecar.apply(job("refused"))
    status = sidecar.wait_job("refused", lambda s: "PodSecurity" in s.get("message", ""), seconds=60)[
        "status"
    ]
    assert "restricted" in status["message"]
    assert status["phase"] in ("Pending", "Provisioning")
    delete(sidecar, "refused")


def a_job_succeeds(stage: Stage) -> None:
    stage.team.apply(job("sidecar-succeeds"))
    status = stage.team.finished("sidecar-succeeds", seconds=JOB_SECONDS)
    stories.ended(status, "Succeeded")
    assert [one["class"] for one in status["attempts"]] == ["Succeeded"]
    stage.runs_once("sidecar-succeeds", 1)
    delete(stage.team, "sidecar-succeeds")


def a_job_that_fails_at_once_does_not_hang(stage: Stage) -> None:
    """KubeRay itself would wait for ever: a container that has ended makes the head pod unready."""
    stories.fail_at_once(stage, "sidecar-at-once")


def a_job_that_fails_soon_does_not_hang(stage: Stage) -> None:
    stories.fail_soon(stage, "sidecar-soon")


def a_killed_head_pod_costs_one_interval_at_most(stage: Stage) -> None:
    stories.kill_head(stage, "sidecar-headless")


STORIES = (
    a_killed_head_pod_costs_one_interval_at_most,
    a_job_that_fails_at_once_does_not_hang,
    a_job_succeeds,
    a_job_that_fails_soon_does_not_hang,
)


@pytest.fixture(scope="module")
def told(request: pytest.FixtureRequest, sidecar: Kubectl, stage: Stage) -> Iterator[Told]:
    """KubeRay's container has no security context, so the namespace must not enforce `restricted`."""
    enforce(sidecar, NAMESPACE, "baseline")
    with stories.together(request, stage, at_once=2) as told:
        yield told


@pytest.mark.parametrize("story", STORIES, ids=lambda story: story.__name__)
def test_sidecar_mode(story: Story, told: Told) -> None:
    told[story].result()

"""What tools that apply and wait (Argo CD, Flux, Helm) are told by real objects in the hands of a real operator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.rayjob_player import Ending, Story
from finetune_local.cluster import Cluster
from tests.clients import FINAL, Json
from tests.integration.api_proxy import ApiProxy, Fault, Kind
from tests.integration.operators import Operator, Stage, small_job
from tests.integration.rollout_operator import Serving, deployment
from tests.kstatus import computed
from tests.unit.test_argocd import health
from tests.waiting import wait_until

pytestmark = pytest.mark.integration

PHASES = {
    "FineTuneJob": {"Succeeded": ("Current", "Healthy"), "Failed": ("Failed", "Degraded")},
    "AdapterDeployment": {
        "Healthy": ("Current", "Healthy"),
        "Degraded": ("Failed", "Degraded"),
        "Paused": ("InProgress", "Suspended"),
    },
}
UNDERWAY = ("InProgress", "Progressing")


@pytest.fixture
def story() -> Story:
    return lambda job, attempt: Ending.USER_FAULT if job == "spoilt" else Ending.WELL


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    running = Serving(tmp_path)
    yield running
    running.close()


@pytest.fixture
def operator(api: Cluster, stage: Stage, serving: Serving, tmp_path: Path) -> Iterator[Operator]:
    """Not started yet."""
    kubeconfig = api.layout.user_kubeconfig("operator")
    made = Operator(tmp_path / "o", kubeconfig, stage.kubectl.namespace, **serving.operator_environment())
    yield made
    made.kill()


def told(stage: Stage, kind: str, name: str) -> Json:
    """The object, whose phase says the same to kstatus and to Argo CD's script."""
    body = stage.kubectl.get(kind, name)
    assert body is not None
    status = body["status"]
    expected = PHASES[kind].get(status.get("phase", ""), UNDERWAY)
    if status.get("stage") == "Aborting":
        expected = ("InProgress", "Degraded")
    assert (computed(body), health(body, kind)["status"]) == expected, body
    return body


def wait_for(operator: Operator, stage: Stage, kind: str, name: str, *phases: str) -> str:
    """The first of these phases, having looked at all that came before."""

    def look() -> str | None:
        phase = told(stage, kind, name)["status"].get("phase")
        return phase if phase in phases else None

    return wait_until(look, seconds=120, what=operator.log)


def test_jobs_are_waited_for_from_the_first_moment(operator: Operator, stage: Stage) -> None:
    stage.apply("sound", "spoilt")
    for name in ("sound", "spoilt"):
        assert "phase" not in told(stage, "FineTuneJob", name)["status"]  # nobody has looked at it
    operator.start()
    ends = {name: wait_for(operator, stage, "FineTuneJob", name, *FINAL) for name in ("sound", "spoilt")}
    assert ends == {"sound": "Succeeded", "spoilt": "Failed"}


def test_a_rollout_is_waited_for_from_the_first_moment(operator: Operator, stage: Stage) -> None:
    kubectl, bot = stage.kubectl, (operator, stage, "AdapterDeployment", "bot")
    kubectl.apply(deployment("bot", "a" * 8))
    assert "phase" not in told(stage, "AdapterDeployment", "bot")["status"]
    operator.start()
    wait_for(*bot, "Healthy")
    kubectl.apply(
        deployment("bot", "b" * 8, strategy={"canary": {"steps": [{"setWeight": 50}, {"pause": {}}]}})
    )
    wait_for(*bot, "Paused")
    kubectl("annotate", "adep", "bot", "finetune.dev/action=abort")
    wait_for(*bot, "Degraded")


def test_a_job_is_started_though_a_deployment_has_read_it_first(
    proxy: ApiProxy, stage: Stage, serving: Serving, tmp_path: Path
) -> None:
    """Applied together, the deployment's pass may look at the job before the watch tells of it."""
    stage.kubectl.apply(small_job("earlier"))
    environment = serving.operator_environment()
    running = Operator(tmp_path / "o", proxy.kubeconfig, stage.kubectl.namespace, **environment)
    running.start()
    try:
        stage.finished("earlier", seconds=120)  # the watches are open
        held = proxy.add(Fault(Kind.HOLD, r"GET .*/finetunejobs\?.*watch", seconds=5))
        stage.kubectl.apply(small_job("later"))
        stage.kubectl.apply(deployment("bot", "a" * 8, adapter={"fineTuneJobRef": {"name": "later"}}))
        wait_for(running, stage, "AdapterDeployment", "bot", "Pending")
        assert held.hits
        stage.finished("later", seconds=60)
    finally:
        running.kill()

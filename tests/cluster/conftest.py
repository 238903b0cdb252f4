"""A cluster with real pods, the chart installed in it, and a volume with the tiny model and its rows.

`make e2e-cluster` runs these against whatever KUBECONFIG names. Settings, all from the environment:
FINETUNE_E2E_OPERATOR_IMAGE, FINETUNE_E2E_TRAINER_IMAGE: references that the nodes can pull or have;
FINETUNE_E2E_HOST_PATH: a folder of the one node for the volume, where the cluster has no default StorageClass;
FINETUNE_E2E_KUBELET_PID: the one node's kubelet, where it is a process of this machine;
FINETUNE_E2E_RAY_IMAGE: an image with Ray and without our trainer, for a job that fails at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients import Kubectl
from tests.cluster.objects import NAMESPACE, SYSTEM, Settings, claim, enforce, prepare, volume
from tests.cluster.stories import Stage
from tests.cluster.watching import Watcher, watch
from tests.integration.chart.helm import helm
from tools.chart_pages import CHART, NAME, ROOT


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    skip = pytest.mark.skip(reason="needs a cluster with real pods: make e2e-cluster")
    for item in items:
        if here in item.path.parents:
            item.add_marker("cluster")
            if not os.environ.get("FINETUNE_E2E"):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def settings() -> Settings:
    return Settings.load(os.environ)


@pytest.fixture(scope="session")
def system(settings: Settings) -> Kubectl:
    """kubectl in the operator's namespace."""
    return Kubectl(settings.kubeconfig, SYSTEM)


@pytest.fixture(scope="session")
def installed(settings: Settings, system: Kubectl) -> Iterator[Kubectl]:
    """The chart, installed as docs/install.md says, in a namespace that enforces `restricted`."""
    enforce(system, SYSTEM, "restricted")
    install(settings)
    yield system
    if not os.environ.get("FINETUNE_E2E_KEEP"):
        helm("uninstall", NAME, f"--namespace={SYSTEM}", "--wait", *settings.helm_flags)
        system("delete", "namespace", NAMESPACE, "--wait=false", "--ignore-not-found")


def install(settings: Settings, *, submission_mode: str = "K8sJobMode") -> None:
    helm(
        *("upgrade", "--install", NAME, str(ROOT / CHART), f"--namespace={SYSTEM}"),
        *("--wait", "--timeout=5m", *settings.helm_flags),
        values=settings.values(submission_mode),
    )


@pytest.fixture(scope="session")
def team(settings: Settings, installed: Kubectl) -> Kubectl:
    """kubectl in the namespace of the jobs; it enforces `restricted` and has the claim `files` with model and rows."""
    kubectl = Kubectl(settings.kubeconfig, NAMESPACE)
    enforce(installed, NAMESPACE, "restricted")
    if settings.host_path is not None:
        installed.apply(volume(settings.host_path))
    kubectl.apply(claim(settings.host_path is not None))
    prepare(kubectl, settings.trainer_image)
    return kubectl


@pytest.fixture(scope="session")
def watcher(settings: Settings, installed: Kubectl) -> Iterator[Watcher]:
    """Watches the jobs from the first to the last."""
    del installed  # it brings the CRD
    with watch(settings.kubeconfig, NAMESPACE, processes=settings.kubelet is not None) as watcher:
        yield watcher


@pytest.fixture(autouse=True)
def nothing_twice(watcher: Watcher) -> Iterator[None]:
    """Around each test: no attempt runs twice or beside another, and what has ended stays ended."""
    yield
    watcher.check()


@pytest.fixture(scope="session")
def stage(team: Kubectl, settings: Settings, watcher: Watcher) -> Stage:
    return Stage(team, settings, watcher)

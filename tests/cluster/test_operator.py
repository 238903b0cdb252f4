"""The operator as the chart installs it: it leads, is cut off, upgraded and removed, and jobs do not notice."""

from __future__ import annotations

import os
import signal
import time

import pytest

from tests.clients import Json, Kubectl
from tests.cluster import stories
from tests.cluster.conftest import install
from tests.cluster.objects import JOB_SECONDS, LONG, SYSTEM, Settings, job, leader, wait_for
from tests.cluster.stories import Stage
from tests.integration.chart.helm import helm
from tools.chart_pages import NAME

SUBMITTER_GONE_SECONDS = 40  # KubeRay waits 30 s after the submitter's end for news of the Ray job


def test_the_chart_runs_two_replicas_of_which_one_leads(installed: Kubectl) -> None:
    deployment = installed.get("deployment", NAME)
    assert deployment is not None
    assert deployment["status"]["readyReplicas"] == deployment["spec"]["replicas"] == 2
    pods = {
        pod["metadata"]["name"]
        for pod in installed.items("pods", "-l", "app.kubernetes.io/component=operator")
    }
    assert wait_for("a leader", lambda: leader(installed), seconds=30) in pods


def test_a_kubelet_that_is_away_for_a_minute_costs_nothing(stage: Stage) -> None:
    """The node gets NotReady and its pods leave their Services; the containers run on."""
    kubelet = stage.settings.kubelet
    if kubelet is None:
        pytest.skip("needs the node's kubelet as a process of this machine: FINETUNE_E2E_KUBELET_PID")
    stage.team.apply(job("severed", hyperparameters={**LONG, "maxSteps": 300}))
    stage.team.wait_job("severed", lambda s: s.get("progress", {}).get("step", 0) > 0, seconds=JOB_SECONDS)
    os.kill(kubelet, signal.SIGSTOP)
    try:
        time.sleep(60)
        node = stage.team.items("nodes")[0]
        ready = next(one["status"] for one in node["status"]["conditions"] if one["type"] == "Ready")
    finally:
        os.kill(kubelet, signal.SIGCONT)
    assert ready == "Unknown"
    status = stage.team.finished("severed", seconds=JOB_SECONDS)
    stories.ended(status, "Succeeded")
    assert len(status["attempts"]) == 1
    stage.runs_once("severed", 1)


def test_a_kuberay_that_is_away_while_a_job_ends_costs_nothing(stage: Stage) -> None:
    """KubeRay looks long after the submitter has ended. Whatever it makes of that, the artifact counts."""
    team, name = stage.team, "unattended"
    everywhere = team.items("deployments", "--all-namespaces")
    found = next(one for one in everywhere if one["metadata"]["name"] == "kuberay-operator")
    kuberay = f"deployment/{found['metadata']['name']}", f"--namespace={found['metadata']['namespace']}"
    team.apply(job(name, hyperparameters={**LONG, "maxSteps": 200}))
    team.wait_job(name, lambda s: s.get("progress", {}).get("step", 0) > 0, seconds=JOB_SECONDS)
    team("scale", *kuberay, "--replicas=0")
    try:
        team("wait", f"job/{name}-a1", "--for=condition=Complete", f"--timeout={JOB_SECONDS}s")
        time.sleep(SUBMITTER_GONE_SECONDS)
    finally:
        team("scale", *kuberay, "--replicas=1")
    status = team.finished(name, seconds=JOB_SECONDS)
    stories.ended(status, "Succeeded")
    assert len(status["attempts"]) == 1
    stage.runs_once(name, 1)


def test_a_new_leader_needs_no_dns(team: Kubectl, installed: Kubectl) -> None:
    """It finds the API server by its address, as everything in a cluster does that must work while DNS does not."""
    dns = team.items("deployments", "--all-namespaces")
    found = [one["metadata"] for one in dns if one["metadata"]["name"] == "coredns"]
    if not found:
        pytest.skip("needs CoreDNS as a Deployment of that name")
    coredns = "deployment/coredns", f"--namespace={found[0]['namespace']}"
    team("scale", *coredns, "--replicas=0")
    try:
        before = leader(installed)
        installed("delete", "pod", before, "--grace-period=0", "--force", "--wait=false")
        wait_for("another leader", lambda: leader(installed) not in (before, ""), seconds=60)
        team.apply(job("nameless", suspend=True))
        team.wait_job("nameless", lambda s: s.get("phase") == "Suspended", seconds=60)
    finally:
        team("scale", *coredns, "--replicas=1")
    team("delete", "ftj", "nameless", "--wait")


def test_an_upgrade_leaves_what_it_generated(installed: Kubectl, settings: Settings) -> None:
    def secrets() -> dict[str, Json]:
        names = (f"{NAME}-tls", "finetune-router-secrets")
        found = {name: installed.get("secret", name) for name in names}
        return {name: secret["data"] for name, secret in found.items() if secret is not None}

    before = secrets()
    assert set(before) == {f"{NAME}-tls", "finetune-router-secrets"}
    install(settings)
    assert secrets() == before


def test_uninstalling_keeps_jobs(team: Kubectl, settings: Settings) -> None:
    team.apply(job("kept", suspend=True))
    team.wait_job("kept", lambda s: s.get("phase") == "Suspended", seconds=30)
    helm("uninstall", NAME, f"--namespace={SYSTEM}", "--wait", *settings.helm_flags)
    assert team.get("ftj", "kept") is not None
    team("delete", "ftj", "--all", "--wait", "--timeout=60s")  # no finalizer of ours holds them
    install(settings)

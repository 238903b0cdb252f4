"""The operator as the chart installs it, with real pods: one story per fault, no attempt twice, little work lost."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from tests.clients import Json, Kubectl
from tests.cluster.conftest import install
from tests.cluster.objects import (
    JOB_SECONDS,
    LONG,
    SYSTEM,
    Settings,
    head_pod,
    job,
    leader,
    run_pod,
    wait_for,
)
from tests.integration.chart.helm import helm
from tools.chart_pages import NAME


def running_pods(kubectl: Kubectl) -> list[str]:
    return [
        pod["metadata"]["name"]
        for pod in kubectl.items("pods")
        if pod["status"]["phase"] not in ("Succeeded", "Failed")
    ]


def test_the_chart_runs_two_replicas_of_which_one_leads(installed: Kubectl) -> None:
    deployment = installed.get("deployment", NAME)
    assert deployment is not None
    assert deployment["status"]["readyReplicas"] == deployment["spec"]["replicas"] == 2
    pods = {
        pod["metadata"]["name"]
        for pod in installed.items("pods", "-l", "app.kubernetes.io/component=operator")
    }
    assert wait_for("a leader", lambda: leader(installed), seconds=30) in pods


def test_a_job_succeeds_and_reports_over_tls(team: Kubectl, installed: Kubectl, settings: Settings) -> None:
    team("create", "secret", "generic", "dataset", "--from-literal=DATASET_TOKEN=secret")
    sources = {"sources": [{"uri": "pvc://files/chat.jsonl"}], "secretRef": {"name": "dataset"}}
    team.apply(job("succeeds", dataset=sources))
    status = team.finished("succeeds", seconds=JOB_SECONDS)
    assert status["phase"] == "Succeeded", json.dumps(status, indent=1)
    assert [a["class"] for a in status["attempts"]] == ["Succeeded"]
    assert status["progress"]["step"] == 20
    assert status["artifact"]["digest"].startswith("sha256:")
    # The digest that the trainer reported is that of the manifest on the volume.
    folder = status["artifact"]["uri"].removeprefix("pvc://files/")
    script = (
        f"import hashlib;print(hashlib.sha256(open('/files/{folder}/manifest.json','rb').read()).hexdigest())"
    )
    printed = run_pod(team, "digest", settings.trainer_image, script, seconds=120)
    assert status["artifact"]["digest"] == f"sha256:{printed.strip()}"
    # KubeRay keeps the submitter's pod, which has ended, for its log.
    wait_for("no pod runs", lambda: not running_pods(team), seconds=90)


def test_a_drained_pod_saves_a_checkpoint_first(team: Kubectl) -> None:
    """Deleting the pod runs the preStop hook: the attempt ends as Preempted and the next one loses nothing."""
    team.apply(
        job(
            "drained",
            hyperparameters=LONG,
            checkpoint={"uri": "pvc://files/checkpoints/drained", "everySteps": 500},
        )
    )
    team.wait_job("drained", lambda s: s.get("progress", {}).get("step", 0) > 20, seconds=JOB_SECONDS)
    pod = head_pod(team, "drained")["metadata"]["name"]
    team("delete", "pod", pod, "--wait=false")
    status = team.wait_job("drained", lambda s: len(s.get("attempts", [])) == 2, seconds=JOB_SECONDS)[
        "status"
    ]
    first = status["attempts"][0]
    assert first["class"] == "Preempted", json.dumps(status["attempts"], indent=1)
    status = team.wait_job(
        "drained", lambda s: s["attempts"][-1].get("resumedFromStep") is not None, seconds=JOB_SECONDS
    )["status"]
    resumed = status["attempts"][-1]["resumedFromStep"]
    assert resumed % 500 != 0, "it resumed from the checkpoint of the hook"
    assert status["attempts"][0].get("lostSteps", 0) <= 1
    team("annotate", "ftj", "drained", "finetune.dev/action=cancel")
    assert team.finished("drained", seconds=120)["phase"] == "Cancelled"


def test_a_killed_pod_costs_one_interval_at_most(team: Kubectl) -> None:
    interval = 50
    checkpoint = {"uri": "pvc://files/checkpoints/killed", "everySteps": interval}
    team.apply(job("killed", hyperparameters={**LONG, "maxSteps": 600}, checkpoint=checkpoint))
    team.wait_job("killed", lambda s: s.get("progress", {}).get("step", 0) > interval, seconds=JOB_SECONDS)
    pod = head_pod(team, "killed")["metadata"]["name"]
    team("delete", "pod", pod, "--grace-period=0", "--force", "--wait=false")
    status = team.finished("killed", seconds=2 * JOB_SECONDS)
    assert status["phase"] == "Succeeded", json.dumps(status, indent=1)
    assert len(status["attempts"]) == 2
    assert status["attempts"][0]["lostSteps"] <= interval
    assert status["attempts"][1]["resumedFromStep"] >= interval


KILL_TRAINER = """
import os
import signal

for number in filter(str.isdigit, os.listdir("/proc")):
    with open(f"/proc/{number}/cmdline", "rb") as file:
        words = file.read().split(b"\\0")
    if any(word.endswith(b"finetune-trainer") for word in words[:2]):
        os.kill(int(number), signal.SIGKILL)
        print("killed", number)
"""


def test_a_killed_trainer_costs_one_interval_at_most(team: Kubectl) -> None:
    """The process dies, its pod and Ray live on."""
    checkpoint = {"uri": "pvc://files/checkpoints/shot", "everySteps": 50}
    team.apply(job("shot", hyperparameters={**LONG, "maxSteps": 300}, checkpoint=checkpoint))
    team.wait_job("shot", lambda s: s.get("progress", {}).get("step", 0) > 50, seconds=JOB_SECONDS)
    pod = head_pod(team, "shot")["metadata"]["name"]
    assert "killed" in team("exec", pod, "-c", "ray-head", "--", "python", "-c", KILL_TRAINER)
    status = team.finished("shot", seconds=2 * JOB_SECONDS)
    assert status["phase"] == "Succeeded", json.dumps(status, indent=1)
    assert len(status["attempts"]) == 2
    assert status["attempts"][0]["lostSteps"] <= 50
    assert status["attempts"][1]["resumedFromStep"] >= 50


def test_a_kubelet_that_is_away_for_a_minute_costs_nothing(team: Kubectl, settings: Settings) -> None:
    """The node gets NotReady and its pods leave their Services; the containers run on."""
    if settings.kubelet is None:
        pytest.skip("needs the node's kubelet as a process of this machine: FINETUNE_E2E_KUBELET_PID")
    team.apply(job("severed", hyperparameters={**LONG, "maxSteps": 600}))
    team.wait_job("severed", lambda s: s.get("progress", {}).get("step", 0) > 0, seconds=JOB_SECONDS)
    os.kill(settings.kubelet, signal.SIGSTOP)
    try:
        time.sleep(60)
        node = team.items("nodes")[0]
        ready = next(one["status"] for one in node["status"]["conditions"] if one["type"] == "Ready")
    finally:
        os.kill(settings.kubelet, signal.SIGCONT)
    assert ready == "Unknown"
    status = team.finished("severed", seconds=2 * JOB_SECONDS)
    assert status["phase"] == "Succeeded", json.dumps(status, indent=1)
    assert len(status["attempts"]) == 1


def test_the_leaders_death_is_not_noticed(team: Kubectl, installed: Kubectl) -> None:
    team.apply(job("unnoticed", hyperparameters={**LONG, "maxSteps": 300}))
    team.wait_job("unnoticed", lambda s: s.get("phase") == "Running", seconds=JOB_SECONDS)
    before = leader(installed)
    installed("delete", "pod", before, "--grace-period=0", "--force", "--wait=false")
    after = wait_for(
        "another leader", lambda: leader(installed) if leader(installed) != before else None, seconds=60
    )
    assert after != before
    status = team.finished("unnoticed", seconds=JOB_SECONDS)
    assert status["phase"] == "Succeeded", json.dumps(status, indent=1)
    assert len(status["attempts"]) == 1


@pytest.mark.parametrize("phase", ["Provisioning", "Running"])
def test_deletion_leaves_nothing(team: Kubectl, phase: str) -> None:
    name = f"deleted-{phase.lower()}"
    team.apply(job(name, hyperparameters=LONG))
    team.wait_job(name, lambda s: s.get("phase") == phase, seconds=JOB_SECONDS)
    team("delete", "ftj", name, "--wait", "--timeout=60s")

    def left() -> list[str]:
        return [
            f"{kind} {item['metadata']['name']}"
            for kind in ("rayjobs", "rayclusters", "jobs", "pods", "services", "configmaps")
            for item in team.items(kind)
            if item["metadata"]["name"].startswith(name)
        ]

    wait_for("nothing left", lambda: not left(), seconds=150)


def test_an_upgrade_leaves_what_it_generated(team: Kubectl, installed: Kubectl, settings: Settings) -> None:
    def secrets() -> dict[str, Json]:
        names = (f"{NAME}-tls", "finetune-router-secrets")
        found = {name: installed.get("secret", name) for name in names}
        return {name: secret["data"] for name, secret in found.items() if secret is not None}

    before = secrets()
    assert set(before) == {f"{NAME}-tls", "finetune-router-secrets"}
    install(settings)
    assert secrets() == before


def test_uninstalling_keeps_jobs(team: Kubectl, installed: Kubectl, settings: Settings) -> None:
    helm("uninstall", NAME, f"--namespace={SYSTEM}", "--wait", *settings.helm_flags)
    assert team.get("ftj", "succeeds") is not None
    team("delete", "ftj", "--all", "--wait", "--timeout=60s")  # no finalizer of ours holds them
    install(settings)

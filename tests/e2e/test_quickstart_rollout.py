"""The second half of the quickstart: the adapter serves beside the base model; a spoilt one is rolled back."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_local import parts
from finetune_local.cluster import Cluster
from tests.clients import Kubectl

pytestmark = [pytest.mark.integration, pytest.mark.e2e]

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "quickstart"
DEPLOYMENT = "support-triage"
BASE = "smollm2-135m-instruct"
# Name -> what the example's file is and how far it is trained: enough for the form of the answers.
JOBS = {"triage-short": ("finetunejob.yaml", 20), "triage-spoilt-short": ("finetunejob-spoilt.yaml", 8)}


def run(cluster: Cluster, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command],
        env=environment(cluster),
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )


def environment(cluster: Cluster) -> dict[str, str]:
    address = {"OPENAI_BASE_URL": str(cluster.openai_base_url), "OPENAI_API_KEY": "none"}
    return {**os.environ, **address, "KUBECONFIG": str(cluster.kubeconfig)}


def wanting(job: str) -> dict[str, Any]:
    """The example's deployment over one of our jobs."""
    body: dict[str, Any] = yaml.safe_load((EXAMPLE / "adapterdeployment.yaml").read_text(encoding="utf-8"))
    body["spec"]["adapter"]["fineTuneJobRef"]["name"] = job
    return body


@pytest.fixture(scope="module")
def base_model() -> None:
    """SmolLM2-135M-Instruct in the cache; converted there the first time, which takes about a minute."""
    subprocess.run(
        [sys.executable, "-m", "finetune_local.models"], stdout=subprocess.DEVNULL, timeout=900, check=True
    )


@pytest.fixture(scope="module")
def served(cluster: Cluster, base_model: None) -> Iterator[Kubectl]:
    """Both jobs trained, one after the other; then router and engine over the real base model, and the deployment."""
    kubectl = Kubectl(cluster.kubeconfig, "default")
    for name, (file, steps) in JOBS.items():
        job = yaml.safe_load((EXAMPLE / file).read_text(encoding="utf-8"))
        job["metadata"]["name"] = name
        job["spec"]["hyperparameters"] |= {"maxSteps": steps, "evalSteps": steps}
        kubectl.apply(job)
        assert kubectl.finished(name, seconds=900)["phase"] == "Succeeded"
    cluster.engine_model = None
    cluster.up(parts.SERVING)
    kubectl.apply(wanting("triage-short"))
    watched = run(cluster, "-m", "finetune_cli", "rollout", "watch", DEPLOYMENT, "--timeout", "5m")
    assert watched.returncode == 0, watched.stdout + watched.stderr
    yield kubectl
    kubectl("delete", "adep", DEPLOYMENT)
    kubectl("delete", "ftj", *JOBS)


def status_of(kubectl: Kubectl) -> dict[str, Any]:
    found = kubectl.get("adep", DEPLOYMENT)
    assert found is not None
    status: dict[str, Any] = found["status"]
    return status


def test_alias_and_base_model_answer_by_one_url(cluster: Cluster, served: Kubectl) -> None:
    asked = run(cluster, str(EXAMPLE / "ask.py"), DEPLOYMENT, BASE)
    assert asked.returncode == 0, asked.stderr
    adapter, base = asked.stdout.strip().split("\n", 1)
    assert set(json.loads(adapter.removeprefix(f"{DEPLOYMENT}: "))) == {"category", "priority", "summary"}
    assert base.startswith(f"{BASE}: ")
    assert '"category"' not in base
    assert status_of(served)["phase"] == "Healthy"


def test_a_spoilt_adapter_is_rolled_back_and_no_request_fails(
    cluster: Cluster, served: Kubectl, tmp_path: Path
) -> None:
    before = status_of(served)["stableRevision"]
    summary = tmp_path / "users.json"
    users = subprocess.Popen(
        [sys.executable, str(EXAMPLE / "users.py"), "--summary", str(summary)],
        env=environment(cluster),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        served.apply(wanting("triage-spoilt-short"))
        watched = run(cluster, "-m", "finetune_cli", "rollout", "watch", DEPLOYMENT, "--timeout", "10m")
    finally:
        users.send_signal(signal.SIGINT)
        complaints = users.communicate(timeout=300)[1]
    assert watched.returncode == 1, watched.stdout
    assert users.returncode == 0, complaints

    status = status_of(served)
    assert status["abort"]["reason"] == "GuardrailBreached", status["abort"]
    assert "invalid-output" in status["abort"]["message"]
    assert (status["phase"], status["stableRevision"], status["weights"]["candidate"]) == (
        "Degraded",
        before,
        0,
    )
    seen = json.loads(summary.read_text(encoding="utf-8"))
    assert seen["failed"] == 0, complaints
    candidate = seen["revisions"][status["abort"]["revision"]]
    assert candidate["valid"] == 0
    assert candidate["answers"] > 0

    told = subprocess.run(
        [sys.executable, str(EXAMPLE / "story.py"), str(summary)],
        input=served("get", "adep", DEPLOYMENT, "-o", "json"),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "triage-spoilt-short" in told.stdout
    assert "Aborted" in told.stdout

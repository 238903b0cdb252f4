"""The quickstart as the README has it, with fewer steps: apply, watch, compare with the base model; then the adapter
serves beside that, and a spoilt one is rolled back."""

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
STEPS = 30
JOB, SPOILT = "triage-e2e", "triage-spoilt-e2e"
SPOILT_STEPS = 8  # enough for the form of the answers
DEPLOYMENT = "support-triage"
BASE = "smollm2-135m-instruct"


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


def job(name: str, file: str, *, steps: int) -> dict[str, Any]:
    """The example's job under another name, shorter."""
    body: dict[str, Any] = yaml.safe_load((EXAMPLE / file).read_text(encoding="utf-8"))
    body["metadata"]["name"] = name
    body["spec"]["hyperparameters"] |= {"maxSteps": steps, "evalSteps": steps}
    return body


@pytest.fixture(scope="module")
def base_model() -> Path:
    """SmolLM2-135M-Instruct in the cache; converted there the first time, which takes about a minute."""
    done = subprocess.run(
        [sys.executable, "-m", "finetune_local.models"],
        stdout=subprocess.PIPE,
        text=True,
        timeout=900,
        check=True,
    )
    return Path(done.stdout.strip())


@pytest.fixture(scope="module")
def trained(cluster: Cluster, base_model: Path) -> Iterator[dict[str, Any]]:
    """The example's job after `finetune jobs watch`; the volumes that it names are those of `finetune local up`."""
    del base_model  # the claim `models` is the folder that it is in
    kubectl = Kubectl(cluster.kubeconfig, "default")
    kubectl.apply(job(JOB, "finetunejob.yaml", steps=STEPS))
    watched = run(cluster, "-m", "finetune_cli", "jobs", "watch", JOB, "--timeout", "20m")
    assert watched.returncode == 0, watched.stdout + watched.stderr
    yield {"status": kubectl.job(JOB)["status"], "watched": watched.stdout}
    kubectl("delete", "ftj", JOB)


def test_the_example_trains_to_an_artifact(trained: dict[str, Any]) -> None:
    status = trained["status"]
    assert status["phase"] == "Succeeded"
    assert (status["progress"]["step"], status["progress"]["totalSteps"]) == (STEPS, STEPS)
    assert status["artifact"]["baseModel"] == "pvc://models/smollm2-135m-instruct"


def test_watching_shows_progress_line_by_line_where_there_is_no_terminal(trained: dict[str, Any]) -> None:
    text = trained["watched"]
    # A phase that is over before the next look is not seen, and Provisioning may take less than a second.
    assert any(word in text for word in ("Pending", "Validating", "Provisioning"))
    for word in ("Running", "Succeeded", "loss"):
        assert word in text
    assert f"/{STEPS}" in text


def test_the_adapter_has_learnt_the_task_and_the_base_model_cannot_do_it(
    trained: dict[str, Any], base_model: Path
) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "finetune_trainer", "compare"),
            *("--base", str(base_model), "--adapter", trained["status"]["artifact"]["uri"]),
            *("--data", str(EXAMPLE / "heldout.jsonl"), "--limit", "32"),
            *("--json-keys", "category,priority,summary", "--match", "category", "--output", "json"),
        ],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    base, adapter = (json.loads(done.stdout)[side] for side in ("base", "adapter"))
    assert base["validJson"] < 20
    assert adapter["validJson"] >= 80
    assert adapter["match"]["category"] > base["match"]["category"] + 20
    assert adapter["evalLoss"] < base["evalLoss"] / 2


# ---------------------------------------------------------------- the second half: it serves


@pytest.fixture(scope="module")
def served(cluster: Cluster, trained: dict[str, Any]) -> Iterator[Kubectl]:
    """A spoilt adapter beside the good one; then router and engine over the real base model, and the deployment."""
    kubectl = Kubectl(cluster.kubeconfig, "default")
    kubectl.apply(job(SPOILT, "finetunejob-spoilt.yaml", steps=SPOILT_STEPS))
    assert kubectl.finished(SPOILT, seconds=900)["phase"] == "Succeeded"
    cluster.engine_model = None
    cluster.up(parts.SERVING)
    kubectl.apply(wanting(JOB))
    watched = run(cluster, "-m", "finetune_cli", "rollout", "watch", DEPLOYMENT, "--timeout", "5m")
    assert watched.returncode == 0, watched.stdout + watched.stderr
    yield kubectl
    kubectl("delete", "adep", DEPLOYMENT)
    kubectl("delete", "ftj", SPOILT)


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
        served.apply(wanting(SPOILT))
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
    assert SPOILT in told.stdout
    assert "Aborted" in told.stdout

"""The quickstart as the README has it, with fewer steps: apply, watch, compare with the base model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_local.cluster import Cluster
from tests.clients import Kubectl

pytestmark = [pytest.mark.integration, pytest.mark.e2e]

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "quickstart"
STEPS = 60
JOB = "triage-e2e"


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
    job = yaml.safe_load((EXAMPLE / "finetunejob.yaml").read_text())
    job["metadata"]["name"] = JOB
    job["spec"]["hyperparameters"] |= {"maxSteps": STEPS, "evalSteps": STEPS}
    kubectl = Kubectl(cluster.kubeconfig, "default")
    kubectl.apply(job)
    watched = finetune(cluster, "jobs", "watch", JOB, "--timeout", "20m")
    assert watched.returncode == 0, watched.stdout + watched.stderr
    yield {"status": kubectl.job(JOB)["status"], "watched": watched.stdout}
    kubectl("delete", "ftj", JOB)


def finetune(cluster: Cluster, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "finetune_cli", *arguments],
        env={**os.environ, "KUBECONFIG": str(cluster.kubeconfig)},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )


def test_the_example_trains_to_an_artifact(trained: dict[str, Any]) -> None:
    status = trained["status"]
    assert status["phase"] == "Succeeded"
    assert (status["progress"]["step"], status["progress"]["totalSteps"]) == (STEPS, STEPS)
    assert status["artifact"]["baseModel"] == "pvc://models/smollm2-135m-instruct"


def test_watching_shows_progress_line_by_line_where_there_is_no_terminal(trained: dict[str, Any]) -> None:
    text = trained["watched"]
    for word in ("Provisioning", "Running", "Succeeded", "loss"):
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

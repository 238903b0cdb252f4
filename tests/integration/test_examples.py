"""The examples are applied as they lie there, over the tiny model, and each ends with an artifact."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_local.cluster import Cluster
from tests.clients import Json, Kubectl

pytestmark = pytest.mark.integration

EXAMPLES = Path(__file__).parents[2] / "examples"
# What a file needs besides the tiny model: its byte-level tokenizer makes about four times as many tokens.
CHANGES: dict[str, dict[str, Any]] = {
    "formats/messages.yaml": {},
    "formats/prompt-completion.yaml": {},
    "formats/alpaca.yaml": {},
    "formats/text.yaml": {},
    "quickstart/finetunejob-qlora.yaml": {"maxLength": 512, "maxSteps": 4, "evalSteps": 4},
}


def read_job(name: str, model: Path) -> Json:
    job: Json = yaml.safe_load((EXAMPLES / name).read_text(encoding="utf-8"))
    job["spec"]["model"]["uri"] = f"file://{model}"
    job["spec"]["hyperparameters"] |= CHANGES[name]
    return job


@pytest.fixture(scope="module")
def outcomes(cluster: Cluster, tiny_model: Path) -> Iterator[Callable[[str], Json]]:
    """All examples are applied at once, in the namespace whose claims they name: each is mostly start-up."""
    kubectl = Kubectl(cluster.kubeconfig, "default")
    jobs = {name: read_job(name, tiny_model) for name in CHANGES}
    for job in jobs.values():
        kubectl.apply(job)
    yield lambda name: kubectl.finished(jobs[name]["metadata"]["name"], seconds=300)
    for job in jobs.values():
        kubectl("delete", "ftj", job["metadata"]["name"])


@pytest.mark.parametrize("name", CHANGES)
def test_an_example_ends_with_an_artifact(name: str, outcomes: Callable[[str], Json]) -> None:
    status = outcomes(name)
    assert status["phase"] == "Succeeded", status["message"]
    assert status["progress"]["step"] == status["progress"]["totalSteps"]
    folder = Path(status["artifact"]["uri"].removeprefix("file://"))
    manifest = (folder / "manifest.json").read_bytes()
    assert status["artifact"]["digest"] == f"sha256:{hashlib.sha256(manifest).hexdigest()}"
    listed = {file["path"] for file in json.loads(manifest)["files"]}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= listed

"""The examples' AdapterDeployments fit the jobs, the data and the users that they are shown with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from finetune_operator.api.adapterdeployment import AdapterDeploymentSpec

EXAMPLES = Path(__file__).parents[3] / "examples"
QUICKSTART = EXAMPLES / "quickstart"
CLAIM = "pvc://files/"


def read(path: Path) -> list[dict[str, Any]]:
    return [one for one in yaml.safe_load_all(path.read_text(encoding="utf-8")) if isinstance(one, dict)]


OBJECTS = {str(path.relative_to(EXAMPLES)): one for path in EXAMPLES.rglob("*.yaml") for one in read(path)}
DEPLOYMENTS = {name: one for name, one in OBJECTS.items() if one.get("kind") == "AdapterDeployment"}
JOBS = {one["metadata"]["name"] for one in OBJECTS.values() if one.get("kind") == "FineTuneJob"}
SCHEMA = DEPLOYMENTS["quickstart/adapterdeployment.yaml"]["spec"]["traffic"]["outputSchema"]


def test_there_is_one_file_per_story() -> None:
    assert set(DEPLOYMENTS) == {
        "quickstart/adapterdeployment.yaml",
        "rollouts/approval-gated.yaml",
        "rollouts/canary.yaml",
        "rollouts/first-deployment.yaml",
        "rollouts/gitops-promotion/adapterdeployment.yaml",
        "rollouts/per-tenant-pin.yaml",
        "rollouts/shadow.yaml",
    }
    names = [one["metadata"]["name"] for one in DEPLOYMENTS.values()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("body", DEPLOYMENTS.values(), ids=DEPLOYMENTS)
def test_models_jobs_and_golden_rows_are_there(body: dict[str, Any]) -> None:
    spec = AdapterDeploymentSpec.model_validate(body["spec"])
    assert spec.base_model_ref.name == "smollm2-135m-instruct"
    assert spec.adapter.fine_tune_job_ref is not None
    assert spec.adapter.fine_tune_job_ref.name in JOBS
    for evaluation in spec.evaluations:
        path = EXAMPLES.parent / evaluation.uri.removeprefix(CLAIM)
        answer = json.loads(
            json.loads(path.read_text(encoding="utf-8").splitlines()[0])["messages"][-1]["content"]
        )
        assert set(evaluation.fields or ()) <= set(answer)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_what_the_adapters_learn_is_what_the_output_schema_asks_for(split: str) -> None:
    validator = jsonschema_rs.validator_for(SCHEMA)
    for line in (QUICKSTART / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
        validator.validate(json.loads(json.loads(line)["messages"][-1]["content"]))


def test_the_canary_example_has_the_same_output_schema() -> None:
    assert DEPLOYMENTS["rollouts/canary.yaml"]["spec"]["traffic"]["outputSchema"] == SCHEMA


def test_the_later_jobs_differ_from_the_first_only_in_name_data_and_steps() -> None:
    jobs = [OBJECTS[f"quickstart/finetunejob{suffix}.yaml"] for suffix in ("", "-better", "-spoilt")]
    steps = [job["spec"]["hyperparameters"].pop("maxSteps") for job in jobs]
    assert steps[0] < steps[1]
    for job in jobs:
        job["spec"]["hyperparameters"].pop("evalSteps")
        job["spec"].pop("dataset")
        job["spec"].setdefault("objective", "SFT")
    assert jobs[0]["spec"] == jobs[1]["spec"] == jobs[2]["spec"]

"""Files checked without a cluster. That the words are the API server's: tests/integration/crds/offline.py."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from finetune_cli import specs
from finetune_cli.__main__ import app
from finetune_cli.kinds import DEPLOYMENT, JOB
from tests.integration import bad_deployments, bad_jobs, good_deployments
from tests.patches import merged

ROOT = Path(__file__).parents[3]
GRPO = {"objective": "GRPO"}
NO_REWARD = (
    "spec.reward: Required value: RLOO and GRPO learn from rewards; "
    "name a reward model (fineTuneJobRef or uri) or functions"
)


def job(spec: dict[str, Any] | None = None, **metadata: Any) -> dict[str, Any]:
    body = copy.deepcopy(bad_jobs.GOOD)
    body["metadata"] = metadata or body["metadata"]
    result: dict[str, Any] = merged(body, {"spec": spec or {}})
    return result


def test_good_objects_have_no_problems() -> None:
    assert specs.find_problems(JOB, job()) == []
    assert specs.find_problems(DEPLOYMENT, bad_deployments.GOOD) == []
    assert specs.find_problems(DEPLOYMENT, good_deployments.PROMISED) == []


def test_unknown_fields_and_broken_rules_are_told_together() -> None:
    problems = specs.find_problems(JOB, job({**GRPO, "hyperparamters": {}}))
    assert problems == ["spec.hyperparamters: unknown field; did you mean hyperparameters?", NO_REWARD]


@pytest.mark.parametrize(
    ("metadata", "problem"),
    [
        ({"generateName": "try-"}, None),
        ({"labels": {}}, "metadata.name: Required value: name or generateName is required"),
        ({"name": "My_Job"}, 'metadata.name: "My_Job": must be lower-case letters'),
        ({"name": "a" * 41}, f"metadata.name: {'a' * 41} is too long"),
        ({"generateName": "a" * 36}, f"metadata.name: {'a' * 36}xxxxx is too long"),
    ],
)
def test_names(metadata: dict[str, Any], problem: str | None) -> None:
    problems = specs.find_problems(JOB, job(**metadata))
    assert bool(problems) == bool(problem)
    assert not problem or problems[0].startswith(problem)


@pytest.mark.parametrize("command", [["plan"], ["jobs", "validate", "--offline"]])
def test_commands_refuse_what_breaks_a_rule(tmp_path: Path, command: list[str]) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(job(GRPO)), encoding="utf-8")
    done = CliRunner().invoke(app, [*command, "-f", str(file)], env={"KUBECONFIG": str(tmp_path / "none")})
    assert done.exit_code == 1
    assert done.output == f"{file}: FineTuneJob {job()['metadata']['name']}: not valid\n  {NO_REWARD}\n"


def test_every_example_is_valid_without_a_cluster() -> None:
    checked = 0
    for path in sorted((ROOT / "examples").rglob("*.yaml")):
        for one in filter(None, yaml.safe_load_all(path.read_text(encoding="utf-8"))):
            for kind in (JOB, DEPLOYMENT):
                if one.get("kind") == kind.name:
                    assert specs.find_problems(kind, one) == [], path
                    checked += 1
    assert checked > 10

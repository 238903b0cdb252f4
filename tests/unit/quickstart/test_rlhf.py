"""examples/rlhf: what the jobs name is there, is read in the right format, and its behaviour can be counted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_operator.api.finetunejob import FineTuneJobSpec
from finetune_trainer.data import files, formats
from finetune_trainer.data.shapes import Preference, Prompt
from finetune_trainer.rewards import functions
from finetune_trainer.runfile import Objective, Source

EXAMPLE = Path(__file__).parents[3] / "examples" / "rlhf"
CLAIM = "pvc://files/"


def read(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((EXAMPLE / name).read_text(encoding="utf-8")))


JOBS = {
    name: read(name)[-1]
    for name in ("1-sft.yaml", "2-reward-model.yaml", "3-rloo.yaml", "dpo.yaml", "grpo.yaml")
}


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_the_data_is_what_the_objective_reads(job: dict[str, Any]) -> None:
    spec = FineTuneJobSpec.model_validate(job["spec"])
    source = Source.model_validate(job["spec"]["dataset"]["sources"][0])
    rows = files.read_rows(EXAMPLE.parents[1] / source.uri.removeprefix(CLAIM), uri=source.uri)
    assert len(formats.parse_for(Objective(spec.objective), rows, source)) >= 64


def test_the_jobs_refer_to_one_another() -> None:
    names = {job["metadata"]["name"] for job in JOBS.values()}
    references = [
        job["spec"][part]["fineTuneJobRef"]["name"]
        for job in JOBS.values()
        for part in ("model", "reward")
        if "fineTuneJobRef" in job["spec"].get(part, {})
    ]
    assert len(references) == 5
    assert set(references) <= names


def test_the_data_files_are_those_that_the_script_makes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(EXAMPLE / "make_data.py"), "--out", str(tmp_path)], check=True)
    for name in ("demonstrations", "preferences", "prompts"):
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (EXAMPLE / f"{name}.jsonl").read_bytes()


def rows_of(name: str, objective: Objective) -> list[Any]:
    source = Source(uri=f"file://{EXAMPLE}/{name}.jsonl")
    return list(
        formats.parse_for(objective, files.read_rows(EXAMPLE / f"{name}.jsonl", uri=source.uri), source)
    )


def test_prompts_are_new_to_the_model_that_answers_them() -> None:
    prompts = {row.given for row in rows_of("prompts", Objective.RLOO) if isinstance(row, Prompt)}
    known = {
        json.loads(line)["prompt"] for line in (EXAMPLE / "demonstrations.jsonl").read_text().splitlines()
    }
    assert len(prompts) == 64
    assert not prompts & known


def test_the_functions_of_the_grpo_job_judge_what_the_preferences_like() -> None:
    (text,) = read("grpo.yaml")[0]["data"].values()
    polite, right = (
        functions.load(functions.Source("grpo.yaml", entry, "rewards.py", text))
        for entry in ("polite", "right")
    )
    for row in rows_of("preferences", Objective.DPO):
        assert isinstance(row, Preference)
        chosen, rejected = row.chosen.completion, row.rejected.completion  # type: ignore[union-attr]
        better, worse = polite(["q", "q"], [chosen, rejected], {})
        assert (better, worse) == (1.0, 0.0)
        fact = chosen.split("!")[1].split("?")[0].strip().removesuffix(" Can I help with anything else")
        assert right(["q"], [chosen], {"expected": [fact]}) == [1.0]

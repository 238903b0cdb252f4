"""Every example is one that the API and the trainer accept, and names files that are there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from pyarrow import parquet

from finetune_operator.api.finetunejob import MAX_NAME_LENGTH, FineTuneJobSpec
from finetune_trainer.data import files, formats
from finetune_trainer.runfile import DataFormat, Source

EXAMPLES = Path(__file__).parents[3] / "examples"
FORMATS = EXAMPLES / "formats"
CLAIM = "pvc://files/"


def read_jobs() -> dict[str, dict[str, Any]]:
    return {
        str(path.relative_to(EXAMPLES)): yaml.safe_load(path.read_text(encoding="utf-8"))
        for folder in ("quickstart", "formats")
        for path in sorted((EXAMPLES / folder).glob("*.yaml"))
        if path.name not in ("tickets.yaml", "adapterdeployment.yaml")
    }


JOBS = read_jobs()


def source_of(job: dict[str, Any]) -> tuple[Path, Source]:
    source = Source.model_validate(job["spec"]["dataset"]["sources"][0])
    return EXAMPLES.parent / source.uri.removeprefix(CLAIM), source


def test_names_are_short_and_unique() -> None:
    names = [job["metadata"]["name"] for job in JOBS.values()]
    assert len(set(names)) == len(names) == 8
    assert all(len(name) <= MAX_NAME_LENGTH for name in names)


@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS)
def test_spec_is_accepted_by_the_api(job: dict[str, Any]) -> None:
    assert (job["apiVersion"], job["kind"]) == ("finetune.dev/v1alpha1", "FineTuneJob")
    FineTuneJobSpec.model_validate(job["spec"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("quickstart/finetunejob.yaml", DataFormat.MESSAGES),
        ("quickstart/finetunejob-qlora.yaml", DataFormat.MESSAGES),
        ("quickstart/finetunejob-better.yaml", DataFormat.MESSAGES),
        ("quickstart/finetunejob-spoilt.yaml", DataFormat.MESSAGES),
        ("formats/messages.yaml", DataFormat.MESSAGES),
        ("formats/prompt-completion.yaml", DataFormat.PROMPT_COMPLETION),
        ("formats/alpaca.yaml", DataFormat.ALPACA),
        ("formats/text.yaml", DataFormat.TEXT),
    ],
)
def test_data_is_read_in_the_format_that_the_example_is_about(name: str, expected: DataFormat) -> None:
    path, source = source_of(JOBS[name])
    rows = files.read_rows(path, uri=source.uri)
    assert formats.detect_format(rows[0], source)[0] is expected
    assert len(formats.parse_rows(rows, source)) >= 20


def test_data_files_of_the_formats_are_those_that_the_script_makes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(FORMATS / "make_files.py"), "--out", str(tmp_path)], check=True)
    for name in ("messages.jsonl", "prompt-completion.csv", "alpaca.json"):
        assert (tmp_path / name).read_bytes() == (FORMATS / name).read_bytes()
    # Parquet files name the library's version, so that only their rows can be compared.
    made, committed = (parquet.read_table(folder / "text.parquet") for folder in (tmp_path, FORMATS))
    assert made.to_pylist() == committed.to_pylist()

"""Files with jobs, and the API server's refusals in plain words."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_cli import files
from finetune_cli.kinds import JOB


def test_numbers_are_read_as_kubectl_reads_them() -> None:
    text = "kind: FineTuneJob\nvalues: [2e-4, 1.5e-5, 5E3, .5e1, 0.1, 10, 2e, e4, 1.2.3e4, '2e-4']\n"
    (job,) = files.load_objects(text, JOB)
    assert job["values"] == [2e-4, 1.5e-5, 5000.0, 5.0, 0.1, 10, "2e", "e4", "1.2.3e4", "2e-4"]


def test_other_kinds_and_empty_documents_are_left_out() -> None:
    text = "---\nkind: Secret\n---\n---\nkind: FineTuneJob\na: 1\n---\nkind: List\nitems: [{kind: FineTuneJob, a: 2}]\n"
    assert [job["a"] for job in files.load_objects(text, JOB)] == [1, 2]


def test_json_is_read_too() -> None:
    assert files.load_objects('{"kind": "FineTuneJob"}', JOB) == [{"kind": "FineTuneJob"}]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("kind: FineTuneJob\nspec: [\n", "line 3, column 1: not YAML"),
        ("kind: FineTuneJob\n\tspec: 1\n", "line 2, column 1: not YAML"),
        ("a: !!python/object/apply:os.system [ls]\n", "not YAML"),
        ("", "holds no FineTuneJob (found: nothing)"),
        ("kind: Secret\n", "holds no FineTuneJob (found: Secret)"),
        ("just text", "a document has no kind"),
        ("spec: {}\n", "a document has no kind"),
        ("kind: FineTuneJob\nmetadata: 5\n", "metadata is 5; write metadata: {name: ...}"),
        ("kind: List\nitems:\n", "holds no FineTuneJob (found: nothing)"),
        ("kind: FineTuneJob\nmetadata: {name: 2026-13-45}\n", "not YAML: month must be in 1..12"),
        ("[" * 5000, "not YAML: "),
    ],
)
def test_files_that_cannot_be_read(text: str, problem: str) -> None:
    with pytest.raises(files.UnreadableFileError) as caught:
        files.load_objects(text, JOB)
    assert problem in str(caught.value)


def refusal(*causes: tuple[str, str]) -> dict[str, Any]:
    return {
        "message": "whole",
        "details": {"causes": [{"field": field, "message": message} for field, message in causes]},
    }


def test_causes_become_one_line_each_with_notes_last() -> None:
    lines = files.explain_refusal(
        refusal(
            ("<nil>", "Invalid value: null: some validation rules were not checked"),
            ("spec.objective", 'Invalid value: "PPO": was removed'),
            ("spec.model", "Required value"),
            ("spec.model", "Required value"),
            ("spec.a", 'Invalid value: "string": spec.a in body must be of type integer: "string"'),
            ("spec.b", 'Invalid value: "string": spec.b in body must be of type object: "string"'),
        ),
        JOB,
    )
    assert lines == [
        "spec.a: must be of type integer, not string; write it without quotes",
        "spec.b: must be of type object, not string",
        "spec.model: Required value",
        'spec.objective: "PPO": was removed',
        "some validation rules were not checked",
    ]


def test_refusal_without_causes_is_its_message() -> None:
    assert files.explain_refusal({"message": "admission webhook says no"}, JOB) == [
        "admission webhook says no"
    ]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("spec.hyperparameters.learning_rate", "did you mean learningRate?"),
        ("spec.hyperparameters.learningrate", "did you mean learningRate?"),
        ("spec.dataset.sources[0].colums", "did you mean columns?"),
        ("spec.early_stopping", "did you mean earlyStopping?"),
        ("spec.resources.gpu", "did you mean gpusPerWorker?"),
        ("spec.hyperparameters.max", "there are epochs"),
        ("spec.zzz", "there are checkpoint, dataset"),
        ("spec.nothing.here", "unknown field"),
    ],
)
def test_unknown_fields_get_a_suggestion(path: str, expected: str) -> None:
    message = f'FineTuneJob cannot be handled: strict decoding error: unknown field "{path}"'
    (line,) = files.explain_refusal({"message": message}, JOB)
    assert line.startswith(f"{path}: unknown field")
    assert expected in line


def test_fields_given_twice_are_named() -> None:
    message = 'strict decoding error: yaml: line 3: key "spec" already set in map'
    assert files.explain_refusal({"message": message}, JOB) == ["spec: is there twice; keep one"]

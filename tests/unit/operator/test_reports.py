"""What is made of a trainer's posts."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from finetune_operator.api.finetunejob import Phase
from finetune_operator.core import durations, reports
from tests.unit.operator.stories import ARTIFACT


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (45.4, "45s"), (60, "1m0s"), (200, "3m20s"), (7500, "2h5m"), (273_600, "3d4h")],
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert durations.format_duration(seconds) == text


def test_a_plain_hugging_face_trainer_is_understood() -> None:
    report = reports.Report.model_validate(
        {
            "trainerStatus": {
                "progressPercentage": 30,
                "estimatedRemainingSeconds": 61,
                "metrics": [
                    {"name": "loss", "value": "2.5"},
                    {"name": "current_step", "value": "3"},
                    {"name": "total_steps", "value": "10"},
                    {"name": "current_epoch", "value": "0.3"},
                ],
                "lastUpdatedTime": "2026-01-01T00:00:00.123+00:00",
            }
        }
    )
    progress = reports.progress_of(report, at=None)
    assert reports.phase_of(report) is Phase.RUNNING
    assert (progress.step, progress.total_steps, progress.epoch, progress.eta) == (3, 10, 0.3, "1m1s")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "abc", ""])
def test_a_metric_that_is_no_finite_number_is_no_metric(value: str) -> None:
    report = reports.Report.model_validate({"trainerStatus": {"metrics": [{"name": "loss", "value": value}]}})
    assert report.number("loss") is None


@pytest.mark.parametrize(
    "result",
    [
        {"class": "Succeeded", "exitCode": 0},
        {"class": "Internal", "exitCode": 1, "artifact": ARTIFACT},
        {"class": "Unheard", "exitCode": 1},
        {"class": "Internal", "exitCode": 999},
    ],
)
def test_a_result_that_contradicts_itself_is_refused(result: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        reports.Report.model_validate({"finetune": {"result": result}})


def test_keys_of_newer_trainers_are_ignored() -> None:
    assert reports.Report.model_validate({"new": 1, "finetune": {"new": 2, "step": 4}}).finetune.step == 4

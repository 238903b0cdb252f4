"""What is made of a trainer's posts."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from pydantic import ValidationError

from finetune_operator.api.finetunejob import Phase
from finetune_operator.core import durations, reports
from finetune_operator.core.reports import Report
from finetune_operator.reconcile.mailbox import Mailbox
from tests.unit.operator.stories import ARTIFACT, START, result, training


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
                "lastUpdatedTime": "2026-01-01T02:00:00.123+02:00",
            }
        }
    )
    assert report.trainer_status.last_updated_time == datetime(2026, 1, 1, microsecond=123_000, tzinfo=UTC)
    progress = reports.progress_of(report, at=None)
    assert reports.phase_of(report) is Phase.RUNNING
    assert (progress.step, progress.total_steps, progress.epoch, progress.eta) == (3, 10, 0.3, "1m1s")


def test_our_own_numbers_count_before_a_plain_trainers_and_are_rounded() -> None:
    theirs = [{"name": f"current_{name}", "value": "99"} for name in ("step", "epoch")]
    report = reports.Report.model_validate(
        {
            "trainerStatus": {"metrics": [*theirs, {"name": "total_steps", "value": "99"}]},
            "finetune": {"step": 0, "totalSteps": 0, "epoch": 1.23456, "tokensPerSecond": 98.765},
        }
    )
    progress = reports.progress_of(report, at=START)
    assert (progress.percent, progress.step, progress.total_steps, progress.epoch) == (0, 0, None, 1.235)
    assert (progress.tokens_per_second, progress.eta, progress.last_report_time) == (98.77, None, START)


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


def test_where_training_was_saved_and_where_it_went_on() -> None:
    told = {"checkpoint": {"step": 20, "uri": "s3://b/c/checkpoint-20"}, "resumedFromStep": 10}
    report = reports.Report.model_validate({"finetune": told})
    first = reports.checkpoint_of(report, known=None, attempt_start=START, now=START)
    assert first is not None
    assert (first.step, report.finetune.resumed_from_step) == (20, 10)
    later = reports.checkpoint_of(report, known=first, attempt_start=START, now=START + timedelta(hours=1))
    assert later == first, "the time is that of the news"
    assert reports.checkpoint_of(reports.Report(), known=first, attempt_start=START, now=START) == first


async def test_an_attempt_that_is_over_does_not_displace_the_present_one() -> None:
    mailbox, key = Mailbox(), ("team", "triage")
    assert mailbox.put(key, uid="u", attempt=2, report=training(step=3))
    assert not mailbox.put(key, uid="u", attempt=1, report=training(step=9))
    report, _ = mailbox.latest(key, uid="u", attempt=2)
    assert report is not None
    assert report.finetune.step == 3
    assert mailbox.latest(key, uid="u", attempt=3) == (None, None)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("CUDA out of memory.\n  Tried to allocate 2 GiB", "CUDA out of memory. Tried to allocate 2 GiB"),
        (
            "\x1b[36m(pid=7)\x1b[0m lost\r\n2026-01-01 INFO cancelled",
            "(pid=7) lost 2026-01-01 INFO cancelled",
        ),
        ("\x1b]0;title\x07 nul\x00 \u202e turned", "]0;title nul turned"),
        ("größer als 4 GiB 😀", "größer als 4 GiB 😀"),
    ],
)
def test_a_result_is_told_in_one_line_that_no_terminal_obeys(said: str, told: str) -> None:
    found = result("Internal", 1, said).result
    assert found is not None
    assert found.message == told


def at_step(step: int, sent: str) -> Report:
    return Report.model_validate({"trainerStatus": {"lastUpdatedTime": sent}, "finetune": {"step": step}})


@pytest.mark.parametrize(
    ("sent", "step"),
    [
        ("2026-01-01T11:59:58Z", 5),  # overtaken on its way
        ("2026-01-01T11:59:58", 5),  # as a trainer of somebody else writes it
        ("2026-01-01T11:00:01Z", 6),  # the clock was set back by an hour
        ("0001-01-01T00:00:00+23:59", 6),
        ("2026-01-01T12:00:02", 6),
    ],
)
async def test_a_report_is_older_than_another_by_the_trainers_clock_unless_that_was_set_back(
    sent: str, step: int
) -> None:
    mailbox, key = Mailbox(), ("team", "triage")
    assert mailbox.put(key, uid="u", attempt=1, report=at_step(5, "2026-01-01T12:00:00Z"))
    assert mailbox.put(key, uid="u", attempt=1, report=at_step(6, sent))
    report, _ = mailbox.latest(key, uid="u", attempt=1)
    assert report is not None
    assert report.finetune.step == step


async def test_a_trainer_of_a_deleted_job_says_nothing_about_its_namesake() -> None:
    mailbox, key = Mailbox(), ("team", "triage")
    assert mailbox.put(key, uid="former", attempt=1, report=training(step=9))
    assert mailbox.latest(key, uid="now", attempt=1) == (None, None)
    assert mailbox.put(key, uid="now", attempt=1, report=training(step=1))
    assert mailbox.put(key, uid="former", attempt=1, report=training(step=10))
    report, _ = mailbox.latest(key, uid="now", attempt=1)
    assert report is not None
    assert report.finetune.step == 1
    mailbox.forget(key)
    assert mailbox.latest(key, uid="now", attempt=1) == (None, None)


async def test_a_result_that_did_not_end_the_attempt_makes_room_for_its_next_reports() -> None:
    mailbox, key, last = Mailbox(), ("team", "triage"), result("Preempted", 75, "stopped")
    assert mailbox.put(key, uid="u", attempt=2, report=last)
    assert not mailbox.put(key, uid="u", attempt=2, report=training(step=9))
    mailbox.drop(key, last, uid="u")
    assert mailbox.put(key, uid="u", attempt=2, report=training(step=9))
    mailbox.drop(key, last, uid="u")
    assert mailbox.latest(key, uid="u", attempt=2)[0] is not None


def test_keys_of_newer_trainers_are_ignored() -> None:
    assert reports.Report.model_validate({"new": 1, "finetune": {"new": 2, "step": 4}}).finetune.step == 4

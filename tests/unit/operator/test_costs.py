"""What a job has cost, over attempts that the status no longer lists."""

from __future__ import annotations

from dataclasses import replace

import pytest

from finetune_fit.prices import PriceTable
from finetune_operator.core.facts import Defaults
from tests.unit.operator.stories import ARTIFACT, Story, rayjob, result, training

GPU = {
    "resources": {"gpusPerWorker": 1, "acceleratorType": "NVIDIA-L4", "fitCheck": "Skip"},
    "retry": {"backoffSeconds": {"min": 0, "max": 0}},
}
PRICED = Defaults("file:///artifacts", "trainer:1", PriceTable("EUR", {"nvidia-l4": 3.6, "default": 9.0}))
LOST = rayjob("Failed", "FAILED", reason="AppFailed", message="Ray head pod not found.")


def cost(story: Story) -> tuple[int, int]:
    assert story.job.status.cost is not None
    return story.job.status.cost.gpu_seconds, story.job.status.cost.lost_gpu_seconds


def fail(story: Story, *, seconds: int) -> None:
    """The current attempt runs for so long, does no step, and is lost; the next one is recorded."""
    story.step(rayjob=rayjob("Running", "RUNNING"), after=0)
    story.step(rayjob=rayjob("Running", "RUNNING"), after=seconds)
    story.step(rayjob=LOST, after=0)
    while story.job.status.next_attempt_time is not None:
        story.step()
    story.step()


def test_a_job_without_a_gpu_has_no_cost() -> None:
    assert Story().trained().job.status.cost is None


def test_the_cost_grows_with_the_reports_and_ends_with_the_artifact() -> None:
    story = Story(GPU, PRICED).started()
    running = rayjob("Running", "RUNNING")
    story.step(rayjob=running, after=60)
    story.step(rayjob=running, report=training(step=1), after=30)
    assert cost(story) == (60, 0)
    story.step(rayjob=running, report=training(step=2), after=10)
    assert cost(story) == (90, 0)
    story.step(rayjob=running, report=result("Succeeded", 0, step=3, artifact=ARTIFACT))
    assert cost(story) == (100, 0)
    assert story.job.status.cost is not None
    assert story.job.status.cost.estimated == pytest.approx(0.1)
    assert story.job.status.cost.currency == "EUR"


def test_a_pass_without_news_changes_nothing() -> None:
    story = Story(GPU, PRICED).trained()
    running = rayjob("Running", "RUNNING")
    before = story.job.status.cost
    report = training(step=5)
    at = story.job.status.progress.last_report_time if story.job.status.progress else None
    story.step(rayjob=running, report=report, reported_at=at, after=20)
    story.step(rayjob=running, report=report, reported_at=at)
    assert story.job.status.cost == before


def test_work_that_no_checkpoint_holds_is_lost_in_proportion() -> None:
    story = Story(GPU).started()
    running = rayjob("Running", "RUNNING")
    story.step(rayjob=running, report=training(step=1, resumed=0), after=100)
    story.step(rayjob=running, report=training(step=10, saved=6, resumed=0), after=100)
    story.step(rayjob=LOST)
    assert cost(story) == (200, 80)


def test_what_the_attempts_before_had_saved_is_not_lost_again() -> None:
    story = Story(
        GPU, Defaults("file:///artifacts", "trainer:1", PriceTable("EUR", {"other": 1.0}))
    ).started()
    running = rayjob("Running", "RUNNING")
    story.step(rayjob=running, report=training(step=6, saved=6, resumed=0), after=100)
    story.step(rayjob=LOST, report=training(step=6, saved=6, resumed=0), after=0)
    story.step()
    story.step(after=0)
    second = replace(running, name="triage-a2", uid="second")
    story.step(rayjob=second, report=training(step=10, saved=8, resumed=6), after=50)
    story.step(rayjob=replace(LOST, name="triage-a2", uid="second"))
    assert cost(story) == (150, 25), "two of four steps"
    assert story.job.status.cost is not None
    assert (story.job.status.cost.estimated, story.job.status.cost.currency) == (None, None)


def test_an_attempt_that_did_no_step_is_lost_as_a_whole() -> None:
    story = Story(GPU).started()
    story.step(rayjob=rayjob("Running", "RUNNING"), after=5)
    story.step(rayjob=rayjob("Running", "RUNNING"), after=45)
    story.step(rayjob=LOST)
    assert cost(story) == (50, 50)


def test_attempts_that_the_status_no_longer_lists_still_count() -> None:
    story = Story(
        GPU | {"retry": {"maxInfraRetries": 1000, "backoffSeconds": {"min": 0, "max": 0}}}
    ).started()
    for _ in range(14):
        fail(story, seconds=10)
    assert len(story.job.status.attempts) == 10
    assert cost(story) == (140, 140)


def test_prices_of_kinds_that_are_not_listed() -> None:
    table = PriceTable("USD", {"NVIDIA-L4": 0.8, "default": 2.0})
    assert table.gpu_hour("nvidia-l4") == 0.8
    assert table.gpu_hour("NVIDIA-H200") == 2.0
    assert table.gpu_hour(None) == 2.0
    assert PriceTable("USD", {"NVIDIA-L4": 0.8}).gpu_hour(None) is None


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ([], "must be a mapping"),
        ({"gpuHours": {}}, "gpuHours: unknown field"),
        ({"currency": 1}, "currency: 1"),
        ({"gpuHour": 3}, "gpuHour: must be a mapping"),
        ({"gpuHour": {"L4": "cheap"}}, "gpuHour.L4: 'cheap'"),
        ({"gpuHour": {"L4": -1}}, "gpuHour.L4: -1"),
        ({"gpuHour": {"L4": float("nan")}}, "gpuHour.L4"),
    ],
)
def test_a_wrong_price_table_names_the_field(document: object, problem: str) -> None:
    with pytest.raises(ValueError, match=problem.replace(".", r"\.")):
        PriceTable.parse(document)

"""What Prometheus reads of a job."""

from __future__ import annotations

import re

from prometheus_client import CollectorRegistry, generate_latest

from finetune_operator.adapters.telemetry import Telemetry
from finetune_operator.core.policies import BUDGETS, Budget
from tests.unit.operator.stories import Story


def lines(registry: CollectorRegistry) -> set[str]:
    text = generate_latest(registry).decode()
    return {line for line in text.splitlines() if line.startswith("finetune_job_") and "{" in line}


def test_the_series_of_a_job_follow_its_status_and_go_with_it() -> None:
    registry = CollectorRegistry()
    telemetry = Telemetry(registry)
    story = Story().trained()
    telemetry.show_job("team", "a", story.job.status)
    telemetry.show_job("team", "b", Story().started().job.status)
    series = '{finetunejob="a",namespace="team"}'
    assert lines(registry) == {
        f"finetune_job_progress_ratio{series} 0.5",
        f"finetune_job_step{series} 5.0",
        f"finetune_job_tokens_per_second{series} 120.5",
        f"finetune_job_loss{series} 1.5",
        'finetune_job_phase{finetunejob="a",namespace="team",phase="Running"} 1.0',
        'finetune_job_phase{finetunejob="b",namespace="team",phase="Provisioning"} 1.0',
    }
    assert telemetry.shown_jobs() == {("team", "a"), ("team", "b")}
    telemetry.forget_job("team", "a")
    telemetry.forget_job("team", "b")
    telemetry.forget_job("team", "unknown")
    assert lines(registry) == set()
    assert "# TYPE finetune_job_loss gauge" in generate_latest(registry).decode(), "a panel finds its name"


def test_failures_of_the_infrastructure_are_counted_from_zero() -> None:
    """A storage that is away ends many jobs between two scrapes: a series that is born at 30 has no increase."""
    registry = CollectorRegistry()
    Telemetry(registry).show_job("team", "a", Story().started().job.status)
    text = generate_latest(registry).decode()
    counted = re.findall(r'^finetune_jobs_finished_total\{class="(\w+)",namespace="team"\} 0.0$', text, re.M)
    assert set(counted) == {name for name, budget in BUDGETS.items() if budget is Budget.INFRASTRUCTURE}

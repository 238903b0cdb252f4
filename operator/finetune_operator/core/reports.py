"""What a trainer tells: the body of its posts, and the part of a status that follows from it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

from finetune_operator.api.finetunejob import (
    Artifact,
    Checkpoint,
    Count,
    Effective,
    ErrorClass,
    Metrics,
    Phase,
    Progress,
)
from finetune_operator.core import durations, texts


def _with_zone(time: datetime) -> datetime:
    return time if time.tzinfo else time.replace(tzinfo=UTC)


# One without a zone is compared with others that have one.
Time = Annotated[datetime, AfterValidator(_with_zone)]
Number = Annotated[float, Field(allow_inf_nan=False)]


class ReportModel(BaseModel):
    """Part of a report. Newer trainers may send more than this operator knows, so unknown keys are ignored."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True)


class Metric(ReportModel):
    name: Annotated[str, Field(max_length=128)]
    value: Annotated[str, Field(max_length=64)]


class TrainerStatus(ReportModel):
    """Kubeflow Trainer's part (TrainJob status.trainerStatus), which any Hugging Face Trainer can send."""

    progress_percentage: Annotated[int, Field(ge=0, le=100)] | None = None
    estimated_remaining_seconds: Count | None = None
    metrics: Annotated[list[Metric], Field(max_length=64)] = []
    last_updated_time: Time | None = None


class Result(ReportModel):
    """How the attempt ended, in the trainer's own words."""

    error_class: Annotated[ErrorClass, Field(alias="class")]
    exit_code: Annotated[int, Field(ge=0, le=255)]
    message: Annotated[str, Field(max_length=4000), AfterValidator(texts.one_line)] = ""
    step: Count | None = None
    artifact: Artifact | None = None

    @model_validator(mode="after")
    def _success_has_an_artifact(self) -> Result:
        if (self.error_class is ErrorClass.SUCCEEDED) != (self.artifact is not None):
            raise ValueError("a result has an artifact if and only if its class is Succeeded")
        return self


class ReportedCheckpoint(ReportModel):
    """The newest complete checkpoint."""

    step: Count
    uri: Annotated[str, Field(min_length=1, max_length=1200)]


class Details(ReportModel):
    """Our own part."""

    phase: Literal["Validating", "Training", "Evaluating", "Exporting"] | None = None
    step: Count | None = None
    total_steps: Count | None = None
    epoch: Number | None = None
    tokens_per_second: Number | None = None
    effective: Effective | None = None
    checkpoint: ReportedCheckpoint | None = None
    resumed_from_step: Count | None = None
    result: Result | None = None
    inspection: bool = False
    """Whether this is what an inspection found, and not the trainer's own word."""


class Report(ReportModel):
    """The body of one post."""

    trainer_status: TrainerStatus = TrainerStatus()
    finetune: Details = Details()

    @property
    def result(self) -> Result | None:
        return self.finetune.result

    @property
    def is_of_inspection(self) -> bool:
        return self.finetune.inspection

    @property
    def knows_its_step(self) -> bool:
        """False for a trainer of ours that still checks its data: it has not yet looked for a checkpoint."""
        return self.finetune.step != 0 or self.finetune.resumed_from_step is not None

    def number(self, name: str) -> float | None:
        """The finite number that a metric holds, or None."""
        for metric in self.trainer_status.metrics:
            if metric.name == name:
                try:
                    value = float(metric.value)
                except ValueError:
                    return None
                return value if abs(value) < float("inf") else None
        return None

    def count(self, name: str) -> int:
        """The same as a number of steps; 0 where it is none."""
        return int(min(max(self.number(name) or 0, 0), MOST_STEPS))


MOST_STEPS = 2**53
PHASES = {
    "Validating": Phase.VALIDATING,
    "Training": Phase.RUNNING,
    "Evaluating": Phase.EVALUATING,
    "Exporting": Phase.EVALUATING,
}


def phase_of(report: Report) -> Phase:
    """The job's phase by a report. A foreign trainer sends no phase: its progress means that it trains."""
    return PHASES[report.finetune.phase] if report.finetune.phase else Phase.RUNNING


def rounded(value: float | None, digits: int = 5) -> float | None:
    """A number with a few significant digits: what a reader needs, and no more bytes in etcd."""
    return None if value is None else float(f"{value:.{digits}g}")


def progress_of(report: Report, *, at: datetime | None) -> Progress:
    """The progress that a report tells; total steps come from ours or from Kubeflow's metric of that name."""
    ours, theirs = report.finetune, report.trainer_status
    step = ours.step if ours.step is not None else report.count("current_step")
    total = ours.total_steps if ours.total_steps is not None else report.count("total_steps")
    percent = theirs.progress_percentage or 0
    remaining = theirs.estimated_remaining_seconds
    return Progress(
        percent=percent,
        summary=f"{percent}%",
        step=step,
        total_steps=total or None,
        epoch=rounded(ours.epoch if ours.epoch is not None else report.number("current_epoch"), 4),
        tokens_per_second=rounded(ours.tokens_per_second, 4),
        estimated_remaining_seconds=remaining,
        eta=None if remaining is None else durations.format_duration(remaining),
        last_report_time=at,
    )


def seconds_per_step(progress: Progress | None) -> float:
    """By the trainer's own estimate of what is left; 0 where there is none."""
    if progress is None or progress.estimated_remaining_seconds is None or not progress.total_steps:
        return 0.0
    return progress.estimated_remaining_seconds / max(progress.total_steps - (progress.step or 0), 1)


def checkpoint_of(
    report: Report, *, known: Checkpoint | None, attempt_start: datetime, now: datetime
) -> Checkpoint | None:
    """The newest checkpoint; its time is that of the report which told of it first. An attempt that begins anew found
    none that it could use: one from before it counts no more."""
    told = report.finetune.checkpoint
    if told is None and report.finetune.resumed_from_step == 0 and known and known.time < attempt_start:
        return None
    if told is None or (known is not None and (known.step, known.uri) == (told.step, told.uri)):
        return known
    return Checkpoint(step=told.step, uri=told.uri, time=now)


def metrics_of(report: Report, *, known: Metrics | None) -> Metrics:
    """The latest metrics; one that this report does not carry keeps its last value."""
    told = {name: report.number(name) for name in Metrics.model_fields}
    new = {name: rounded(value) for name, value in told.items() if value is not None}
    return (known or Metrics()).model_copy(update=new)

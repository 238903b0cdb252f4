"""How a job ends: by a reported artifact, by what KubeRay says of the process, or by what an inspection finds."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from finetune_operator.api.finetunejob import Artifact, Attempt, ErrorClass, Phase
from finetune_operator.core import failures, reports, statuses
from finetune_operator.core.conditions import Claim, ConditionType
from finetune_operator.core.facts import CreateRayJob, Observed, Plan, RayJobFacts

INSPECTION_SECONDS = 10.0
RELEASED = Claim(ConditionType.RESOURCES_READY, False, "Released", "the job is over")


def over(seen: Observed, attempt: Attempt, rayjob: RayJobFacts, *, now: datetime) -> Plan:
    """The RayJob is over without a report: believe the exit code; where there is none, look for the artifact."""
    if rayjob.job_status == "STOPPED":
        return ended(seen, ErrorClass.CANCELLED, f"Ray job of {rayjob.name} was stopped", now=now)
    if rayjob.deployment_status == "ValidationFailed":
        return ended(
            seen, ErrorClass.BAD_CONFIG, f"KubeRay refuses RayJob {rayjob.name}: {rayjob.message}", now=now
        )
    exit_code = failures.exit_code_of(rayjob.message)
    error_class = failures.class_of(exit_code)
    may_be_committed = rayjob.deployment_status == "Complete" or (
        error_class is ErrorClass.LOST and seen.job.status.progress is not None
    )
    if may_be_committed:
        return _inspect(seen, attempt, now=now)
    return ended(seen, error_class, _failure_message(rayjob), now=now, exit_code=exit_code)


def _failure_message(rayjob: RayJobFacts) -> str:
    exit_code = failures.exit_code_of(rayjob.message)
    if exit_code is None:
        return f"{rayjob.reason or 'failed'}: {rayjob.message.splitlines()[0] if rayjob.message else 'no message'}"
    line = failures.last_log_line(rayjob.message)
    return f"the trainer ended with exit code {exit_code}" + (f": {line}" if line else "")


def _inspect(seen: Observed, attempt: Attempt, *, now: datetime) -> Plan:
    name = f"{seen.job.name}-i{attempt.number}"
    message = f"the trainer ended without a report; RayJob {name} looks for the committed artifact"
    status = statuses.build(
        seen,
        Phase.EVALUATING,
        "Inspecting",
        message,
        claims=[Claim(ConditionType.TRAINING, False, "Inspecting", message)],
        now=now,
        attempts=statuses.with_last(seen.job.status.attempts, inspection=name),
    )
    return Plan(status=status, requeue_after=0)


def inspecting(seen: Observed, attempt: Attempt, inspection: str, *, now: datetime) -> Plan:
    result = seen.report.result if seen.report else None
    if result is None and (seen.inspection is None or not seen.inspection.is_over):
        missing = seen.inspection is None
        actions = [CreateRayJob(inspection, attempt.number, inspect=True)] if missing else []
        return Plan(status=seen.job.status, actions=actions, requeue_after=INSPECTION_SECONDS)
    if seen.rayjob is not None and seen.rayjob.deployment_status == "Failed":
        return ended(seen, ErrorClass.LOST, _failure_message(seen.rayjob), now=now)
    found = result.message if result else "its inspection brought no result"
    message = f"the trainer ended well but left no committed artifact: {found}"
    return ended(seen, ErrorClass.INTERNAL, message, now=now)


def succeeded(seen: Observed, result: reports.Result, artifact: Artifact, *, now: datetime) -> Plan:
    known = seen.job.status
    message = f"artifact {artifact.digest[:19]} is at {artifact.uri}"
    progress = known.progress
    if seen.report is not None:
        progress = reports.progress_of(seen.report, at=seen.reported_at)
    if progress is not None:
        progress = progress.model_copy(
            update={"percent": 100, "summary": "100%", "estimated_remaining_seconds": 0, "eta": "0s"}
        )
    ending = {
        "end_time": now,
        "error_class": ErrorClass.SUCCEEDED,
        "exit_code": 0,
        "message": result.message or message,
    }
    status = statuses.build(
        seen,
        Phase.SUCCEEDED,
        "ArtifactPublished",
        message,
        claims=[
            RELEASED,
            Claim(ConditionType.TRAINING, False, "Finished", "training is over"),
            Claim(ConditionType.ARTIFACT_PUBLISHED, True, "ManifestCommitted", message),
            Claim(ConditionType.COMPLETE, True, "ArtifactPublished", message),
        ],
        now=now,
        artifact=artifact,
        progress=progress,
        metrics=reports.metrics_of(seen.report, known=known.metrics) if seen.report else known.metrics,
        effective=statuses.merge_effective(
            known.effective, seen.report.finetune.effective if seen.report else None
        ),
        attempts=statuses.with_last(
            known.attempts, last_step=result.step, **statuses.rayjob_uid(seen), **ending
        ),
        completion_time=now,
    )
    return Plan(status=status)


def ended(
    seen: Observed,
    error_class: ErrorClass,
    message: str,
    *,
    now: datetime,
    exit_code: int | None = None,
    step: int | None = None,
) -> Plan:
    phase = Phase.CANCELLED if error_class is ErrorClass.CANCELLED else Phase.FAILED
    text = failures.with_advice(error_class, message)[:4000]
    ending: dict[str, Any] = {
        "end_time": now,
        "error_class": error_class,
        "exit_code": exit_code,
        "message": text,
        **statuses.rayjob_uid(seen),
    }
    status = statuses.build(
        seen,
        phase,
        str(error_class),
        text,
        claims=[
            RELEASED,
            Claim(ConditionType.TRAINING, False, str(error_class), text),
            Claim(ConditionType.FAILED, True, str(error_class), text),
        ],
        now=now,
        attempts=statuses.with_last(seen.job.status.attempts, last_step=step, **ending),
        completion_time=now,
    )
    return Plan(status=status)

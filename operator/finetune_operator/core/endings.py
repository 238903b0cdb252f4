"""How a job ends: with a committed artifact, or without one. What is written here is final."""

from __future__ import annotations

from datetime import datetime

from finetune_operator.api.finetunejob import Artifact, ErrorClass, Phase
from finetune_operator.core import accounts, failures, fences, reports, statuses, texts
from finetune_operator.core.conditions import Claim, ConditionType
from finetune_operator.core.facts import Observed, Plan, RayJobFacts

RELEASED = Claim(ConditionType.RESOURCES_READY, False, "Released", "the job is over")


def succeeded(seen: Observed, result: reports.Result, artifact: Artifact, *, now: datetime) -> Plan:
    """The artifact is committed. That counts, whatever else is told of the attempt."""
    known = seen.job.status
    message = f"artifact {artifact.digest[:19]} is at {artifact.uri}"
    progress = known.progress
    if seen.report is not None:
        progress = reports.progress_of(seen.report, at=seen.reported_at)
    if progress is not None:
        progress = progress.model_copy(
            update={"percent": 100, "summary": "100%", "estimated_remaining_seconds": 0, "eta": "0s"}
        )
    attempt = known.attempts[-1]
    ending = {
        "end_time": attempt.end_time or accounts.end_of_attempt(seen, now=now),
        "error_class": ErrorClass.SUCCEEDED,
        "exit_code": 0,
        "message": result.message or message,
        "gpu_seconds": accounts.gpu_seconds(seen, now=now) if attempt.end_time is None else None,
    }
    attempts = known.attempts if seen.report is None else accounts.with_report(seen, seen.report)
    attempts = statuses.with_last(attempts, last_step=result.step, **statuses.rayjob_uid(seen), **ending)
    if attempt.end_time is not None:  # it had been thought lost
        attempts = [*attempts[:-1], attempts[-1].model_copy(update={"lost_steps": None})]
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
            *checkpoints_are_gone(seen),
            *not_suspended(seen),
        ],
        now=now,
        artifact=artifact,
        progress=progress,
        metrics=reports.metrics_of(seen.report, known=known.metrics) if seen.report else known.metrics,
        effective=statuses.merge_effective(
            known.effective, seen.report.finetune.effective if seen.report else None
        ),
        attempts=attempts,
        checkpoint=None,
        next_attempt_time=None,
        completion_time=now,
    )
    return Plan(status=status, requeue_after=_cleanup_after(seen, status.phase))


def failed(seen: Observed, reason: str, message: str, *, now: datetime) -> Plan:
    """The job is over without an artifact. `reason` is the class of the last attempt, or says why none was made."""
    cancelled = reason == ErrorClass.CANCELLED
    text = failures.with_advice(ErrorClass(reason), message) if reason in set(ErrorClass) else message
    text = text[: texts.LONGEST]
    claims = [RELEASED] if seen.job.status.attempts else []
    status = statuses.build(
        seen,
        Phase.CANCELLED if cancelled else Phase.FAILED,
        reason,
        text,
        claims=[
            *claims,
            Claim(ConditionType.TRAINING, False, reason, text),
            Claim(ConditionType.FAILED, True, reason, text),
            *not_suspended(seen),
        ],
        now=now,
        next_attempt_time=None,
        completion_time=now,
    )
    return Plan(status=status, requeue_after=_cleanup_after(seen, status.phase))


def patience(rayjob: RayJobFacts, *, phase: Phase | None) -> float:
    """Seconds after the job's end at which its RayJob is taken down. After a success there is no hurry: a trainer that
    is started again finds the artifact."""
    return fences.PATIENCE_SECONDS if phase is Phase.SUCCEEDED else fences.patience(rayjob)


def not_suspended(seen: Observed) -> list[Claim]:
    if statuses.holds_since(seen.job.status, ConditionType.SUSPENDED) is None:
        return []
    return [Claim(ConditionType.SUSPENDED, False, "Finished", "the job is over")]


def checkpoints_are_gone(seen: Observed) -> list[Claim]:
    if statuses.condition(seen.job.status, ConditionType.CHECKPOINT_AVAILABLE) is None:
        return []
    message = "the artifact is committed, its checkpoints are removed"
    return [Claim(ConditionType.CHECKPOINT_AVAILABLE, False, "ArtifactPublished", message)]


def _cleanup_after(seen: Observed, phase: Phase | None) -> float | None:
    spec = seen.job.spec
    waits = []
    if seen.rayjob is not None and seen.rayjob.ours and not seen.rayjob.is_over:
        waits.append(patience(seen.rayjob, phase=phase))
    if spec is not None and spec.ttl_seconds_after_finished is not None:
        waits.append(float(spec.ttl_seconds_after_finished))
    return min(waits, default=None)

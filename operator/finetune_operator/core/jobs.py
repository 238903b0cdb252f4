"""What a FineTuneJob is in, and what to do next: `decide` turns facts and a time into a plan.

The order of the rules is the order of trust: a committed artifact that was reported, then what KubeRay says of the
process, then what was recorded. Nothing here is done before the status that records it was written, so the operator
may be killed between any two passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from finetune_operator.api.finetunejob import (
    Artifact,
    Attempt,
    Effective,
    ErrorClass,
    FineTuneJobSpec,
    FineTuneJobStatus,
    Phase,
)
from finetune_operator.core import conditions, failures, reports
from finetune_operator.core.conditions import Claim, ConditionType
from finetune_operator.core.facts import CreateRayJob, Defaults, Event, Observed, Plan, RayJobFacts

RESYNC_SECONDS = 60.0  # an active job is looked at again even if every watch event was lost
WAITING_SECONDS = 10.0  # so that a reason to wait shows in the status within 15 s
FINAL_PHASES = frozenset({Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED})


def decide(seen: Observed, *, defaults: Defaults, now: datetime) -> Plan:
    """The next step of a job. Pure: the same facts give the same plan."""
    if seen.job.deleting or is_finished(seen.job.status):
        return Plan(status=seen.job.status)
    plan = _decide_unfinished(seen, defaults=defaults, now=now)
    return replace(plan, events=_events(seen.job.status, plan.status))


def is_finished(status: FineTuneJobStatus) -> bool:
    return status.phase in FINAL_PHASES


def _decide_unfinished(seen: Observed, *, defaults: Defaults, now: datetime) -> Plan:
    spec = seen.job.spec
    if spec is None:
        return _wait(seen, Refusal("InvalidSpec", seen.job.problem or "the spec cannot be read"), now=now)
    refusal = _refusal(seen, spec, defaults=defaults)
    if refusal is not None:
        return _wait(seen, refusal, now=now)
    if not seen.job.status.attempts:
        return _record_first_attempt(seen, spec, defaults=defaults, now=now)
    attempt = seen.job.status.attempts[-1]
    result = seen.report.result if seen.report else None
    if result is not None and result.artifact is not None:
        return _succeeded(seen, result, result.artifact, now=now)
    if result is not None and attempt.inspection is None:
        return _ended(
            seen, result.error_class, result.message, now=now, exit_code=result.exit_code, step=result.step
        )
    if seen.rayjob is None:
        return _without_rayjob(seen, attempt, now=now)
    if not seen.rayjob.ours:
        return _ended(
            seen,
            ErrorClass.BAD_CONFIG,
            f"RayJob {seen.rayjob.name} exists and belongs to someone else: delete it or choose another name",
            now=now,
        )
    if attempt.inspection is not None:
        return _inspecting(seen, attempt, attempt.inspection, now=now)
    if seen.rayjob.is_over:
        return _over(seen, attempt, seen.rayjob, now=now)
    return _underway(seen, attempt, seen.rayjob, now=now)


# ---------------------------------------------------------------- before anything runs


@dataclass(frozen=True)
class Refusal:
    """Why the operator cannot act on a job now."""

    reason: str
    message: str
    retry_seconds: float | None = None


def _refusal(seen: Observed, spec: FineTuneJobSpec, *, defaults: Defaults) -> Refusal | None:
    if seen.job.status.attempts and seen.rayjob is not None:
        return None
    if not seen.job.status.attempts and spec.output.uri is None and defaults.output_uri is None:
        return Refusal(
            "OutputRequired",
            "spec.output.uri is not set and the operator has no default (FINETUNE_OUTPUT_URI): set one of them",
        )
    if not seen.kuberay_installed:
        return Refusal(
            "KubeRayUnavailable",
            "KubeRay is not installed (no API group ray.io/v1): install it, and the job starts by itself",
            WAITING_SECONDS,
        )
    return None


def _wait(seen: Observed, refusal: Refusal, *, now: datetime) -> Plan:
    claim = Claim(ConditionType.ACCEPTED, False, refusal.reason, refusal.message)
    status = _status(seen, Phase.PENDING, refusal.reason, refusal.message, claims=[claim], now=now)
    return Plan(status=status, requeue_after=refusal.retry_seconds)


def _record_first_attempt(
    seen: Observed, spec: FineTuneJobSpec, *, defaults: Defaults, now: datetime
) -> Plan:
    job = seen.job
    name = f"{job.name}-a1"
    status = _status(
        seen,
        Phase.PENDING,
        "Accepted",
        f"attempt 1 starts as RayJob {name}",
        claims=[Claim(ConditionType.ACCEPTED, True, "Accepted", "the spec is complete")],
        now=now,
        attempts=[Attempt(number=1, ray_job=name, start_time=now)],
        start_time=now,
        effective=Effective(
            output_uri=spec.output.uri or f"{defaults.output_uri}/{job.namespace}/{job.name}-{job.uid[:8]}",
            image=spec.resources.image or defaults.image,
        ),
    )
    return Plan(status=status, requeue_after=0)


# ---------------------------------------------------------------- while it runs


def _without_rayjob(seen: Observed, attempt: Attempt, *, now: datetime) -> Plan:
    if attempt.uid is not None:
        return _ended(
            seen, ErrorClass.LOST, f"RayJob {attempt.ray_job} was deleted before it finished", now=now
        )
    message = f"RayJob {attempt.ray_job} is being created"
    status = _status(
        seen,
        Phase.PROVISIONING,
        "Provisioning",
        message,
        claims=[
            Claim(ConditionType.ACCEPTED, True, "Accepted", "the spec is complete"),
            Claim(ConditionType.RESOURCES_READY, False, "Provisioning", message),
        ],
        now=now,
    )
    return Plan(
        status=status, actions=[CreateRayJob(attempt.ray_job, attempt.number)], requeue_after=WAITING_SECONDS
    )


def _underway(seen: Observed, attempt: Attempt, rayjob: RayJobFacts, *, now: datetime) -> Plan:
    report = seen.report
    if report is None and rayjob.job_status != "RUNNING":
        return _provisioning(seen, attempt, rayjob, now=now)
    known = seen.job.status
    phase = reports.phase_of(report) if report else _phase_without_report(known)
    training = phase is Phase.RUNNING
    reason, message = PHASE_TEXTS[phase]
    updates: dict[str, Any] = {"attempts": _with_last(known.attempts, uid=rayjob.uid)}
    if report is not None:
        updates |= {
            "progress": reports.progress_of(report, now=now),
            "metrics": reports.metrics_of(report, known=known.metrics),
            "effective": _merged_effective(known.effective, report.finetune.effective),
            "attempts": _with_last(known.attempts, uid=rayjob.uid, last_step=report.finetune.step),
        }
    status = _status(
        seen,
        phase,
        reason,
        message,
        claims=[
            Claim(ConditionType.RESOURCES_READY, True, "PodsRunning", "the training pod runs"),
            Claim(ConditionType.TRAINING, training, reason, message),
        ],
        now=now,
        **updates,
    )
    return Plan(status=status, requeue_after=RESYNC_SECONDS)


PHASE_TEXTS = {
    Phase.VALIDATING: ("Validating", "the trainer checks configuration, model and data"),
    Phase.RUNNING: ("Training", "optimizer steps are being taken"),
    Phase.EVALUATING: ("Exporting", "training is over; the artifact is evaluated and written"),
}


def _phase_without_report(status: FineTuneJobStatus) -> Phase:
    """After a restart of the operator the recorded phase stands until the next report."""
    return status.phase if status.phase in PHASE_TEXTS else Phase.VALIDATING


def _provisioning(seen: Observed, attempt: Attempt, rayjob: RayJobFacts, *, now: datetime) -> Plan:
    waiting = next((pod for pod in seen.pods if pod.waiting_reason), None)
    if waiting is not None and waiting.waiting_reason is not None:
        reason, message = waiting.waiting_reason, f"pod {waiting.name}: {waiting.waiting_message}"
    elif rayjob.deployment_status in ("Suspended", "Suspending"):
        reason, message = (
            "RayJobSuspended",
            f"RayJob {rayjob.name} is suspended: set its spec.suspend to false",
        )
    else:
        reason, message = "Provisioning", f"RayJob {rayjob.name} starts"
    status = _status(
        seen,
        Phase.PROVISIONING,
        reason,
        message,
        claims=[Claim(ConditionType.RESOURCES_READY, False, reason, message)],
        now=now,
        attempts=_with_last(seen.job.status.attempts, uid=rayjob.uid),
    )
    return Plan(status=status, requeue_after=WAITING_SECONDS)


# ---------------------------------------------------------------- when it is over


def _over(seen: Observed, attempt: Attempt, rayjob: RayJobFacts, *, now: datetime) -> Plan:
    """The RayJob is over without a report: believe the exit code; where there is none, look for the artifact."""
    if rayjob.job_status == "STOPPED":
        return _ended(seen, ErrorClass.CANCELLED, f"Ray job of {rayjob.name} was stopped", now=now)
    if rayjob.deployment_status == "ValidationFailed":
        return _ended(
            seen, ErrorClass.BAD_CONFIG, f"KubeRay refuses RayJob {rayjob.name}: {rayjob.message}", now=now
        )
    exit_code = failures.exit_code_of(rayjob.message)
    error_class = failures.class_of(exit_code)
    may_be_committed = rayjob.deployment_status == "Complete" or (
        error_class is ErrorClass.LOST and seen.job.status.progress is not None
    )
    if may_be_committed:
        return _inspect(seen, attempt, now=now)
    return _ended(seen, error_class, _failure_message(rayjob), now=now, exit_code=exit_code)


def _failure_message(rayjob: RayJobFacts) -> str:
    exit_code = failures.exit_code_of(rayjob.message)
    if exit_code is None:
        return f"{rayjob.reason or 'failed'}: {rayjob.message.splitlines()[0] if rayjob.message else 'no message'}"
    line = failures.last_log_line(rayjob.message)
    return f"the trainer ended with exit code {exit_code}" + (f": {line}" if line else "")


def _inspect(seen: Observed, attempt: Attempt, *, now: datetime) -> Plan:
    name = f"{seen.job.name}-i{attempt.number}"
    message = f"the trainer ended without a report; RayJob {name} looks for the committed artifact"
    status = _status(
        seen,
        Phase.EVALUATING,
        "Inspecting",
        message,
        claims=[Claim(ConditionType.TRAINING, False, "Inspecting", message)],
        now=now,
        attempts=_with_last(seen.job.status.attempts, inspection=name),
    )
    return Plan(status=status, requeue_after=0)


def _inspecting(seen: Observed, attempt: Attempt, inspection: str, *, now: datetime) -> Plan:
    result = seen.report.result if seen.report else None
    if result is None and (seen.inspection is None or not seen.inspection.is_over):
        missing = seen.inspection is None
        actions = [CreateRayJob(inspection, attempt.number, inspect=True)] if missing else []
        return Plan(status=seen.job.status, actions=actions, requeue_after=WAITING_SECONDS)
    if seen.rayjob is not None and seen.rayjob.deployment_status == "Failed":
        return _ended(seen, ErrorClass.LOST, _failure_message(seen.rayjob), now=now)
    found = result.message if result else "its inspection brought no result"
    message = f"the trainer ended well but left no committed artifact: {found}"
    return _ended(seen, ErrorClass.INTERNAL, message, now=now)


def _succeeded(seen: Observed, result: reports.Result, artifact: Artifact, *, now: datetime) -> Plan:
    known = seen.job.status
    message = f"artifact {artifact.digest[:19]} is at {artifact.uri}"
    progress = known.progress
    if seen.report is not None:
        progress = reports.progress_of(seen.report, now=now)
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
    status = _status(
        seen,
        Phase.SUCCEEDED,
        "ArtifactPublished",
        message,
        claims=[
            Claim(ConditionType.TRAINING, False, "Finished", "training is over"),
            Claim(ConditionType.ARTIFACT_PUBLISHED, True, "ManifestCommitted", message),
            Claim(ConditionType.COMPLETE, True, "ArtifactPublished", message),
        ],
        now=now,
        artifact=artifact,
        progress=progress,
        metrics=reports.metrics_of(seen.report, known=known.metrics) if seen.report else known.metrics,
        effective=_merged_effective(known.effective, seen.report.finetune.effective if seen.report else None),
        attempts=_with_last(known.attempts, last_step=result.step, **_uid(seen), **ending),
        completion_time=now,
    )
    return Plan(status=status)


def _ended(
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
        **_uid(seen),
    }
    status = _status(
        seen,
        phase,
        str(error_class),
        text,
        claims=[
            Claim(ConditionType.TRAINING, False, str(error_class), text),
            Claim(ConditionType.FAILED, True, str(error_class), text),
        ],
        now=now,
        attempts=_with_last(seen.job.status.attempts, last_step=step, **ending),
        completion_time=now,
    )
    return Plan(status=status)


# ---------------------------------------------------------------- parts


def _status(
    seen: Observed,
    phase: Phase,
    reason: str,
    message: str,
    *,
    claims: Sequence[Claim],
    now: datetime,
    **updates: Any,
) -> FineTuneJobStatus:
    known, generation = seen.job.status, seen.job.generation
    return known.model_copy(
        update={
            "observed_generation": generation,
            "phase": phase,
            "reason": reason,
            "message": message,
            "conditions": conditions.merge(known.conditions, claims, now=now, generation=generation),
            **updates,
        }
    )


def _with_last(attempts: Sequence[Attempt], **updates: Any) -> list[Attempt]:
    """The attempts with the last one updated; None means that nothing new is known."""
    known = {name: value for name, value in updates.items() if value is not None}
    return [*attempts[:-1], attempts[-1].model_copy(update=known)]


def _uid(seen: Observed) -> dict[str, str | None]:
    return {"uid": seen.rayjob.uid if seen.rayjob and seen.rayjob.ours else None}


def _merged_effective(known: Effective | None, told: Effective | None) -> Effective | None:
    if told is None:
        return known
    new = told.model_dump(exclude_none=True, exclude={"output_uri", "image"})
    return (known or Effective()).model_copy(update=new)


def _events(old: FineTuneJobStatus, new: FineTuneJobStatus) -> list[Event]:
    """One event per transition: when the phase or the reason within it changes."""
    if (old.phase, old.reason) == (new.phase, new.reason) or new.reason is None:
        return []
    warning = new.phase is Phase.FAILED or (
        new.phase in (Phase.PENDING, Phase.PROVISIONING) and new.reason not in ("Accepted", "Provisioning")
    )
    return [Event(warning=warning, reason=new.reason, message=new.message or "")]


def refused(seen: Observed, message: str, *, now: datetime) -> Plan:
    """The API server refuses an object that the spec asks for: the user has to change the spec."""
    plan = _ended(seen, ErrorClass.BAD_CONFIG, message, now=now)
    return replace(plan, events=_events(seen.job.status, plan.status))


def forbidden(seen: Observed, message: str, *, now: datetime) -> Plan:
    """A quota or a missing right stands in the way: say so and try again."""
    reason = "QuotaExceeded" if "exceeded quota" in message else "Forbidden"
    claim = Claim(ConditionType.RESOURCES_READY, False, reason, message)
    status = _status(seen, Phase.PENDING, reason, message, claims=[claim], now=now)
    return Plan(status=status, events=_events(seen.job.status, status), requeue_after=WAITING_SECONDS)

"""What a FineTuneJob is in, and what to do next: `decide` turns facts and a time into a plan.

The order of the rules is the order of trust: a committed artifact that was reported, then what KubeRay says of the
process, then what was recorded. Nothing here is done before the status that records it was written, so the operator
may be killed between any two passes.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from typing import Any

from finetune_operator.api.finetunejob import (
    Attempt,
    Effective,
    ErrorClass,
    FineTuneJobSpec,
    FineTuneJobStatus,
    Phase,
)
from finetune_operator.core import endings, reports, statuses
from finetune_operator.core.conditions import Claim, ConditionType
from finetune_operator.core.facts import CreateRayJob, Defaults, Observed, Plan, RayJobFacts

RESYNC_SECONDS = 60.0  # an active job is looked at again even if every watch event was lost
WAITING_SECONDS = 10.0  # so that a reason to wait shows in the status within 15 s
FINAL_PHASES = frozenset({Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED})


def decide(seen: Observed, *, defaults: Defaults, now: datetime) -> Plan:
    """The next step of a job. Pure: the same facts give the same plan."""
    if seen.job.deleting or is_finished(seen.job.status):
        return Plan(status=seen.job.status)
    plan = _decide_unfinished(seen, defaults=defaults, now=now)
    return replace(plan, events=statuses.events(seen.job.status, plan.status))


def is_finished(status: FineTuneJobStatus) -> bool:
    return status.phase in FINAL_PHASES


def _decide_unfinished(seen: Observed, *, defaults: Defaults, now: datetime) -> Plan:
    if not seen.job.status.attempts:
        return _admit(seen, defaults=defaults, now=now)
    attempt = seen.job.status.attempts[-1]
    result = seen.report.result if seen.report else None
    if result is not None and result.artifact is not None:
        return endings.succeeded(seen, result, result.artifact, now=now)
    if result is not None and attempt.inspection is None:
        return endings.ended(
            seen, result.error_class, result.message, now=now, exit_code=result.exit_code, step=result.step
        )
    if seen.rayjob is None:
        return _without_rayjob(seen, attempt, now=now)
    if not seen.rayjob.ours:
        return endings.ended(
            seen,
            ErrorClass.BAD_CONFIG,
            f"RayJob {seen.rayjob.name} exists and belongs to someone else: delete it or choose another name",
            now=now,
        )
    if attempt.inspection is not None:
        return endings.inspecting(seen, attempt, attempt.inspection, now=now)
    if seen.rayjob.is_over:
        return endings.over(seen, attempt, seen.rayjob, now=now)
    return _underway(seen, attempt, seen.rayjob, now=now)


# ---------------------------------------------------------------- before anything runs


def _admit(seen: Observed, *, defaults: Defaults, now: datetime) -> Plan:
    spec = seen.job.spec
    if spec is None:
        return _wait(seen, "InvalidSpec", seen.job.problem or "the spec cannot be read", now=now)
    if spec.output.uri is None and defaults.output_uri is None:
        message = "spec.output.uri is not set and the operator has no default (FINETUNE_OUTPUT_URI): set one of them"
        return _wait(seen, "OutputRequired", message, now=now)
    if not seen.kuberay_installed:
        return _wait_for_kuberay(seen, now=now)
    return _record_first_attempt(seen, spec, defaults=defaults, now=now)


def _wait_for_kuberay(seen: Observed, *, now: datetime) -> Plan:
    message = "KubeRay is not installed (no API group ray.io/v1): install it, and the job goes on by itself"
    return _wait(seen, "KubeRayUnavailable", message, now=now, seconds=WAITING_SECONDS)


def _wait(seen: Observed, reason: str, message: str, *, now: datetime, seconds: float | None = None) -> Plan:
    claim = Claim(ConditionType.ACCEPTED, False, reason, message)
    status = statuses.build(seen, Phase.PENDING, reason, message, claims=[claim], now=now)
    return Plan(status=status, requeue_after=seconds)


def _record_first_attempt(
    seen: Observed, spec: FineTuneJobSpec, *, defaults: Defaults, now: datetime
) -> Plan:
    job = seen.job
    name = f"{job.name}-a1"
    status = statuses.build(
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
    if not seen.kuberay_installed:
        return _wait_for_kuberay(seen, now=now)
    if attempt.uid is not None:
        return endings.ended(
            seen, ErrorClass.LOST, f"RayJob {attempt.ray_job} was deleted before it finished", now=now
        )
    message = f"RayJob {attempt.ray_job} is being created"
    status = statuses.build(
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
    updates: dict[str, Any] = {"attempts": statuses.with_last(known.attempts, uid=rayjob.uid)}
    if report is not None:
        updates |= {
            "progress": reports.progress_of(report, at=seen.reported_at),
            "metrics": reports.metrics_of(report, known=known.metrics),
            "effective": statuses.merge_effective(known.effective, report.finetune.effective),
            "attempts": statuses.with_last(known.attempts, uid=rayjob.uid, last_step=report.finetune.step),
        }
    status = statuses.build(
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
    status = statuses.build(
        seen,
        Phase.PROVISIONING,
        reason,
        message,
        claims=[Claim(ConditionType.RESOURCES_READY, False, reason, message)],
        now=now,
        attempts=statuses.with_last(seen.job.status.attempts, uid=rayjob.uid),
    )
    return Plan(status=status, requeue_after=WAITING_SECONDS)


def refused(seen: Observed, message: str, *, now: datetime) -> Plan:
    """The API server refuses an object that the spec asks for: the user has to change the spec."""
    plan = endings.ended(seen, ErrorClass.BAD_CONFIG, message, now=now)
    return replace(plan, events=statuses.events(seen.job.status, plan.status))


def forbidden(seen: Observed, message: str, *, now: datetime) -> Plan:
    """A quota or a missing right stands in the way: say so and try again."""
    reason = "QuotaExceeded" if "exceeded quota" in message else "Forbidden"
    claim = Claim(ConditionType.RESOURCES_READY, False, reason, message)
    status = statuses.build(seen, Phase.PENDING, reason, message, claims=[claim], now=now)
    return Plan(status=status, events=statuses.events(seen.job.status, status), requeue_after=WAITING_SECONDS)

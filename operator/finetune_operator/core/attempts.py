"""From one attempt to the next: how an attempt ends, what must be gone before another one, and what follows.

Everything is recorded before it is done. An attempt that has ended is in one of three states, by what is stored:
undecided (an inspection looks for a committed artifact), due (`status.nextAttemptTime` is set: another attempt
follows), or last (neither: the job ends once nothing of it runs any more).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from finetune_operator.api.finetunejob import Attempt, ErrorClass, FineTuneJobStatus, Phase, Retries
from finetune_operator.core import (
    accounts,
    conditions,
    deadlines,
    endings,
    fences,
    policies,
    reports,
    statuses,
    suspensions,
    words,
)
from finetune_operator.core.conditions import SPEC_IS_COMPLETE, Claim, ConditionType
from finetune_operator.core.facts import CreateRayJob, Observed, Plan

KEPT = 10  # attempts in the status
INSPECTION_SECONDS = 10.0
INSPECTION_LIMIT = timedelta(minutes=15)  # an inspection that cannot run must not hold the job for ever
FRESH_SECONDS = 60.0
NEAR_SECONDS = 60


@dataclass(frozen=True)
class Ending:
    """How an attempt ended."""

    error_class: ErrorClass
    message: str
    exit_code: int | None = None
    step: int | None = None
    final: bool = False
    """No retry, whatever the class."""
    inspect: bool = False
    """An artifact may have been committed: look before anything is decided."""


def end(seen: Observed, ending: Ending, *, now: datetime) -> Plan:
    """Record the end of the last attempt and what follows."""
    seen = with_news(seen, now=now)
    attempts = seen.job.status.attempts
    last_step = ending.step or attempts[-1].last_step  # 0: it ended before it knew where it goes on
    attempts = statuses.with_last(
        attempts,
        end_time=now,
        error_class=ending.error_class,
        exit_code=ending.exit_code,
        message=ending.message[:4000],
        last_step=last_step,
        lost_steps=accounts.lost_steps(seen, last_step=last_step),
        gpu_seconds=accounts.gpu_seconds(seen, now=now),
        **statuses.rayjob_uid(seen),
    )
    updated = seen.job.status.model_copy(update={"attempts": attempts})
    seen = replace(seen, job=replace(seen.job, status=updated))
    verdict = _judge(seen, ending)
    if ending.inspect or (not verdict.retry and _may_be_committed(seen, ending)):
        return _inspect(seen, now=now)
    if verdict.retry:
        return retrying(seen, verdict, now=now)
    if fences.is_stopping_by_itself(seen):
        return last(seen, verdict, now=now)
    claims = [_released(str(ending.error_class), ending.message), _not_training(ending)]
    message = f"{ending.message}; what is left of attempt {attempts[-1].number} is being stopped"
    status = statuses.build(seen, None, "Stopping", message, claims=claims, now=now)
    return Plan(status=status, requeue_after=0)


def with_news(seen: Observed, *, now: datetime) -> Observed:
    """The facts with what the last attempt's latest report tells of steps and checkpoints, be it late or in time."""
    report, known = seen.report, seen.job.status
    if report is None:
        return seen
    late = known.attempts[-1].end_time is not None
    attempts = accounts.with_late_report(seen, report) if late else accounts.with_report(seen, report)
    checkpoint = reports.checkpoint_of(report, known=known.checkpoint, now=now)
    status = known.model_copy(update={"attempts": attempts, "checkpoint": checkpoint})
    seen = replace(seen, job=replace(seen.job, status=status))
    if checkpoint == known.checkpoint:
        return seen
    merged = conditions.merge(
        status.conditions, [words.checkpoint_claim(seen)], now=now, generation=seen.job.generation
    )
    status = status.model_copy(update={"conditions": merged})
    return replace(seen, job=replace(seen.job, status=status))


def _judge(seen: Observed, ending: Ending) -> policies.Verdict:
    if ending.final or seen.job.spec is None:
        return policies.Verdict(False, "", seen.job.status.retries or Retries())
    return policies.judge(ending.error_class, spec=seen.job.spec, status=seen.job.status, uid=seen.job.uid)


def _may_be_committed(seen: Observed, ending: Ending) -> bool:
    """Whether an attempt that did not say how it ended got so far that it may have left an artifact."""
    silent = ending.error_class in (ErrorClass.LOST, ErrorClass.STALLED, ErrorClass.PREEMPTED)
    mute = ending.exit_code is None or ending.exit_code >= 128
    return silent and mute and seen.job.status.attempts[-1].last_step is not None


def is_far_from_its_end(seen: Observed, *, now: datetime) -> bool:
    """Whether the trainer was heard a moment ago and had more to do than it can have done since. Where that is so,
    no artifact can be there, and another attempt need not wait for an inspection."""
    report = seen.report
    if report is None or seen.reported_at is None:
        return False
    remaining = report.trainer_status.estimated_remaining_seconds
    busy = reports.phase_of(report) in (Phase.VALIDATING, Phase.RUNNING)
    fresh = (now - seen.reported_at).total_seconds() <= FRESH_SECONDS
    return busy and fresh and (remaining is None or remaining > NEAR_SECONDS)


def retrying(seen: Observed, verdict: policies.Verdict, *, now: datetime) -> Plan:
    """Another attempt follows; from now on that is certain, and only its time may change."""
    attempt = seen.job.status.attempts[-1]
    error_class = attempt.error_class or ErrorClass.LOST
    text = f"{words.told(attempt)}. Attempt {attempt.number + 1} follows ({verdict.why})"
    status = statuses.build(
        seen,
        Phase.RETRYING,
        str(error_class),
        text + words.from_where(seen),
        claims=[
            _released(str(error_class), attempt.message or ""),
            Claim(ConditionType.TRAINING, False, str(error_class), attempt.message or ""),
            words.checkpoint_claim(seen),
        ],
        now=now,
        retries=verdict.retries,
        next_attempt_time=_whole(now + timedelta(seconds=verdict.delay)),
        next_overrides=verdict.overrides,
    )
    return Plan(status=status, requeue_after=0)


def last(seen: Observed, verdict: policies.Verdict | None, *, now: datetime) -> Plan:
    """No other attempt follows: the job ends as its last attempt did."""
    attempt = seen.job.status.attempts[-1]
    error_class = attempt.error_class or ErrorClass.LOST
    why = f"; {verdict.why}" if verdict and verdict.why else ""
    return endings.failed(seen, str(error_class), f"{attempt.message}{why}", now=now)


def between(seen: Observed, *, now: datetime) -> Plan:
    """The last attempt has ended: take down what is left of it, then go on with what was decided."""
    seen = with_news(seen, now=now)
    attempt = seen.job.status.attempts[-1]
    undecided = attempt.inspection is not None and seen.job.status.next_attempt_time is None
    if undecided and seen.inspection is not None:
        return _wait_for_inspection(seen, attempt, now=now)
    fence = fences.look(seen, attempt, now=now)
    if fence.left:
        message = f"{words.told(attempt)}; {fence.text}"
        status = statuses.build(seen, None, seen.job.status.reason or "Stopping", message, claims=[], now=now)
        return Plan(status=status, actions=fence.actions, requeue_after=fences.FENCE_SECONDS)
    plan = _after_the_fence(seen, attempt, undecided=undecided, now=now)
    return replace(plan, actions=[*fence.actions, *plan.actions])


def _after_the_fence(seen: Observed, attempt: Attempt, *, undecided: bool, now: datetime) -> Plan:
    status, spec = seen.job.status, seen.job.spec
    if undecided:
        return _wait_for_inspection(seen, attempt, now=now)
    if status.next_attempt_time is None or spec is None:
        verdict = None if spec is None else _judge(seen, Ending(attempt.error_class or ErrorClass.LOST, ""))
        return last(seen, verdict if verdict and not verdict.retry else None, now=now)
    if spec.suspend:
        return suspensions.suspended(seen, now=now)
    over = deadlines.exceeded(seen, None, now=now)
    if over is not None:
        message = f"{over}; the last attempt ended {attempt.error_class}: {attempt.message}"
        return endings.failed(seen, str(ErrorClass.DEADLINE_EXCEEDED), message, now=now)
    if not seen.kuberay_installed:
        return wait_for_kuberay(seen, now=now)
    if now < status.next_attempt_time and not seen.clock_is_behind:
        end_of_all = deadlines.total_end(seen)
        until = min(status.next_attempt_time, end_of_all) if end_of_all else status.next_attempt_time
        told = status
        if status.phase is not Phase.RETRYING or "waits until" in (status.message or ""):
            told = _waiting_for_its_time(seen, attempt, now=now)
        return Plan(status=told, requeue_after=max(0.0, (until - now).total_seconds()))
    return record_next(seen, attempt, now=now)


def _waiting_for_its_time(seen: Observed, attempt: Attempt, *, now: datetime) -> FineTuneJobStatus:
    reason = str(attempt.error_class or ErrorClass.LOST)
    when = seen.job.status.next_attempt_time
    at = f" at {when:%H:%M:%S} UTC" if when else ""
    message = f"{words.told(attempt)}. Attempt {attempt.number + 1} starts{at}"
    return statuses.build(seen, Phase.RETRYING, reason, message + words.from_where(seen), claims=[], now=now)


def record_next(seen: Observed, attempt: Attempt, *, now: datetime) -> Plan:
    """Record the next attempt. Its RayJob is created by the next pass, once this is stored."""
    number = attempt.number + 1
    name = f"{seen.job.name}-a{number}"
    new = Attempt(number=number, ray_job=name, start_time=now, overrides=seen.job.status.next_overrides)
    status = statuses.build(
        seen,
        Phase.RETRYING,
        "Starting",
        f"attempt {number} starts as RayJob {name}{words.from_where(seen)}",
        claims=[SPEC_IS_COMPLETE],
        now=now,
        attempts=[*seen.job.status.attempts, new][-KEPT:],
        next_attempt_time=None,
        next_overrides=None,
    )
    return Plan(status=status, requeue_after=0)


# ---------------------------------------------------------------- inspection


def _inspect(seen: Observed, *, now: datetime) -> Plan:
    attempt = seen.job.status.attempts[-1]
    name = f"{seen.job.name}-i{attempt.number}"
    message = f"{words.told(attempt)}; RayJob {name} looks for a committed artifact"
    status = statuses.build(
        seen,
        Phase.EVALUATING,
        "Inspecting",
        message,
        claims=[
            _released("Inspecting", message),
            Claim(ConditionType.TRAINING, False, "Inspecting", message),
        ],
        now=now,
        attempts=statuses.with_last(seen.job.status.attempts, inspection=name),
    )
    return Plan(status=status, requeue_after=0)


def _wait_for_inspection(seen: Observed, attempt: Attempt, *, now: datetime) -> Plan:
    """What it finds decides. A committed artifact was looked for before we came here."""
    inspection = seen.inspection
    answered = seen.report is not None and seen.report.result is not None
    tried = attempt.end_time is not None and now - attempt.end_time > INSPECTION_LIMIT
    if not answered and not tried and (inspection is None or not inspection.is_over):
        missing = inspection is None and seen.kuberay_installed and attempt.inspection is not None
        actions = [CreateRayJob(attempt.inspection or "", attempt.number, inspect=True)] if missing else []
        return Plan(status=seen.job.status, actions=actions, requeue_after=INSPECTION_SECONDS)
    found = (
        seen.report.result.message
        if seen.report and seen.report.result
        else "its inspection brought no result"
    )
    if attempt.error_class is ErrorClass.INTERNAL and attempt.exit_code == 0:
        message = f"the trainer ended well but left no committed artifact: {found}"
        attempts = statuses.with_last(seen.job.status.attempts, message=message)
        seen = seen.with_status(seen.job.status.model_copy(update={"attempts": attempts}))
    verdict = _judge(seen, Ending(attempt.error_class or ErrorClass.LOST, ""))
    return retrying(seen, verdict, now=now) if verdict.retry else last(seen, verdict, now=now)


def wait_for_kuberay(seen: Observed, *, now: datetime) -> Plan:
    message = "KubeRay is not installed (no API group ray.io/v1): install it, and the job goes on by itself"
    claim = Claim(ConditionType.ACCEPTED, False, "KubeRayUnavailable", message)
    status = statuses.build(seen, Phase.PENDING, claim.reason, message, claims=[claim], now=now)
    return Plan(status=status, requeue_after=INSPECTION_SECONDS)


def _released(reason: str, message: str) -> Claim:
    return Claim(ConditionType.RESOURCES_READY, False, reason, message)


def _not_training(ending: Ending) -> Claim:
    return Claim(ConditionType.TRAINING, False, str(ending.error_class), ending.message)


def _whole(time: datetime) -> datetime:
    """Up to a whole second, as times are stored."""
    return time if time.microsecond == 0 else time.replace(microsecond=0) + timedelta(seconds=1)

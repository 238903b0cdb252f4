"""Between two attempts: what is left of the last one must be gone, and the next one be due."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from finetune_operator.api.finetunejob import Attempt, ErrorClass, FineTuneJobStatus, Phase
from finetune_operator.core import (
    attempts,
    deadlines,
    endings,
    fences,
    inspections,
    policies,
    statuses,
    suspensions,
    words,
)
from finetune_operator.core.conditions import SPEC_IS_COMPLETE
from finetune_operator.core.facts import Observed, Plan

KEPT = 10  # attempts in the status


def decide(seen: Observed, *, now: datetime) -> Plan:
    """The last attempt has ended: take down what is left of it, then go on with what was decided."""
    seen = attempts.with_news(seen, now=now)
    attempt = seen.job.status.attempts[-1]
    undecided = inspections.is_undecided(seen.job.status)
    if undecided and seen.inspection is not None and seen.inspection.ours:
        return inspections.wait(seen, attempt, now=now)
    fence = fences.look(seen, attempt, now=now)
    if fence.left:
        due = undecided or seen.job.status.next_attempt_time is not None
        over = deadlines.told(seen, now=now) if due else ""
        message = f"{words.told(attempt)}{over}; {fence.text}"
        status = statuses.build(seen, None, seen.job.status.reason or "Stopping", message, claims=[], now=now)
        return Plan(status=status, actions=fence.actions, requeue_after=fences.FENCE_SECONDS)
    plan = _after_the_fence(seen, attempt, undecided=undecided, now=now)
    return replace(plan, actions=[*fence.actions, *plan.actions])


def _after_the_fence(seen: Observed, attempt: Attempt, *, undecided: bool, now: datetime) -> Plan:
    status, spec = seen.job.status, seen.job.spec
    if spec is not None and spec.suspend and (undecided or status.next_attempt_time is not None):
        return suspensions.suspended(seen, now=now)
    if undecided:
        return inspections.wait(seen, attempt, now=now)
    if status.next_attempt_time is None:
        verdict = None if spec is None else attempts.judge(seen, attempt.error_class)
        return attempts.last(seen, verdict if verdict and not verdict.retry else None, now=now)
    if spec is None:
        return attempts.wait_for_spec(seen, now=now)
    over = deadlines.exceeded(seen, None, now=now)
    if over is not None:
        message = f"{over}; the last attempt ended {attempt.error_class}: {attempt.message}"
        return endings.failed(seen, str(ErrorClass.DEADLINE_EXCEEDED), message, now=now)
    if not seen.kuberay_installed:
        return attempts.wait_for_kuberay(seen, now=now)
    if now < status.next_attempt_time and not seen.clock_is_behind:
        end_of_all = deadlines.total_end(seen)
        until = min(status.next_attempt_time, end_of_all) if end_of_all else status.next_attempt_time
        told = status
        if status.phase is not words.phase_after(attempt) or "waits until" in (status.message or ""):
            told = _waiting_for_its_time(seen, attempt, now=now)
        return Plan(status=told, requeue_after=max(0.0, (until - now).total_seconds()))
    if seen.job.problem is not None:
        return attempts.wait_for_spec(seen, now=now)
    return _record_next(seen, attempt, now=now)


def _waiting_for_its_time(seen: Observed, attempt: Attempt, *, now: datetime) -> FineTuneJobStatus:
    when = seen.job.status.next_attempt_time
    at = f" at {when:%H:%M:%S} UTC" if when else ""
    message = f"{words.told(attempt)}. Attempt {attempt.number + 1} starts{at}"
    message += words.from_where(seen)
    return statuses.build(
        seen, words.phase_after(attempt), words.reason_after(attempt), message, claims=[], now=now
    )


def _record_next(seen: Observed, attempt: Attempt, *, now: datetime) -> Plan:
    """Record the next attempt. Its RayJob is created by the next pass, once this is stored."""
    if attempt.number == policies.CHECK and attempt.error_class is ErrorClass.SUSPENDED:
        return _check_again(seen, attempt, now=now)
    number = attempt.number + 1
    name = f"{seen.job.name}-a{number}"
    new = Attempt(number=number, ray_job=name, start_time=now, overrides=seen.job.status.next_overrides)
    status = statuses.build(
        seen,
        words.phase_after(attempt),
        "Starting",
        f"attempt {number} starts as RayJob {name}{words.from_where(seen)}",
        claims=[SPEC_IS_COMPLETE],
        now=now,
        attempts=[*seen.job.status.attempts, new][-KEPT:],
        next_attempt_time=None,
        next_overrides=None,
    )
    return Plan(status=status, requeue_after=0)


def _check_again(seen: Observed, attempt: Attempt, *, now: datetime) -> Plan:
    """The check was suspended before it was through. It had no GPU, no step and no cost: it begins anew."""
    message = f"the check begins anew as RayJob {attempt.ray_job}"
    status = statuses.build(
        seen,
        Phase.PENDING,
        "Starting",
        message,
        claims=[SPEC_IS_COMPLETE],
        now=now,
        attempts=[Attempt(number=attempt.number, ray_job=attempt.ray_job, start_time=now)],
        next_attempt_time=None,
    )
    return Plan(status=status, requeue_after=0)

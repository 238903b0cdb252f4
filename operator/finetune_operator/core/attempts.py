"""From one attempt to the next: how an attempt ends, what must be gone before another one, and what follows.

Everything is recorded before it is done. An attempt that has ended is in one of three states, by what is stored:
undecided (an inspection looks for a committed artifact), due (`status.nextAttemptTime` is set: another attempt
follows), or last (neither: the job ends once nothing of it runs any more).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from finetune_operator.api.finetunejob import ErrorClass, FineTuneJobStatus, Phase, Retries
from finetune_operator.core import (
    accounts,
    conditions,
    deadlines,
    endings,
    fences,
    policies,
    reports,
    statuses,
    texts,
    words,
)
from finetune_operator.core.conditions import Claim, ConditionType
from finetune_operator.core.facts import Observed, Plan

KUBERAY_SECONDS = 10.0  # between two looks for an API that is missing
FRESH_SECONDS = 60.0
NEAR_SECONDS = 60
NO_SUCH_COMMAND = 2  # exit code of a program that does not know its arguments (argparse)


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
    checks = attempts[-1].number == policies.CHECK
    if checks:
        ending = _of_a_check(ending)
    last_step = ending.step or attempts[-1].last_step  # 0: it ended before it knew where it goes on
    attempts = statuses.with_last(
        attempts,
        end_time=accounts.end_of_attempt(seen, now=now),
        error_class=ending.error_class,
        exit_code=ending.exit_code,
        message=ending.message[: texts.LONGEST],
        last_step=last_step,
        lost_steps=accounts.lost_steps(seen, last_step=last_step),
        gpu_seconds=accounts.gpu_seconds(seen, now=now),
        **statuses.rayjob_uid(seen),
    )
    updated = seen.job.status.model_copy(update={"attempts": attempts})
    seen = replace(seen, job=replace(seen.job, status=updated))
    verdict = judge(seen, ending.error_class, final=ending.final)
    if ending.inspect or (not verdict.retry and not checks and _may_be_committed(seen, ending)):
        return _inspect(seen, now=now)
    if verdict.retry:
        return retrying(seen, verdict, now=now)
    if fences.is_stopping_by_itself(seen):
        return last(seen, verdict, now=now)
    claims = [_released(str(ending.error_class), ending.message), _not_training(ending)]
    message = f"{ending.message}; what is left of attempt {attempts[-1].number} is being stopped"
    status = statuses.build(seen, None, "Stopping", message, claims=claims, now=now)
    return Plan(status=status, requeue_after=0)


def _of_a_check(ending: Ending) -> Ending:
    """How a check ended. One of which nobody heard leaves nothing to look for: its exit code says it all."""
    if ending.exit_code == NO_SUCH_COMMAND:
        text = "nothing was checked, as the training image is of an older version, which has no check"
        return Ending(ErrorClass.CHECKED, text, exit_code=NO_SUCH_COMMAND)
    if ending.inspect and ending.exit_code == 0:
        return Ending(ErrorClass.CHECKED, "nothing was found that speaks against training", exit_code=0)
    return replace(ending, inspect=False)


def with_news(seen: Observed, *, now: datetime) -> Observed:
    """The facts with what the last attempt's latest report tells of steps and checkpoints, be it late or in time."""
    report, known = seen.report, seen.job.status
    if report is None:
        return seen
    late = known.attempts[-1].end_time is not None
    attempts = accounts.with_late_report(seen, report) if late else accounts.with_report(seen, report)
    start = known.attempts[-1].start_time
    checkpoint = reports.checkpoint_of(report, known=known.checkpoint, attempt_start=start, now=now)
    status = known.model_copy(update={"attempts": attempts, "checkpoint": checkpoint})
    seen = replace(seen, job=replace(seen.job, status=status))
    if checkpoint == known.checkpoint:
        return seen
    merged = conditions.merge(
        status.conditions, [words.checkpoint_claim(seen)], now=now, generation=seen.job.generation
    )
    status = status.model_copy(update={"conditions": merged})
    return replace(seen, job=replace(seen.job, status=status))


def judge(seen: Observed, error_class: ErrorClass | None, *, final: bool = False) -> policies.Verdict:
    """What follows on the last attempt, which ended with this class."""
    if final or seen.job.spec is None:
        return policies.Verdict(False, "", seen.job.status.retries or Retries())
    told = error_class or ErrorClass.LOST
    return policies.judge(told, spec=seen.job.spec, status=seen.job.status, uid=seen.job.uid)


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
    reason = words.reason_after(attempt)
    over = deadlines.exceeded(seen, None, now=now)
    follows = f"Attempt {attempt.number + 1} follows ({verdict.why}){words.from_where(seen)}"
    text = f"{words.told(attempt)}. {f'No other attempt follows: {over}' if over else follows}"
    status = statuses.build(
        seen,
        words.phase_after(attempt),
        reason,
        text,
        claims=[
            _released(reason, attempt.message or ""),
            Claim(ConditionType.TRAINING, False, reason, attempt.message or ""),
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


def _inspect(seen: Observed, *, now: datetime) -> Plan:
    name = f"{seen.job.name}-i{seen.job.status.attempts[-1].number}"
    status = inspecting(seen, name, now=now)
    found = statuses.with_last(seen.job.status.attempts, inspection=name)
    return Plan(status=status.model_copy(update={"attempts": found}), requeue_after=0)


def inspecting(seen: Observed, name: str, *, now: datetime) -> FineTuneJobStatus:
    """Nothing of the attempt runs any more, and the RayJob of that name looks for what it left."""
    ended = f"{words.told(seen.job.status.attempts[-1])}{deadlines.told(seen, now=now)}"
    message = f"{ended}; RayJob {name} looks for a committed artifact"
    claims = [
        _released("Inspecting", message),
        Claim(ConditionType.TRAINING, False, "Inspecting", message),
    ]
    return statuses.build(seen, Phase.EVALUATING, "Inspecting", message, claims=claims, now=now)


def wait_for_spec(seen: Observed, *, now: datetime) -> Plan:
    """An attempt is due, and what it would be is not known: during an upgrade the CRDs may be newer than we are."""
    message = seen.job.problem or "the spec cannot be read"
    claim = Claim(ConditionType.ACCEPTED, False, "InvalidSpec", message)
    status = statuses.build(seen, Phase.PENDING, claim.reason, message, claims=[claim], now=now)
    return Plan(status=status)


def wait_for_kuberay(seen: Observed, *, now: datetime) -> Plan:
    message = (
        "KubeRay is not installed, or much too old (there is no API ray.io/v1): install 1.3 or newer, and the job "
        "goes on by itself"
    )
    claim = Claim(ConditionType.ACCEPTED, False, "KubeRayUnavailable", message)
    status = statuses.build(seen, Phase.PENDING, claim.reason, message, claims=[claim], now=now)
    return Plan(status=status, requeue_after=KUBERAY_SECONDS)


def _released(reason: str, message: str) -> Claim:
    return Claim(ConditionType.RESOURCES_READY, False, reason, message)


def _not_training(ending: Ending) -> Claim:
    return Claim(ConditionType.TRAINING, False, str(ending.error_class), ending.message)


def _whole(time: datetime) -> datetime:
    """Up to a whole second, as times are stored."""
    return time if time.microsecond == 0 else time.replace(microsecond=0) + timedelta(seconds=1)

"""An attempt that has ended without a word may have left an artifact: an inspection looks for it, and decides.

It is a RayJob of the same image, volumes and secrets, without GPUs, whose entrypoint verifies the folder and reports.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_operator.api.finetunejob import Attempt, ErrorClass, FineTuneJobStatus, Phase
from finetune_operator.core import attempts, failures, reports, statuses, texts, words
from finetune_operator.core.facts import CreateRayJob, DeleteRayJob, Observed, Plan, RayJobFacts

INTERVAL_SECONDS = 10.0
LIMIT = timedelta(minutes=15)  # an inspection that cannot run must not hold the job for ever
PAUSE = timedelta(seconds=60)  # between two, where the storage did not answer the first
UNSEEN = frozenset({ErrorClass.SUCCEEDED, ErrorClass.STORAGE, ErrorClass.LOST, ErrorClass.PREEMPTED})


def is_undecided(status: FineTuneJobStatus) -> bool:
    """Whether an inspection of the last attempt, which has ended, decides what follows."""
    attempt = status.attempts[-1]
    cancelled = attempt.error_class is ErrorClass.CANCELLED
    return attempt.inspection is not None and status.next_attempt_time is None and not cancelled


def wait(seen: Observed, attempt: Attempt, *, now: datetime) -> Plan:
    """What it finds decides. A committed artifact was looked for before we came here."""
    inspection, result = seen.inspection, seen.report.result if seen.report else None
    if result is not None and seen.report is not None and not seen.report.is_of_inspection:
        return _told_late(seen, result, now=now)
    if result is not None and _is_of_an_earlier_inspection(seen):
        result = None
    if inspection is not None and not inspection.ours:
        return _name_is_taken(seen, attempt, inspection, now=now)
    if _has_looked(inspection, result):
        found = result.message if result is not None else "its inspection found none"
        return none_found(seen, found, now=now)
    if inspection is None:
        return _begin(seen, attempt, now=now)
    age = now - inspection.created if inspection.created else timedelta()
    status = attempts.inspecting(seen, inspection.name, now=now)
    if inspection.deleting_since or (result is None and not inspection.is_over and age <= LIMIT):
        return Plan(status=status, requeue_after=INTERVAL_SECONDS)
    if attempt.end_time is not None and now - attempt.end_time <= LIMIT:
        again = [] if age < PAUSE else [DeleteRayJob(inspection.name, inspection.uid)]
        return Plan(status=status, actions=again, requeue_after=INTERVAL_SECONDS)
    found = result.message if result is not None else "its inspection brought no result"
    return none_found(seen, found, now=now)


def _name_is_taken(seen: Observed, attempt: Attempt, taken: RayJobFacts, *, now: datetime) -> Plan:
    """A RayJob of its name is not ours: it tells nothing about the attempt, and is left alone."""
    whose = "an earlier job of this name" if taken.of_a_namesake else "someone else"
    found = f"RayJob {taken.name} exists and belongs to {whose}"
    if attempt.end_time is not None and now - attempt.end_time > LIMIT:
        return none_found(seen, found, now=now)
    message = f"{words.told(attempt)}; no committed artifact can be looked for: {found}, delete it"
    status = statuses.build(seen, Phase.EVALUATING, "NameTaken", message, claims=[], now=now)
    return Plan(status=status, requeue_after=INTERVAL_SECONDS)


def _has_looked(inspection: RayJobFacts | None, result: reports.Result | None) -> bool:
    """Whether an inspection saw that there is no artifact, by its report or else by its exit code. One whose storage
    did not answer, or that found one and could not say so, has to look again."""
    if result is not None:
        return result.error_class is not ErrorClass.STORAGE
    if inspection is None or not inspection.is_over:
        return False
    exit_code = failures.exit_code_of(inspection.message)
    return exit_code is not None and failures.class_of(exit_code) not in UNSEEN


def _begin(seen: Observed, attempt: Attempt, *, now: datetime) -> Plan:
    """Its RayJob. The status may still tell of what had to be gone first."""
    name = attempt.inspection or ""
    actions = [] if not seen.kuberay_installed else [CreateRayJob(name, attempt.number, inspect=True)]
    status = attempts.inspecting(seen, name, now=now)
    return Plan(status=status, actions=actions, requeue_after=INTERVAL_SECONDS)


def _is_of_an_earlier_inspection(seen: Observed) -> bool:
    """Whether the storage did not answer an inspection that is gone, and another one looks now."""
    created = seen.inspection.created if seen.inspection else None
    return created is not None and seen.reported_at is not None and seen.reported_at < created


def _told_late(seen: Observed, result: reports.Result, *, now: datetime) -> Plan:
    """The trainer itself was heard in the end, and it left no artifact: its word counts, not what was guessed. That it
    was stopped is no news: we did that, or gave it up before."""
    guessed = seen.job.status.attempts[-1].error_class in (ErrorClass.LOST, ErrorClass.STALLED)
    if not guessed or result.error_class is ErrorClass.PREEMPTED:
        return none_found(seen, result.message, now=now)
    told = statuses.with_last(
        seen.job.status.attempts,
        error_class=result.error_class,
        exit_code=result.exit_code,
        message=result.message[: texts.LONGEST] or None,
    )
    seen = seen.with_status(seen.job.status.model_copy(update={"attempts": told}))
    return _decided(seen, now=now)


def none_found(seen: Observed, found: str, *, now: datetime) -> Plan:
    """No artifact was found; `found` says what was seen instead."""
    attempt = seen.job.status.attempts[-1]
    if attempt.error_class is ErrorClass.INTERNAL and attempt.exit_code == 0:
        message = f"the trainer ended well but left no committed artifact: {found}"
        told = statuses.with_last(seen.job.status.attempts, message=message[: texts.LONGEST])
        seen = seen.with_status(seen.job.status.model_copy(update={"attempts": told}))
    return _decided(seen, now=now)


def _decided(seen: Observed, *, now: datetime) -> Plan:
    """There is no artifact: what follows on the attempt's class."""
    verdict = attempts.judge(seen, seen.job.status.attempts[-1].error_class)
    follow = attempts.retrying if verdict.retry else attempts.last
    return follow(seen, verdict, now=now)

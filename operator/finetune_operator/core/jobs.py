"""What a FineTuneJob is in, and what to do next: `decide` turns facts and a time into a plan.

The order of the rules is the order of trust: a committed artifact that was reported, then what the user asks for, then
the clocks, then what KubeRay says of the process. Nothing here is done before the status that records it was written,
so the operator may be killed between any two passes.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from finetune_operator.api.finetunejob import (
    Attempt,
    ErrorClass,
    FineTuneJobStatus,
    LastAction,
    Phase,
)
from finetune_operator.core import (
    attempts,
    beginning,
    between,
    costs,
    deadlines,
    endings,
    inspections,
    running,
    statuses,
    suspensions,
    texts,
)
from finetune_operator.core.attempts import Ending
from finetune_operator.core.conditions import SPEC_IS_COMPLETE, Claim, ConditionType
from finetune_operator.core.facts import (
    RELEASED,
    CreateRayJob,
    Defaults,
    DeleteJob,
    DeleteRayJob,
    Observed,
    Plan,
    RayJobFacts,
)
from finetune_operator.core.reports import Result

WAITING_SECONDS = running.WAITING_SECONDS
RESYNC_SECONDS = running.RESYNC_SECONDS
NAMESAKE_SECONDS = 2.0
CLEANUP_WINDOW_SECONDS = 900.0  # after its end, a job's RayJob is looked at for this long
CANCEL = "cancel"


def decide(seen: Observed, *, defaults: Defaults, now: datetime) -> Plan:
    """The next step of a job. Pure: the same facts give the same plan."""
    if seen.job.deleting:
        return _while_it_is_deleted(seen)
    if is_finished(seen.job.status):
        return _after_the_end(seen, now=now)
    plan = _decide_unfinished(_with_action(seen), defaults=defaults, now=now)
    status = costs.updated(seen.job.status, plan.status, spec=seen.job.spec, prices=defaults.prices)
    plan = replace(plan, status=status)
    return replace(plan, events=statuses.events(seen.job.status, plan.status))


def is_finished(status: FineTuneJobStatus) -> bool:
    """Whether the job has ended. A final phase that somebody wrote by hand, without the time that stands beside ours,
    ends nothing."""
    return status.phase in statuses.FINAL_PHASES and status.completion_time is not None


def has_cleanup_left(status: FineTuneJobStatus, *, now: datetime) -> bool:
    """Whether the RayJob of a finished job is still worth a look."""
    if status.completion_time is None or not status.attempts:
        return False
    return (now - status.completion_time).total_seconds() < CLEANUP_WINDOW_SECONDS


def _while_it_is_deleted(seen: Observed) -> Plan:
    """Somebody's finalizer holds the job, and garbage collection waits for that: what runs is taken down meanwhile."""
    there = [rayjob for rayjob in (seen.rayjob, seen.inspection) if rayjob is not None and rayjob.ours]
    actions = [DeleteRayJob(one.name, one.uid) for one in there if one.deleting_since is None]
    return Plan(status=seen.job.status, actions=[] if seen.job.orphans else actions)


def _after_the_end(seen: Observed, *, now: datetime) -> Plan:
    """Terminal is final: nothing is started. What still runs is taken down, and an old job is deleted."""
    status, spec = seen.job.status, seen.job.spec
    age = (now - status.completion_time).total_seconds() if status.completion_time else 0.0
    ttl = spec.ttl_seconds_after_finished if spec else None
    if ttl is not None and age >= ttl:
        return Plan(status=status, actions=[DeleteJob()])
    waits = [] if ttl is None else [ttl - age]
    actions = []
    for rayjob in (seen.rayjob, seen.inspection):
        if rayjob is None or not rayjob.ours or _is_at_rest(seen, rayjob) or rayjob.deleting_since:
            continue
        patience = endings.patience(rayjob, phase=status.phase)
        if age >= patience:
            actions.append(DeleteRayJob(rayjob.name, rayjob.uid))
        waits.append(max(1.0, patience - age))
    return Plan(status=status, actions=tuple(actions), requeue_after=min(waits, default=None))


def _is_at_rest(seen: Observed, rayjob: RayJobFacts) -> bool:
    """Whether nothing of it runs. KubeRay leaves the cluster of a RayJob alone that became invalid while it ran."""
    if rayjob.deployment_status in RELEASED:
        return True
    began = bool(rayjob.job_status) or seen.job.status.attempts[-1].last_step is not None
    return rayjob.is_over and not began


def _with_action(seen: Observed) -> Observed:
    """The facts with the annotation's verb taken note of; an unknown one is refused once."""
    value = seen.job.action
    if value is None:
        return seen
    refused = verb_of(value) != CANCEL
    message = f"{value[:60]!r} is no action of a FineTuneJob; there is {CANCEL}" if refused else "cancelled"
    taken = LastAction(value=value[:128], refused=refused, message=message)
    status = seen.job.status.model_copy(update={"last_action": taken})
    return seen.with_status(status)


def verb_of(value: str) -> str:
    """The verb of an action; what is behind a slash tells one order from the next."""
    return value.partition("/")[0].strip().lower()


def _is_cancelled(seen: Observed) -> bool:
    return seen.job.action is not None and verb_of(seen.job.action) == CANCEL


def _decide_unfinished(seen: Observed, *, defaults: Defaults, now: datetime) -> Plan:
    spec, known = seen.job.spec, seen.job.status
    result = seen.report.result if seen.report and known.attempts else None
    if result is not None and result.artifact is not None:
        return endings.succeeded(seen, result, result.artifact, now=now)
    if spec is not None and not spec.suspend:
        seen = suspensions.resumed(seen, now=now)
    if not known.attempts:
        if _is_cancelled(seen):
            text = "cancelled by the annotation finetune.dev/action before the first attempt"
            return endings.failed(seen, str(ErrorClass.CANCELLED), text, now=now)
        return beginning.decide(seen, defaults=defaults, now=now)
    attempt = known.attempts[-1]
    if attempt.end_time is not None:
        open_ended = known.next_attempt_time is not None or inspections.is_undecided(known)
        if open_ended and (order := _order_to_end(seen)):
            return _cancelled_between(seen, order, now=now)
        return between.decide(seen, now=now)
    return _decide_live(seen, attempt, now=now)


def _decide_live(seen: Observed, attempt: Attempt, *, now: datetime) -> Plan:
    """The last attempt may run."""
    seen = _without_a_copy(seen, attempt)
    result, rayjob = seen.report.result if seen.report else None, seen.rayjob
    if result is not None and rayjob is not None and _was_held_back(rayjob, result):
        seen = attempts.with_news(seen, now=now)
        attempt = seen.job.status.attempts[-1]
    elif result is not None:
        return attempts.end(seen, _ending_of(seen, attempt, result), now=now)
    if _is_cancelled(seen):
        order = Ending(ErrorClass.CANCELLED, "cancelled by the annotation finetune.dev/action")
        return attempts.end(seen, order, now=now)
    if seen.job.spec is not None and seen.job.spec.suspend:
        return attempts.end(seen, Ending(ErrorClass.SUSPENDED, "suspended by spec.suspend"), now=now)
    done = rayjob is not None and rayjob.ours and rayjob.is_over  # in time, though we heard of it late
    over = None if done else deadlines.exceeded(seen, attempt, now=now)
    if over is not None:
        inspect = attempt.last_step is not None and not attempts.is_far_from_its_end(seen, now=now)
        return attempts.end(seen, Ending(ErrorClass.DEADLINE_EXCEEDED, over, inspect=inspect), now=now)
    if rayjob is None:
        return _without_rayjob(seen, attempt, now=now)
    if rayjob.of_a_namesake or (not rayjob.ours and rayjob.deleting_since):
        return _wait_for_namesake(seen, attempt, now=now)
    if not rayjob.ours:
        taken = f"RayJob {rayjob.name} exists and belongs to someone else: delete it or choose another name"
        return attempts.end(seen, Ending(ErrorClass.BAD_CONFIG, taken, final=True), now=now)
    return running.decide(seen, attempt, rayjob, now=now)


def _without_a_copy(seen: Observed, attempt: Attempt) -> Observed:
    """The facts as if the attempt's RayJob was not there, where another one has its name and owner (kubectl replace
    --force): the pods of the one that was created may still write, and are waited for as after any other deletion."""
    rayjob = seen.rayjob
    is_copy = rayjob is not None and rayjob.ours and attempt.uid is not None and rayjob.uid != attempt.uid
    return replace(seen, rayjob=None) if is_copy else seen


def _ending_of(seen: Observed, attempt: Attempt, result: Result) -> Ending:
    """How the attempt ended in the trainer's words, but for what it cannot know: that its RayJob was deleted, or why
    its pod is taken away."""
    rayjob = seen.rayjob
    gone = attempt.uid is not None if rayjob is None else rayjob.ours and rayjob.deleting_since is not None
    if gone and result.error_class is ErrorClass.PREEMPTED:
        error_class, message = ErrorClass.LOST, f"RayJob {attempt.ray_job} was deleted before it finished"
    else:
        error_class, message = result.error_class, result.message
    taken = next((pod.disruption for pod in seen.pods if pod.disruption), None)
    if taken is not None and error_class is ErrorClass.PREEMPTED:
        message = f"{message} ({taken})"
    return Ending(error_class, message, exit_code=result.exit_code, step=result.step)


def _was_held_back(rayjob: RayJobFacts, result: Result) -> bool:
    """Whether the trainer ended because somebody else suspended its RayJob: it goes on when that is let go."""
    return rayjob.ours and rayjob.is_held_back and result.error_class is ErrorClass.PREEMPTED


def _order_to_end(seen: Observed) -> str | None:
    """Who wants no other attempt, as a sentence. A trainer that is stopped through Ray's dashboard calls itself
    preempted, as it hears the same signal; KubeRay tells a moment later that somebody stopped it."""
    if _is_cancelled(seen):
        return "cancelled by the annotation finetune.dev/action"
    rayjob, attempt = seen.rayjob, seen.job.status.attempts[-1]
    if rayjob is None or not rayjob.ours or rayjob.deleting_since is not None:
        return None
    stopped = rayjob.job_status == "STOPPED" and attempt.error_class is ErrorClass.PREEMPTED
    return f"Ray job of {rayjob.name} was stopped" if stopped else None


def _cancelled_between(seen: Observed, message: str, *, now: datetime) -> Plan:
    """Cancelled while another attempt was due: it is due no more, and the job ends when the last one is gone."""
    before = seen.job.status.attempts[-1]
    told = f"{message}; before that it had ended {before.error_class}: {before.message}"
    updated = statuses.with_last(
        seen.job.status.attempts, error_class=ErrorClass.CANCELLED, message=told[: texts.LONGEST]
    )
    status = statuses.build(
        seen,
        None,
        "Stopping",
        message,
        claims=[],
        now=now,
        attempts=updated,
        next_attempt_time=None,
        next_overrides=None,
    )
    return Plan(status=status, requeue_after=0)


# ---------------------------------------------------------------- until the RayJob is there


def _without_rayjob(seen: Observed, attempt: Attempt, *, now: datetime) -> Plan:
    if not seen.kuberay_installed:
        return attempts.wait_for_kuberay(seen, now=now)
    if attempt.uid is not None:
        gone = f"RayJob {attempt.ray_job} was deleted before it finished"
        inspect = attempt.last_step is not None and not attempts.is_far_from_its_end(seen, now=now)
        return attempts.end(seen, Ending(ErrorClass.LOST, gone, inspect=inspect), now=now)
    if any(not pod.gone for pod in seen.pods):
        return _wait_for_namesake(seen, attempt, now=now)
    if seen.job.problem is not None:
        return attempts.wait_for_spec(seen, now=now)
    message = f"RayJob {attempt.ray_job} is being created"
    status = statuses.build(
        seen,
        Phase.PROVISIONING,
        "Provisioning",
        message,
        claims=[
            SPEC_IS_COMPLETE,
            Claim(ConditionType.RESOURCES_READY, False, "Provisioning", message),
        ],
        now=now,
    )
    return Plan(
        status=status, actions=[CreateRayJob(attempt.ray_job, attempt.number)], requeue_after=WAITING_SECONDS
    )


def _wait_for_namesake(seen: Observed, attempt: Attempt, *, now: datetime) -> Plan:
    """A job was deleted and created again under its name: what the former one started has to go first."""
    pods = [pod.name for pod in seen.pods if not pod.gone]
    what = f"RayJob {attempt.ray_job}" if seen.rayjob or not pods else f"pod {sorted(pods)[0]}"
    return waits_for_namesake(seen, what, now=now)


def waits_for_namesake(seen: Observed, what: str, *, now: datetime) -> Plan:
    """Nothing is started while `what` is there, an object of an earlier job of this name."""
    message = f"waits until {what} of an earlier job of this name is gone"
    claim = Claim(ConditionType.RESOURCES_READY, False, "NameTaken", message)
    status = statuses.build(seen, Phase.PROVISIONING, "NameTaken", message, claims=[claim], now=now)
    return Plan(status=status, requeue_after=NAMESAKE_SECONDS)

"""An attempt whose RayJob exists: waiting for room, running, silent, or over."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from finetune_operator.api.finetunejob import (
    UNLIMITED,
    Attempt,
    ErrorClass,
    FineTuneJobStatus,
    Phase,
    Progress,
    Retries,
)
from finetune_operator.core import (
    accounts,
    attempts,
    deadlines,
    failures,
    queues,
    reports,
    statuses,
    texts,
    waits,
    words,
)
from finetune_operator.core.attempts import Ending
from finetune_operator.core.conditions import Claim, ConditionType
from finetune_operator.core.durations import format_duration
from finetune_operator.core.facts import Observed, Plan, PodFacts, RayJobFacts, WriteRunFile
from finetune_operator.core.reports import Report

RESYNC_SECONDS = 60.0  # an active job is looked at again even if every watch event was lost
WAITING_SECONDS = 10.0  # so that a reason to wait shows in the status within 15 s
FRESH_SECONDS = 30.0
# Without a report before the status says so: a trainer tells each step and each piece of its work.
QUIET_SECONDS = 180.0
QUIET_STEPS = 2.0  # the same in steps, where each takes minutes

PHASE_TEXTS = {
    Phase.VALIDATING: ("Validating", "the trainer checks configuration, model and data"),
    Phase.RUNNING: ("Training", "optimizer steps are being taken"),
    Phase.EVALUATING: ("Exporting", "training is over; the artifact is evaluated and written"),
}


def decide(seen: Observed, attempt: Attempt, rayjob: RayJobFacts, *, now: datetime) -> Plan:
    """The next step of an attempt by what KubeRay, its pods and its trainer tell."""
    if rayjob.is_over:
        return _over(seen, attempt, rayjob, now=now)
    submitter = next((pod for pod in seen.pods if pod.submitter_exit_code is not None), None)
    if submitter is not None and rayjob.deployment_status in ("", "Initializing"):
        return _hung_sidecar(seen, submitter, now=now)
    if rayjob.is_held_back:
        return _held_back(seen, rayjob, now=now)
    silent = deadlines.silent_end(seen, attempt)
    if silent is not None and now >= silent:
        return _stalled(seen, attempt, now=now)
    if _is_at_work(seen, rayjob, now=now):
        return _underway(seen, attempt, rayjob, now=now)
    return _provisioning(seen, attempt, rayjob, now=now)


def _is_at_work(seen: Observed, rayjob: RayJobFacts, *, now: datetime) -> bool:
    """Whether the trainer of this attempt runs. Once it was seen at work, that stands until KubeRay begins anew: the
    Ray job's own status is empty, pending or over for a moment at the beginning and at the end."""
    status = seen.job.status
    if rayjob.deployment_status == "Running":
        return (
            seen.report is not None or rayjob.job_status == "RUNNING" or status.phase in PHASE_TEXTS
        ) and not _is_old(seen)
    if seen.reported_at is None or _is_old(seen):
        return False
    # KubeRay gets a cluster ready: with SidecarMode the trainer may report already; else this is an old report.
    return (now - seen.reported_at).total_seconds() <= FRESH_SECONDS


def _is_old(seen: Observed) -> bool:
    """Whether the latest report is from before the attempt was held back."""
    ready = statuses.condition(seen.job.status, ConditionType.RESOURCES_READY)
    if ready is None or seen.reported_at is None or seen.job.status.phase is not Phase.QUEUED:
        return False
    return seen.reported_at <= ready.last_transition_time


# ---------------------------------------------------------------- the end of the process


def _over(seen: Observed, attempt: Attempt, rayjob: RayJobFacts, *, now: datetime) -> Plan:
    """The RayJob is over without a report: believe the exit code; where there is none, look for the artifact."""
    if rayjob.job_status == "STOPPED":
        stopped = Ending(ErrorClass.CANCELLED, f"Ray job of {rayjob.name} was stopped")
        return attempts.end(seen, stopped, now=now)
    if rayjob.deployment_status == "ValidationFailed":
        return attempts.end(seen, _invalid(seen, attempt, rayjob), now=now)
    if rayjob.deployment_status == "Complete":
        silent = "the trainer ended well and did not say what it left"
        done = Ending(ErrorClass.INTERNAL, silent, exit_code=0, inspect=True)
        return attempts.end(seen, done, now=now)
    exit_code = failures.exit_code_of(rayjob.message)
    error_class, message = failures.class_of(exit_code), failures.message_of(rayjob)
    if error_class is ErrorClass.LOST:
        cause = failures.cause(rayjob, seen.pods)
        if cause is not None:
            error_class, message = cause[0], f"{cause[1]} ({message})"
    begun = attempt.last_step is not None
    inspect = error_class is ErrorClass.LOST and begun and not attempts.is_far_from_its_end(seen, now=now)
    return attempts.end(seen, Ending(error_class, message, exit_code=exit_code, inspect=inspect), now=now)


def _invalid(seen: Observed, attempt: Attempt, rayjob: RayJobFacts) -> Ending:
    """KubeRay checks a RayJob each time that it looks: one that ran and is invalid now was changed by somebody."""
    told = texts.one_line(rayjob.message)
    running = statuses.holds_since(seen.job.status, ConditionType.RESOURCES_READY) is not None
    if running or rayjob.job_status or attempt.last_step is not None:
        text = f"RayJob {rayjob.name} was changed while it ran, and KubeRay refuses it now: {told}"
        return Ending(ErrorClass.LOST, text)
    return Ending(ErrorClass.BAD_CONFIG, f"KubeRay refuses RayJob {rayjob.name}: {told}", final=True)


def _hung_sidecar(seen: Observed, pod: PodFacts, *, now: datetime) -> Plan:
    """SidecarMode: a submitter that has ended makes the head pod unready for ever, and KubeRay waits for it."""
    exit_code = pod.submitter_exit_code
    text = f"the trainer ended with exit code {exit_code} before the cluster was ready (pod {pod.name})"
    if exit_code == 1:  # also the submitter's own, where Ray does not take the job
        text = f"Ray did not take the job, or {text}"
    if exit_code == 0:
        return attempts.end(seen, Ending(ErrorClass.INTERNAL, text, exit_code=0, inspect=True), now=now)
    return attempts.end(seen, Ending(failures.class_of(exit_code), text, exit_code=exit_code), now=now)


def _stalled(seen: Observed, attempt: Attempt, *, now: datetime) -> Plan:
    heard = deadlines.last_heard(seen, attempt)
    seconds = seen.job.spec.deadlines.stall_seconds if seen.job.spec else 0
    last = f"after step {attempt.last_step}" if attempt.last_step is not None else "since its pod runs"
    if heard is not None and attempt.last_step is None:
        last = "since it began to check the data"
    text = f"no report for {format_duration(seconds)} (spec.deadlines.stallSeconds) {last}"
    inspect = attempt.last_step is not None
    return attempts.end(seen, Ending(ErrorClass.STALLED, text, inspect=inspect), now=now)


# ---------------------------------------------------------------- while it runs


def _underway(seen: Observed, attempt: Attempt, rayjob: RayJobFacts, *, now: datetime) -> Plan:
    report, known = seen.report, seen.job.status
    phase = reports.phase_of(report) if report else _phase_without_report(known)
    training = phase is Phase.RUNNING
    reason, message = PHASE_TEXTS[phase]
    claim = Claim(ConditionType.TRAINING, training, reason, message)
    reason, message = _quiet(seen, attempt, rayjob, now=now) or (reason, message)
    updates: dict[str, Any] = {
        "attempts": statuses.with_last(known.attempts, uid=rayjob.uid),
    }
    claims = [
        Claim(ConditionType.RESOURCES_READY, True, "PodsRunning", "the training pod runs"),
        claim,
        *queues.admitted(rayjob),
    ]
    if report is not None:
        checkpoint = reports.checkpoint_of(
            report, known=known.checkpoint, attempt_start=attempt.start_time, now=now
        )
        updates |= {
            "progress": _progress(report, known, at=seen.reported_at),
            "metrics": reports.metrics_of(report, known=known.metrics),
            "effective": statuses.merge_effective(known.effective, report.finetune.effective),
            "attempts": accounts.with_report(seen, report),
            "checkpoint": checkpoint,
        }
        if checkpoint != known.checkpoint:
            saved = known.model_copy(update={"checkpoint": checkpoint})
            claims.append(words.checkpoint_claim(seen.with_status(saved)))
    status = statuses.build(seen, phase, reason, message, claims=claims, now=now, **updates)
    again = deadlines.next_check(seen.with_status(status), attempt, now=now, most=RESYNC_SECONDS)
    heard = deadlines.last_heard(seen, attempt)
    silent = heard is not None and (now - heard).total_seconds() >= RESYNC_SECONDS
    # It may not know our authority: that was replaced since it started, and it reads the file for each report.
    actions = (WriteRunFile(rayjob.name, attempt.number),) if silent else ()
    return Plan(status=status, actions=actions, requeue_after=again)


def _quiet(seen: Observed, attempt: Attempt, rayjob: RayJobFacts, *, now: datetime) -> tuple[str, str] | None:
    """What to tell of a trainer that has not reported for some time: it may train all the same, and is about to be
    given up."""
    since, end = deadlines.silent_since(seen, attempt), deadlines.silent_end(seen, attempt)
    usual = max(QUIET_SECONDS, QUIET_STEPS * reports.seconds_per_step(seen.job.status.progress))
    if since is None or end is None or (now - since).total_seconds() < usual:
        return None
    text = (
        f"no report since {since:%H:%M:%S} UTC: the trainer hangs, is at one step for so long, or cannot reach the "
        "operator, as a NetworkPolicy may forbid (its log says then that progress could not be reported: kubectl logs "
        f"job/{rayjob.name}); at {end:%H:%M:%S} UTC the attempt is given up (spec.deadlines.stallSeconds)"
    )
    return "TrainerSilent", text


def _progress(report: Report, known: FineTuneJobStatus, *, at: datetime | None) -> Progress:
    """Until a new attempt knows where it goes on, the job is where it was."""
    if known.progress is None or report.knows_its_step:
        return reports.progress_of(report, at=at)
    return known.progress.model_copy(update={"last_report_time": at})


def _phase_without_report(status: FineTuneJobStatus) -> Phase:
    """After a restart of the operator the recorded phase stands until the next report."""
    return status.phase if status.phase in PHASE_TEXTS else Phase.VALIDATING


# ---------------------------------------------------------------- while it waits


def _held_back(seen: Observed, rayjob: RayJobFacts, *, now: datetime) -> Plan:
    """Somebody suspended the RayJob: a queue, which will let it go on, or a person. It stays the same attempt, and its
    trainer goes on from the newest checkpoint."""
    known = seen.job.status
    retries = known.retries or Retries()
    taken = statuses.holds_since(known, ConditionType.RESOURCES_READY) is not None
    if taken:
        limit = seen.job.spec.retry.preemptions if seen.job.spec else UNLIMITED
        if limit != UNLIMITED and retries.preemption >= int(limit):
            text = f"RayJob {rayjob.name} was suspended while it ran"
            return attempts.end(seen, Ending(ErrorClass.PREEMPTED, text), now=now)
        retries = retries.model_copy(update={"preemption": retries.preemption + 1})
    place = queues.look(seen, rayjob, now=now)
    reason, message = place.reason, place.message
    quota = [] if place.queue is None else [queues.claim(seen.workload, place)]
    status = statuses.build(
        seen,
        Phase.QUEUED,
        reason,
        message,
        claims=[
            Claim(ConditionType.RESOURCES_READY, False, reason, message),
            Claim(ConditionType.TRAINING, False, reason, message),
            *quota,
        ],
        now=now,
        attempts=statuses.with_last(
            known.attempts, uid=rayjob.uid, gpu_seconds=accounts.gpu_seconds(seen, now=now) if taken else None
        ),
        retries=retries if retries != Retries() else known.retries,
        queue=place.queue,
    )
    again = queues.next_look(seen.workload, rayjob, now=now) if seen.workload else WAITING_SECONDS
    return Plan(status=status, requeue_after=again)


def _provisioning(seen: Observed, attempt: Attempt, rayjob: RayJobFacts, *, now: datetime) -> Plan:
    """No process yet. An image that cannot be had ends the attempt; anything else waits, and says for what."""
    hopeless = waits.hopeless(seen, now=now)
    if hopeless is not None:
        return attempts.end(seen, hopeless, now=now)
    wait = waits.why(seen, rayjob, now=now)
    reason, message = wait.reason, wait.message
    ready = rayjob.deployment_status == "Running"  # KubeRay says so once every pod of the cluster is ready
    claim = Claim(ConditionType.RESOURCES_READY, False, reason, message)
    if ready:
        submission = waits.submission(seen, rayjob)
        reason, message = submission.reason, submission.message
        claim = Claim(ConditionType.RESOURCES_READY, True, "PodsRunning", "the training pod runs")
    status = statuses.build(
        seen,
        Phase.PROVISIONING,
        reason,
        message,
        claims=[claim, *queues.admitted(rayjob)],
        now=now,
        attempts=statuses.with_last(seen.job.status.attempts, uid=rayjob.uid),
    )
    most = waits.next_look(seen, rayjob, now=now, soon=WAITING_SECONDS, late=RESYNC_SECONDS)
    again = deadlines.next_check(seen.with_status(status), attempt, now=now, most=most)
    lacks_run_file = wait.reason == "ConfigMapMissing" and f"ConfigMap {rayjob.name} " in wait.message
    actions = (WriteRunFile(rayjob.name, attempt.number),) if lacks_run_file else ()
    return Plan(status=status, actions=actions, requeue_after=again)

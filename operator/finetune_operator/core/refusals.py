"""Where the API server does not do what was planned: what is told, and what follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from finetune_operator.api.finetunejob import ErrorClass, Phase
from finetune_operator.core import attempts, inspections, jobs, running, statuses, texts, waits
from finetune_operator.core.attempts import Ending
from finetune_operator.core.conditions import Claim, ConditionType
from finetune_operator.core.facts import Action, CreateRayJob, Observed, Plan

UNAVAILABLE_SECONDS = 2.0
HINDERED = "; the API server refuses: "


def refused(seen: Observed, plan: Plan, action: Action, message: str, *, now: datetime) -> Plan:
    """The API server refuses an action for good. An attempt's objects are what the spec asks for: the user has to
    change it. An inspection has then found nothing."""
    match action:
        case CreateRayJob(inspect=False):
            if waits.is_denied(message):
                message = f"{waits.refusal(f'RayJob {action.name}', message)}, and create the job again"
            then = attempts.end(seen, Ending(ErrorClass.BAD_CONFIG, message, final=True), now=now)
        case CreateRayJob():
            then = inspections.none_found(seen, message, now=now)
        case _:
            return hindered(seen, plan, message, now=now)
    return replace(then, events=statuses.events(seen.job.status, then.status))


def stripped(rayjob: str, lost: Sequence[str]) -> str:
    """Why a RayJob that was created was deleted at once."""
    return (
        f"RayJob {rayjob} was stored without {', '.join(lost)}, which the operator had set: a policy or a webhook of "
        "this cluster removes it, and nobody could follow the training, or end it with its job; have RayJobs "
        "exempted (kubectl get mutatingwebhookconfigurations,mutatingadmissionpolicies), and create the job again"
    )


def outdated(lost: Sequence[str]) -> str:
    """Why a RayJob that was created was deleted at once: KubeRay would have run it twice."""
    return (
        f"the CRD of RayJobs in this cluster is older than KubeRay 1.3 and does not have {', '.join(lost)}: apply the "
        "CRDs of KubeRay 1.3 or newer (Helm does not upgrade them with KubeRay), and create the job again"
    )


def forbidden(seen: Observed, plan: Plan, action: Action, message: str, *, now: datetime) -> Plan:
    """A quota or a missing right stands in the way: say so and try again."""
    if not isinstance(action, CreateRayJob) or action.inspect:
        return hindered(seen, plan, message, now=now)
    reason = waits.reason_of_refusal(message, otherwise="Forbidden")
    if reason != "Forbidden":
        message = waits.refusal("what the job needs", message)
    return _not_created(seen, reason, message, Phase.PENDING, now=now)


def unavailable(seen: Observed, plan: Plan, action: Action, message: str, *, now: datetime) -> Plan:
    """The API server could not do it now, for example because a webhook is away: say so and try again."""
    if not isinstance(action, CreateRayJob) or action.inspect:
        return hindered(seen, plan, message, now=now)
    return _not_created(
        seen, "RayJobNotCreated", message, Phase.PROVISIONING, now=now, seconds=UNAVAILABLE_SECONDS
    )


def unread(seen: Observed, message: str, *, now: datetime) -> Plan:
    """What the decision rests on may not be read: the job stays as it is, and says why."""
    known = seen.job.status
    if known.phase is not None:
        return hindered(seen, Plan(known), message, now=now)
    status = statuses.build(seen, Phase.PENDING, "Forbidden", message, claims=[], now=now)
    return Plan(status, events=statuses.events(known, status))


def hindered(seen: Observed, plan: Plan, message: str, *, now: datetime) -> Plan:
    """What was to be taken down, or looked for, is still due. What is final stays as it is; else the status says so."""
    if jobs.is_finished(seen.job.status):
        return replace(plan, requeue_after=running.RESYNC_SECONDS)
    text = (plan.status.message or "").partition(HINDERED)[0]
    status = plan.status.model_copy(update={"message": f"{text}{HINDERED}{message}"[: texts.LONGEST]})
    return replace(plan, status=status, requeue_after=running.WAITING_SECONDS)


def _not_created(
    seen: Observed,
    reason: str,
    message: str,
    phase: Phase,
    *,
    now: datetime,
    seconds: float = running.WAITING_SECONDS,
) -> Plan:
    claim = Claim(ConditionType.RESOURCES_READY, False, reason, message)
    status = statuses.build(seen, phase, reason, message, claims=[claim], now=now)
    return Plan(status=status, events=statuses.events(seen.job.status, status), requeue_after=seconds)

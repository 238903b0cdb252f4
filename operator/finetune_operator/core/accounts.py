"""What an attempt did and cost: steps done, saved and lost, seconds of GPUs."""

from __future__ import annotations

from datetime import datetime

from finetune_operator.api.finetunejob import Attempt, ResumePolicy
from finetune_operator.core import statuses
from finetune_operator.core.conditions import ConditionType
from finetune_operator.core.facts import Observed
from finetune_operator.core.policies import CHECK
from finetune_operator.core.reports import Report


def with_report(seen: Observed, report: Report) -> list[Attempt]:
    """The attempts after a report of the last one.

    Where it tells the step that it resumed from, what the attempt before it lost is known exactly. A step below the
    last one means that the process began again within the attempt (KubeRay does so in HTTPMode when the head is lost).
    """
    attempts = list(seen.job.status.attempts)
    last = attempts[-1]
    step, resumed = report.finetune.step, report.finetune.resumed_from_step
    if last.last_step is not None and not report.knows_its_step:
        step = last.last_step
    updates: dict[str, int | str | None] = {**statuses.rayjob_uid(seen), "last_step": step}
    if resumed is not None:
        updates["resumed_from_step"] = resumed
        if last.resumed_from_step is None and len(attempts) > 1:
            before = attempts[-2]
            if before.last_step is not None:
                lost = max(0, before.last_step - resumed)
                attempts[-2] = before.model_copy(update={"lost_steps": lost})
    if step is not None and last.last_step is not None and step < last.last_step:
        updates["lost_steps"] = (last.lost_steps or 0) + max(0, last.last_step - (resumed or 0))
    return statuses.with_last(attempts, **updates)


def with_late_report(seen: Observed, report: Report) -> list[Attempt]:
    """The attempts after a report of the last one, which had ended already: what it saved on its way out is not lost,
    what it did since its last report is told. Safe to repeat."""
    attempts, told = list(seen.job.status.attempts), report.finetune
    ended = attempts[-1]
    if told.step is None and told.checkpoint is None:
        return attempts
    last = max(ended.last_step or 0, told.step or 0)
    saved = _saved(seen, report.finetune.checkpoint.step if report.finetune.checkpoint else None)
    before = (ended.lost_steps or 0) - max(0, (ended.last_step or 0) - _saved(seen, None))
    return statuses.with_last(attempts, last_step=last, lost_steps=max(0, before) + max(0, last - saved))


def _saved(seen: Observed, told: int | None) -> int:
    """Step of the checkpoint that the next attempt goes on from; 0 where it begins anew."""
    checkpoint, spec = seen.job.status.checkpoint, seen.job.spec
    if spec is not None and spec.checkpoint.resume is ResumePolicy.NEVER:
        return 0
    return told if told is not None else checkpoint.step if checkpoint else 0


def lost_steps(seen: Observed, *, last_step: int | None) -> int | None:
    """Steps of the attempt that ends now which no checkpoint holds; None where it did no step."""
    if last_step is None:
        return None
    return (seen.job.status.attempts[-1].lost_steps or 0) + max(0, last_step - _saved(seen, None))


def end_of_attempt(seen: Observed, *, now: datetime) -> datetime:
    """When the attempt that is found to be over ended, by KubeRay's clock where it knows: we may have been away."""
    rayjob, start = seen.rayjob, seen.job.status.attempts[-1].start_time
    if rayjob is None or not rayjob.ours or not rayjob.is_over or rayjob.ended is None:
        return now
    return min(now, max(start, rayjob.ended))


def gpu_seconds(seen: Observed, *, now: datetime) -> int | None:
    """GPUs times the seconds in which the attempt's pod ran, with those before a queue held it back; None where it has
    no GPU."""
    spec = seen.job.spec
    if spec is None or not spec.resources.gpus_per_worker or seen.job.status.attempts[-1].number == CHECK:
        return None
    since = statuses.holds_since(seen.job.status, ConditionType.RESOURCES_READY)
    seconds = (end_of_attempt(seen, now=now) - since).total_seconds() if since else 0.0
    before = seen.job.status.attempts[-1].gpu_seconds or 0
    return before + spec.resources.gpus_per_worker * max(0, round(seconds))

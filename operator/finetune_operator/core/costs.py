"""What a job has cost: GPU seconds over all attempts, those whose work was lost, and their price.

The status keeps ten attempts only, so the sums are carried on: each pass adds what the attempts that it sees have
gained since the pass before.
"""

from __future__ import annotations

from finetune_fit.prices import PriceTable
from finetune_operator.api.finetunejob import Attempt, Cost, ErrorClass, FineTuneJobSpec, FineTuneJobStatus
from finetune_operator.core import statuses
from finetune_operator.core.conditions import ConditionType
from finetune_operator.core.policies import CHECK


def updated(
    known: FineTuneJobStatus,
    new: FineTuneJobStatus,
    *,
    spec: FineTuneJobSpec | None,
    prices: PriceTable | None,
) -> FineTuneJobStatus:
    """The new status with its cost. Without a GPU there is none."""
    if spec is None or not spec.resources.gpus_per_worker or not new.attempts:
        return new
    gpus = spec.resources.gpus_per_worker
    used, lost = known.cost.gpu_seconds if known.cost else 0, known.cost.lost_gpu_seconds if known.cost else 0
    before = {attempt.number: attempt for attempt in known.attempts}
    for attempt in new.attempts:
        old = before.get(attempt.number)
        used += _used(attempt, new, gpus) - (_used(old, known, gpus) if old else 0)
        lost += _lost(attempt) - (_lost(old) if old else 0)
    price = None if prices is None else prices.gpu_hour(spec.resources.accelerator_type)
    cost = Cost(
        gpu_seconds=max(0, used),
        lost_gpu_seconds=min(max(0, lost), max(0, used)),
        estimated=None if price is None else round(max(0, used) / 3600 * price, 4),
        currency=prices.currency if prices is not None and price is not None else None,
    )
    return new.model_copy(update={"cost": cost})


def _used(attempt: Attempt, status: FineTuneJobStatus, gpus: int) -> int:
    """GPU seconds of an attempt; of one that runs, up to its trainer's last report, so that no pass without news
    changes the status."""
    so_far = attempt.gpu_seconds or 0
    if attempt.end_time is not None or attempt.number == CHECK:
        return so_far
    since = statuses.holds_since(status, ConditionType.RESOURCES_READY)
    heard = status.progress.last_report_time if status.progress else None
    if since is None or heard is None:
        return so_far
    return so_far + gpus * max(0, round((heard - since).total_seconds()))


def _lost(attempt: Attempt) -> int:
    """GPU seconds of an attempt whose work is gone: the share of its steps that were lost, or all of it where it did
    none."""
    used, lost = attempt.gpu_seconds or 0, attempt.lost_steps or 0
    if attempt.end_time is None or not used:
        return 0
    done = max(lost, (attempt.last_step or 0) - (attempt.resumed_from_step or 0))
    if done > 0:
        return used * lost // done
    return 0 if attempt.error_class is ErrorClass.SUCCEEDED else used

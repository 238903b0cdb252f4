"""Metrics from Prometheus: one measurement is judged as Argo Rollouts judges it, apart from missing data.

No data and NaN are Inconclusive, a query without an answer is an Error, and neither is ever a reason for a rollback.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from datetime import datetime

from finetune_operator.api.adapterdeployment_analysis import MetricSpec
from finetune_operator.api.adapterdeployment_status import Check, CheckKind, CheckPhase, Measurements
from finetune_operator.core.rollout_facts import Measurement

_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
    "==": operator.eq,
    "!=": operator.ne,
}
_TERM = re.compile(r"\s*result\s*(<=|>=|==|!=|<|>)\s*(-?[0-9.]+(?:e-?[0-9]+)?)\s*")


def holds(condition: str, result: float) -> bool:
    """Whether a condition such as `result > 0.9 && result < 1.1` holds; && binds closer than ||.

    ValueError for what the schema would refuse.
    """
    return any(all(_term(term, result) for term in part.split("&&")) for part in condition.split("||"))


def _term(term: str, result: float) -> bool:
    match = _TERM.fullmatch(term)
    if match is None:
        raise ValueError(f"condition {term.strip()!r} is not readable; write it as result <= 1.2")
    return _COMPARE[match.group(1)](result, float(match.group(2)))


def judge(metric: MetricSpec, measurement: Measurement) -> CheckPhase:
    """The verdict on one measurement."""
    if measurement.error is not None:
        return CheckPhase.ERROR
    value = measurement.value
    if value is None or math.isnan(value):
        return CheckPhase.INCONCLUSIVE
    if metric.failure_condition is not None and holds(metric.failure_condition, value):
        return CheckPhase.FAILED
    if holds(metric.success_condition, value):
        return CheckPhase.SUCCESSFUL
    return CheckPhase.FAILED if metric.failure_condition is None else CheckPhase.INCONCLUSIVE


def tally(
    metric: MetricSpec, known: Check | None, measurement: Measurement | None, *, dry_run: bool, now: datetime
) -> Check:
    """The metric's entry in the status after one more measurement, or after none."""
    counts = (known.measurements if known else None) or Measurements()
    estimate = known.estimate if known else None
    if measurement is not None:
        verdict = judge(metric, measurement)
        counts = _counted(counts, verdict, now=now)
        value = measurement.value
        estimate = value if value is not None and math.isfinite(value) else None
    message = _message(metric, counts, measurement, known)
    return Check(
        name=metric.name,
        kind=CheckKind.METRIC,
        phase=_phase(metric, counts),
        estimate=estimate,
        dry_run=dry_run or None,
        measurements=counts,
        message=message,
    )


def _counted(counts: Measurements, verdict: CheckPhase, *, now: datetime) -> Measurements:
    field = str(verdict).lower()
    errors = counts.consecutive_errors + 1 if verdict is CheckPhase.ERROR else 0
    return counts.model_copy(
        update={field: getattr(counts, field) + 1, "consecutive_errors": errors, "last_time": now}
    )


def _phase(metric: MetricSpec, counts: Measurements) -> CheckPhase:
    if counts.failed > metric.failure_limit:
        return CheckPhase.FAILED
    if counts.consecutive_errors > metric.consecutive_error_limit:
        return CheckPhase.ERROR
    if counts.inconclusive > metric.inconclusive_limit:
        return CheckPhase.INCONCLUSIVE
    return CheckPhase.SUCCESSFUL if counts.successful >= metric.count else CheckPhase.INCONCLUSIVE


def _message(
    metric: MetricSpec, counts: Measurements, measurement: Measurement | None, known: Check | None
) -> str:
    if measurement is None:
        return (known.message if known else None) or "not measured yet"
    if measurement.error is not None:
        last = f"no answer: {measurement.error}"
    elif measurement.value is None or math.isnan(measurement.value):
        last = "no data"
    else:
        last = f"{measurement.value:.4g}"
    return (
        f"last {last}; {counts.successful} of {metric.count} successful, {counts.failed} failed "
        f"(limit {metric.failure_limit}), {counts.inconclusive} inconclusive (limit {metric.inconclusive_limit}), "
        f"{counts.error} without an answer"
    )[:1000]


def too_inconclusive(metric: MetricSpec, check: Check) -> bool:
    return (check.measurements or Measurements()).inconclusive > metric.inconclusive_limit


def due(check: Check | None, *, interval: float, now: datetime) -> bool:
    last = check.measurements.last_time if check and check.measurements else None
    return last is None or (now - last).total_seconds() >= interval - 0.5


def borne_again(check: Check) -> Check:
    """After a person said `resume`: what was borne before is forgotten, failures are not."""
    counts = check.measurements
    if check.kind is not CheckKind.METRIC or counts is None:
        return check
    cleared = counts.model_copy(update={"inconclusive": 0, "error": 0, "consecutive_errors": 0})
    return check.model_copy(update={"measurements": cleared, "phase": CheckPhase.INCONCLUSIVE})

"""Metrics from Prometheus in the status of a rollout: measurements are judged and counted as `core.thresholds` says.

No data and NaN are Inconclusive, a query without an answer is an Error, and neither is ever a reason for a rollback.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from datetime import datetime

from finetune_operator.api.adapterdeployment_analysis import MetricSpec
from finetune_operator.api.adapterdeployment_status import Check, CheckKind, CheckPhase, Measurements
from finetune_operator.core import thresholds
from finetune_operator.core.rollout_facts import Measurement


def judge(metric: MetricSpec, measurement: Measurement) -> tuple[CheckPhase, str]:
    """The verdict on one measurement, and why."""
    if measurement.error is not None:
        return CheckPhase.ERROR, f"no answer: {measurement.error}"
    failure = metric.failure_condition
    return thresholds.measure(
        measurement.value,
        success=thresholds.parse_condition(metric.success_condition),
        failure=None if failure is None else thresholds.parse_condition(failure),
    )


def tally(
    metric: MetricSpec, known: Check | None, measurement: Measurement | None, *, dry_run: bool, now: datetime
) -> Check:
    """The metric's entry in the status after one more measurement, or after none."""
    counts = (known.measurements if known else None) or Measurements()
    estimate = known.estimate if known else None
    message = (known.message if known else None) or "not measured yet"
    if measurement is not None:
        verdict, why = judge(metric, measurement)
        counts = _counted(counts, verdict, now=now)
        value = measurement.value
        estimate = value if value is not None and math.isfinite(value) else None
        message = _message(metric, counts, why)
    return Check(
        name=metric.name,
        kind=CheckKind.METRIC,
        phase=_phase(metric, counts),
        estimate=estimate,
        dry_run=dry_run or None,
        measurements=counts,
        message=message,
    )


def _tally(counts: Measurements) -> thresholds.Tally:
    return thresholds.Tally(
        successful=counts.successful,
        failed=counts.failed,
        inconclusive=counts.inconclusive,
        error=counts.error,
        consecutive_errors=counts.consecutive_errors,
    )


def _counted(counts: Measurements, verdict: CheckPhase, *, now: datetime) -> Measurements:
    return Measurements(**asdict(thresholds.count(_tally(counts), verdict)), last_time=now)


def _phase(metric: MetricSpec, counts: Measurements) -> CheckPhase:
    limits = thresholds.Limits(
        failure_limit=metric.failure_limit,
        inconclusive_limit=metric.inconclusive_limit,
        consecutive_error_limit=metric.consecutive_error_limit,
        count=metric.count,
    )
    return thresholds.judge(_tally(counts), limits) or CheckPhase.INCONCLUSIVE


def _message(metric: MetricSpec, counts: Measurements, why: str) -> str:
    return (
        f"{why[:500]}; so far {counts.successful} of {metric.count} successful, {counts.failed} failed "
        f"(limit {metric.failure_limit}), {counts.inconclusive} inconclusive (limit {metric.inconclusive_limit}), "
        f"{counts.error} without an answer"
    )


def too_inconclusive(metric: MetricSpec, check: Check) -> bool:
    return (check.measurements or Measurements()).inconclusive > metric.inconclusive_limit


def due(check: Check | None, *, interval: float, now: datetime) -> bool:
    last = check.measurements.last_time if check and check.measurements else None
    # A time that is still to come is of a clock that was set back since.
    return last is None or last > now or (now - last).total_seconds() >= interval - 0.5


def borne_again(check: Check) -> Check:
    """After a person said `resume`: what was borne before is forgotten, failures are not."""
    counts = check.measurements
    if check.kind is not CheckKind.METRIC or counts is None:
        return check
    cleared = counts.model_copy(update={"inconclusive": 0, "error": 0, "consecutive_errors": 0})
    return check.model_copy(update={"measurements": cleared, "phase": CheckPhase.INCONCLUSIVE})

"""Prometheus metrics of rollouts. Series of a deployment live and die with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from finetune_operator.api.adapterdeployment_status import (
    AbortReason,
    AdapterDeploymentStatus,
    Check,
    CheckKind,
    CompletionStatus,
    LoadedAdapter,
)

LABELS = ("namespace", "name")
ROLLOUT_BUCKETS = (10, 60, 300, 900, 1800, 3600, 3 * 3600, 6 * 3600, 12 * 3600, 86400, 3 * 86400, 7 * 86400)
GAUGES: dict[str, tuple[str, tuple[str, ...]]] = {
    "info": ("1 for the phase and stage that the deployment is in.", ("phase", "stage")),
    "available": ("1 while engines are known to have the stable revision; absent before the first one.", ()),
    "paused": ("1 while the rollout waits for somebody; a pause step with a duration is none.", ()),
    "weight": ("Percent of the users on each side.", ("arm",)),
    "step_index": ("Step under way, from 0.", ()),
    "analysis_evalue": ("Evidence against the candidate by guardrail.", ("metric",)),
    "analysis_estimate": ("Estimate of each check, and its bounds.", ("metric", "bound")),
    "sample_ratio_evalue": ("Evidence that the sides get wrong shares of the users.", ()),
    "sample_ratio_threshold": ("Value of it from which on the rollout pauses.", ()),
    "metrics_source_up": (
        "1 while routers and Prometheus tell what they should; absent while nothing is compared.",
        (),
    ),
    "adapter_loaded": ("1 where an engine says that it has the revision loaded.", ("revision", "replica")),
}


Series = dict[tuple[str, tuple[str, ...]], float]
"""Gauge and its further labels -> value."""


class RolloutTelemetry:
    """Gauges per deployment, and counters of rollouts that ended."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._gauges = {
            name: Gauge(f"adapterdeployment_{name}", help_text, [*LABELS, *labels], registry=registry)
            for name, (help_text, labels) in GAUGES.items()
        }
        self._completions = Counter(
            "adapterdeployment_completions",
            "Rollouts that ended, by how and why.",
            [*LABELS, "status", "reason"],
            registry=registry,
        )
        self._durations = Histogram(
            "adapterdeployment_rollout_duration_seconds",
            "Time from the start of a rollout to its end.",
            [*LABELS, "status"],
            buckets=ROLLOUT_BUCKETS,
            registry=registry,
        )
        self._shown: dict[tuple[str, str], Series] = {}
        self._statuses: dict[tuple[str, str], AdapterDeploymentStatus] = {}
        """Those that were shown last."""
        self._counted: dict[tuple[str, str], set[tuple[str, str]]] = {}
        """Status and reason of the series that count a deployment's rollouts."""
        self._timed: dict[tuple[str, str], set[str]] = {}
        """Status of those that were timed."""

    def show(
        self, namespace: str, name: str, *, before: AdapterDeploymentStatus, status: AdapterDeploymentStatus
    ) -> None:
        """Set the series of one deployment by its new status. Rollouts that ended since it was last shown are counted:
        a write whose answer was lost is there before it is shown. At first, since `before`."""
        series = _series(status)
        self._begin_at_zero(namespace, name)
        kept = {key: value for key, value in self._of(namespace, name).items() if key[0] == "adapter_loaded"}
        self._replace(namespace, name, {**kept, **series})
        last = self._statuses.get((namespace, name), before)
        self._statuses[namespace, name] = status
        for ending, reason, seconds in _ended(last, status):
            self._end(namespace, name, ending, reason=reason, seconds=seconds)

    def show_engines(
        self,
        namespace: str,
        name: str,
        *,
        adapters: Sequence[LoadedAdapter],
        engines: Mapping[str, set[str]],
    ) -> None:
        """Which engine (by URL) says that it has which of the revisions; `engines` are served names. A revision that
        only waits for its unloading is nowhere missing."""
        series: Series = {
            ("adapter_loaded", (adapter.revision, url)): float(adapter.served_name in loaded)
            for adapter in adapters
            for url, loaded in engines.items()
            if adapter.unload_at is None or adapter.served_name in loaded
        }
        kept = {key: value for key, value in self._of(namespace, name).items() if key[0] != "adapter_loaded"}
        self._replace(namespace, name, {**kept, **series})

    def forget(self, namespace: str, name: str) -> None:
        """Drop the series of a deployment that is gone."""
        self._replace(namespace, name, {})
        self._shown.pop((namespace, name), None)
        self._statuses.pop((namespace, name), None)
        for status, reason in self._counted.pop((namespace, name), set()):
            self._completions.remove(namespace, name, status, reason)
        for status in self._timed.pop((namespace, name), set()):
            self._durations.remove(namespace, name, status)

    def _of(self, namespace: str, name: str) -> Series:
        return self._shown.get((namespace, name), {})

    def _replace(self, namespace: str, name: str, series: Series) -> None:
        for gauge, labels in self._of(namespace, name).keys() - series.keys():
            self._gauges[gauge].remove(namespace, name, *labels)
        for (gauge, labels), value in series.items():
            self._gauges[gauge].labels(namespace, name, *labels).set(value)
        self._shown[namespace, name] = series

    def _begin_at_zero(self, namespace: str, name: str) -> None:
        """An increase is seen between two values: a series that is born at 1 hides the first rollback."""
        if (namespace, name) in self._counted:
            return
        rollbacks = {(str(CompletionStatus.ABORTED), str(reason)) for reason in AbortReason}
        for status, reason in rollbacks:
            self._completions.labels(namespace, name, status, reason)
        self._counted[namespace, name] = rollbacks

    def _end(self, namespace: str, name: str, status: str, *, reason: str, seconds: float) -> None:
        self._completions.labels(namespace, name, status, reason).inc()
        self._durations.labels(namespace, name, status).observe(seconds)
        self._counted.setdefault((namespace, name), set()).add((status, reason))
        self._timed.setdefault((namespace, name), set()).add(status)


def _ended(before: AdapterDeploymentStatus, status: AdapterDeploymentStatus) -> list[tuple[str, str, float]]:
    """How and why rollouts ended since, and how long they took."""
    known = {(entry.revision, entry.end_time) for entry in before.history}
    fresh = [entry for entry in status.history if (entry.revision, entry.end_time) not in known]
    if status.history:
        return [(str(e.completion_status), e.reason or "", _seconds(e.start_time, e.end_time)) for e in fresh]
    ending, began = status.completion_status, status.rollout_start_time
    if ending is None or ending is before.completion_status or began is None:
        return []
    # A deployment that keeps no history (revisionHistoryLimit: 0) is alarmed of all the same.
    aborted = status.abort if ending is CompletionStatus.ABORTED else None
    return [
        (str(ending), aborted.reason if aborted else "", _seconds(began, status.stage_start_time or began))
    ]


def _series(status: AdapterDeploymentStatus) -> Series:
    weights = status.weights
    values: dict[tuple[str, tuple[str, ...]], float | None] = {
        ("info", (str(status.phase or "Pending"), str(status.stage or "Initializing"))): 1.0,
        ("available", ()): None if status.stable_revision is None else _holds(status, "Available") is True,
        ("paused", ()): _awaits_somebody(status),
        ("weight", ("stable",)): weights.stable if weights else None,
        ("weight", ("candidate",)): weights.candidate if weights else None,
        ("weight", ("mirror",)): weights.mirror if weights else None,
        ("step_index", ()): status.current_step_index,
        ("metrics_source_up", ()): _holds(status, "MetricsAvailable"),
    }
    compared = _holds(status, "SampleRatioOK") is not None
    for check in status.analysis:  # which is kept when the rollout is over, and alarms nobody any more
        if compared or check.kind is not CheckKind.SAMPLE_RATIO:
            values.update(_check_series(check))
    return {key: float(value) for key, value in values.items() if value is not None and math.isfinite(value)}


def _check_series(check: Check) -> dict[tuple[str, tuple[str, ...]], float | None]:
    if check.kind is CheckKind.SAMPLE_RATIO:
        return {("sample_ratio_evalue", ()): check.e_value, ("sample_ratio_threshold", ()): check.threshold}
    interval = check.interval
    return {
        ("analysis_evalue", (check.name,)): check.e_value,
        ("analysis_estimate", (check.name, "estimate")): check.estimate,
        ("analysis_estimate", (check.name, "low")): interval.low if interval else None,
        ("analysis_estimate", (check.name, "high")): interval.high if interval else None,
    }


def _holds(status: AdapterDeploymentStatus, kind: str) -> bool | None:
    """Whether a condition holds; None where it is Unknown, because nothing is compared."""
    condition = next((c for c in status.conditions if c.type == kind), None)
    return None if condition is None or condition.status == "Unknown" else condition.status == "True"


def _awaits_somebody(status: AdapterDeploymentStatus) -> bool:
    """Also a spec that cannot be read makes the rollout wait, without a pause condition."""
    pauses = status.pause_conditions
    return _holds(status, "Paused") is True and not (pauses and all(pause.is_timed for pause in pauses))


def _seconds(start: datetime, end: datetime) -> float:
    return max(0.0, (end - start).total_seconds())

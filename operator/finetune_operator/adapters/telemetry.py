"""The operator's Prometheus metrics. Series of a job live and die with the job."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from finetune_operator.adapters.rollout_telemetry import RolloutTelemetry
from finetune_operator.api.finetunejob import FineTuneJobStatus

JOB_LABELS = ("namespace", "finetunejob")
JOB_GAUGES = {
    "progress": ("finetune_job_progress_ratio", "Optimizer steps done, 0 to 1."),
    "step": ("finetune_job_step", "Optimizer steps done."),
    "tokens": ("finetune_job_tokens_per_second", "Training tokens per second."),
    "loss": ("finetune_job_loss", "Latest training loss, nats per token."),
    "eval_loss": ("finetune_job_eval_loss", "Latest evaluation loss, nats per token."),
    "reward": ("finetune_job_reward", "Mean reward of the latest sampled answers."),
    "accuracy": (
        "finetune_job_accuracy",
        "Share of preferences in which the chosen answer is ahead, 0 to 1.",
    ),
}


class Telemetry:
    """Counters of the operator itself and gauges per job."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self._reconcile_seconds = Histogram(
            "finetune_reconcile_duration_seconds",
            "Duration of one reconcile pass.",
            ["kind"],
            registry=registry,
        )
        self._reconcile_errors = Counter(
            "finetune_reconcile_errors_total",
            "Reconcile passes that ended in an error.",
            ["kind"],
            registry=registry,
        )
        self.queue_depth = Gauge(
            "finetune_queue_depth", "Keys that wait for a reconcile pass.", ["kind"], registry=registry
        )
        self.reports = Counter(
            "finetune_reports_total",
            "Posts of trainers by HTTP status of the answer.",
            ["code"],
            registry=registry,
        )
        self.jobs_finished = Counter(
            "finetune_jobs_finished_total",
            "Jobs that ended, by the reason in their status: a class of failure, or ArtifactPublished.",
            ["namespace", "class"],
            registry=registry,
        )
        self.api_requests = Counter(
            "finetune_api_requests_total",
            "Requests to the API server, Kopf's watches aside; code 0: no answer.",
            ["method", "code"],
            registry=registry,
        )
        self.leads = Gauge(
            "finetune_leader", "1 in the replica that holds the Lease, else 0.", registry=registry
        )
        self.loop_lag = Gauge(
            "finetune_event_loop_lag_seconds", "How late the event loop was last.", registry=registry
        )
        self._phase = Gauge(
            "finetune_job_phase",
            "1 for the phase that a job is in.",
            [*JOB_LABELS, "phase"],
            registry=registry,
        )
        self._gauges = {
            key: Gauge(name, text, JOB_LABELS, registry=registry) for key, (name, text) in JOB_GAUGES.items()
        }
        self._phases: dict[tuple[str, str], str] = {}
        self.rollouts = RolloutTelemetry(registry)

    def api_answered(self, method: str, status: int) -> None:
        self.api_requests.labels(method, str(status)).inc()

    @contextlib.contextmanager
    def measured_pass(self, kind: str) -> Iterator[None]:
        """Around one reconcile pass: how long it takes, and whether it ends in an error."""
        with self._reconcile_seconds.labels(kind).time():
            try:
                yield
            except Exception:
                self._reconcile_errors.labels(kind).inc()
                raise

    def show_job(self, namespace: str, name: str, status: FineTuneJobStatus) -> None:
        """Set the series of one job by its status."""
        key = (namespace, name)
        phase = str(status.phase or "Pending")
        before = self._phases.get(key)
        if before is not None and before != phase:
            self._phase.remove(*key, before)
        self._phases[key] = phase
        self._phase.labels(*key, phase).set(1)
        progress, metrics = status.progress, status.metrics
        self._set("progress", key, progress.percent / 100 if progress else None)
        self._set("step", key, progress.step if progress else None)
        self._set("tokens", key, progress.tokens_per_second if progress else None)
        self._set("loss", key, metrics.loss if metrics else None)
        self._set("eval_loss", key, metrics.eval_loss if metrics else None)
        self._set("reward", key, metrics.reward if metrics else None)
        self._set("accuracy", key, metrics.accuracy if metrics else None)

    def shown_jobs(self) -> set[tuple[str, str]]:
        """Namespace and name of the jobs that have series."""
        return set(self._phases)

    def forget_job(self, namespace: str, name: str) -> None:
        """Drop the series of a job that is gone."""
        key = (namespace, name)
        phase = self._phases.pop(key, None)
        if phase is None:
            return
        self._phase.remove(*key, phase)
        for gauge in self._gauges.values():
            gauge.remove(*key)

    def _set(self, gauge: str, key: tuple[str, str], value: float | None) -> None:
        if value is not None:
            self._gauges[gauge].labels(*key).set(value)

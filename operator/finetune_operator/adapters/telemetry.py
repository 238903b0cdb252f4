"""The operator's Prometheus metrics. Series of a job live and die with the job."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from finetune_operator.adapters.rollout_telemetry import RolloutTelemetry
from finetune_operator.api.finetunejob import INFRASTRUCTURE, FineTuneJobStatus

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


class JobSeries(Collector):
    """Gauges per job, made of a few numbers when somebody asks: kept as series they are 10 kB for each job."""

    def __init__(self) -> None:
        self.shown: dict[tuple[str, str], tuple[str, tuple[float | None, ...]]] = {}
        """Namespace and name -> the phase, and a value or none for each of JOB_GAUGES."""

    def collect(self) -> Iterable[GaugeMetricFamily]:
        phases = GaugeMetricFamily(
            "finetune_job_phase", "1 for the phase that a job is in.", labels=[*JOB_LABELS, "phase"]
        )
        gauges = [GaugeMetricFamily(name, text, labels=JOB_LABELS) for name, text in JOB_GAUGES.values()]
        for key, (phase, values) in list(self.shown.items()):  # at once: it is asked for in a thread
            phases.add_metric((*key, phase), 1)
            for gauge, value in zip(gauges, values, strict=True):
                if value is not None:
                    gauge.add_metric(key, value)
        return [phases, *gauges]


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
            "finetune_queue_depth",
            "Keys that are due and wait for a reconcile pass.",
            ["kind"],
            registry=registry,
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
        self._namespaces: set[str] = set()
        """Those that had a job since the start."""
        self._jobs = JobSeries()
        registry.register(self._jobs)
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
        progress, metrics = status.progress, status.metrics
        values = {
            "progress": progress.percent / 100 if progress else None,
            "step": progress.step if progress else None,
            "tokens": progress.tokens_per_second if progress else None,
            "loss": metrics.loss if metrics else None,
            "eval_loss": metrics.eval_loss if metrics else None,
            "reward": metrics.reward if metrics else None,
            "accuracy": metrics.accuracy if metrics else None,
        }
        self._begin_at_zero(namespace)
        shown = str(status.phase or "Pending"), tuple(values[name] for name in JOB_GAUGES)
        self._jobs.shown[namespace, name] = shown

    def _begin_at_zero(self, namespace: str) -> None:
        """An increase is seen between two values, and jobs that fail together may be the first one."""
        if namespace not in self._namespaces:
            self._namespaces.add(namespace)
            for error_class in INFRASTRUCTURE:
                self.jobs_finished.labels(namespace, str(error_class))

    def shown_jobs(self) -> set[tuple[str, str]]:
        """Namespace and name of the jobs that have series."""
        return set(self._jobs.shown)

    def forget_job(self, namespace: str, name: str) -> None:
        """Drop the series of a job that is gone."""
        self._jobs.shown.pop((namespace, name), None)

"""What people read about a FineTuneJob: pure functions from the object's dict to text; tests need no cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from finetune_cli.texts import number, seconds_between, status_of
from finetune_operator.core.durations import format_duration

Job = Mapping[str, Any]

FINAL = {"Succeeded": 0, "Failed": 1, "Cancelled": 1}  # phase -> exit code of `finetune jobs watch`
MEASURES = {  # of status.metrics, in this order
    "loss": "loss",
    "evalLoss": "eval loss",
    "accuracy": "accuracy",
    "evalAccuracy": "eval accuracy",
    "reward": "reward",
    "evalReward": "eval reward",
    "kl": "KL",
}
HEADER = ("NAME", "PHASE", "METHOD", "MODEL", "PROGRESS", "LOSS", "ETA", "AGE")


def exit_code(job: Job) -> int | None:
    """0 or 1 once the job has ended, None before."""
    return FINAL.get(status_of(job).get("phase", ""))


def format_size(size: float) -> str:
    """Bytes with a decimal unit, for example 9.8 MB."""
    value = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def elapsed(job: Job, now: datetime) -> float | None:
    """Seconds since the first attempt, or since the job was created; stops when the job ends."""
    status = status_of(job)
    start = status.get("startTime") or job["metadata"].get("creationTimestamp")
    return seconds_between(start, status.get("completionTime") or now)


def remaining(job: Job, now: datetime) -> float | None:
    """The trainer's estimate in seconds, less what has passed since it was made."""
    progress = status_of(job).get("progress") or {}
    estimate = progress.get("estimatedRemainingSeconds")
    if estimate is None or exit_code(job) is not None:
        return None
    return max(0.0, float(estimate) - max(0.0, seconds_between(progress.get("lastReportTime"), now) or 0.0))


def list_rows(jobs: Sequence[Job], now: datetime, *, namespaces: bool) -> list[list[str]]:
    """Header and one row for each job, the newest last."""
    rows = [["NAMESPACE", *HEADER] if namespaces else list(HEADER)]
    for job in sorted(jobs, key=lambda one: one["metadata"]["creationTimestamp"]):
        status, spec = status_of(job), job["spec"]
        left = remaining(job, now)
        row = [
            job["metadata"]["name"],
            status.get("phase", "Pending"),
            spec["method"]["type"],
            model_of(job),
            (status.get("progress") or {}).get("summary", ""),
            number((status.get("metrics") or {}).get("loss")),
            "" if left is None else format_duration(left),
            format_duration(seconds_between(job["metadata"]["creationTimestamp"], now) or 0),
        ]
        rows.append([job["metadata"]["namespace"], *row] if namespaces else row)
    return rows


def model_of(job: Job) -> str:
    """Where the base model is, or which job makes it."""
    model = job["spec"]["model"]
    return str(model.get("uri") or f"artifact of {model['fineTuneJobRef']['name']}")


def measures(job: Job, now: datetime) -> list[str]:
    """Loss, evaluation loss, speed and time left, as far as they are known."""
    status = status_of(job)
    metrics, progress = status.get("metrics") or {}, status.get("progress") or {}
    parts = []
    for name, label in MEASURES.items():
        if metrics.get(name) is not None:
            parts.append(f"{label} {number(metrics[name])}")
    if exit_code(job) is None and (speed := progress.get("tokensPerSecond")):
        parts.append(f"{speed:.0f} tokens/s")
    if (left := remaining(job, now)) is not None and progress.get("step"):
        parts.append(f"ETA {format_duration(left)}")
    return parts


def steps(job: Job) -> str:
    """45/100 45%, or nothing before the first step is planned."""
    progress = status_of(job).get("progress") or {}
    if not progress.get("totalSteps"):
        return ""
    return f"{progress.get('step', 0)}/{progress['totalSteps']} {progress.get('percent', 0)}%"


def progress_line(job: Job, now: datetime) -> str:
    """One line for a log: phase, steps, measures, and the message where there are no steps."""
    status = status_of(job)
    phase = str(status.get("phase", "Pending"))
    if exit_code(job) is not None:
        return phase
    parts = [phase, steps(job), *measures(job, now)]
    if not steps(job) or phase not in ("Running", "Evaluating"):
        parts = [phase, status.get("message") or "waits for the operator"]
    return "  ".join(part for part in parts if part)


def final_lines(job: Job) -> list[str]:
    """How the job ended and what there is now."""
    status, name = status_of(job), job["metadata"]["name"]
    took = elapsed(job, datetime.now(UTC))
    after = "" if took is None else f" after {format_duration(took)}"
    if status.get("phase") == "Succeeded":
        return [f"{name}: Succeeded{after}", *result_lines(job)]
    last = (status.get("attempts") or [{}])[-1]
    code = f", exit code {last['exitCode']}" if last.get("exitCode") is not None else ""
    return [
        f"{name}: {status.get('phase')} ({status.get('reason', 'Unknown')}{code}){after}",
        status.get("message") or "no message",
        f"more: finetune jobs describe {name} -n {job['metadata']['namespace']}",
    ]


def result_lines(job: Job) -> list[str]:
    """The artifact and the last measures; empty while there is none."""
    artifact = status_of(job).get("artifact")
    if artifact is None:
        return []
    kind = f"adapter of rank {artifact['rank']}" if artifact.get("rank") else "whole model"
    lines = [
        f"artifact  {artifact['uri']}",
        f"          {kind}, {format_size(artifact['sizeBytes'])}, {artifact['digest']}",
        f"base      {artifact['baseModel']}",
    ]
    values = [part for part in measures(job, datetime.now(UTC)) if "loss" in part]
    return [*lines, f"measured  {', '.join(values)}"] if values else lines

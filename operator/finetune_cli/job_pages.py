"""The page of `finetune jobs describe`: what the job is, why it is where it is, and what to do about it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from finetune_cli.job_views import Job, elapsed, exit_code, measures, model_of, result_lines, steps
from finetune_cli.pages import condition_lines, event_lines, section
from finetune_cli.texts import number, seconds_between, status_of
from finetune_operator.core.durations import format_duration

AGAIN = "then delete the job and apply it again: kubectl delete ftj {name} -n {namespace}"
# Why a job failed -> what the user does next. The message already names the field, the file or the step.
REMEDIES = {
    "BadConfig": f"Do what the message says, {AGAIN}",
    "BadData": f"Correct the file that the message names, {AGAIN}",
    "ModelNotFound": f"Check spec.model.uri, its revision and the Secret in spec.model.secretRef, {AGAIN}",
    "NotFinite": "Lower spec.hyperparameters.learningRate (half of it is a good try) or set precision Float32, "
    + AGAIN,
    "Storage": "See that the storage answers and that the Secrets hold the right keys, " + AGAIN,
    "Preempted": "Raise spec.retry.preemptions, or use capacity that is not taken away, " + AGAIN,
    "GpuOutOfMemory": "Lower spec.hyperparameters.maxLength or set gradientCheckpointing, or use QLoRA, "
    + AGAIN,
    "HostOutOfMemory": "Raise spec.resources.memory, " + AGAIN,
    "EvaluationGate": "The artifact is kept, but must not be deployed: train with other data or settings, "
    + AGAIN,
    "Collective": "Look for nodes or networks in trouble: kubectl get events -n {namespace}; " + AGAIN,
    "CheckpointCorrupt": "Look at the storage of the checkpoints (below), " + AGAIN,
    "Stalled": "Read the trainer's log for where it hangs (kubectl logs -n {namespace} job/{rayjob}), raise "
    "spec.deadlines.stallSeconds where such "
    "silence is normal, " + AGAIN,
    "DeadlineExceeded": f"Raise the deadline that the message names, {AGAIN}",
    "UpstreamFailed": "See the job that the message names, " + AGAIN,
    "UpstreamIsAnAdapter": "Set spec.method.type to LoRA or QLoRA, which go on with the adapter, " + AGAIN,
    "UpstreamIsARewardModel": "Change spec.model.fineTuneJobRef to a job whose model writes, " + AGAIN,
    "UpstreamIsNoRewardModel": "Change spec.reward.fineTuneJobRef to a job of objective RewardModel, "
    + AGAIN,
    "ChainIsACircle": "Change the fineTuneJobRef that the message names, " + AGAIN,
    "Cancelled": "It was cancelled, or somebody stopped the Ray job. To train after all, "
    "delete the job and apply it again: kubectl delete ftj {name} -n {namespace}",
    "Lost": "The training process or its pod went away. Look for evictions and memory: "
    "kubectl get events -n {namespace}; " + AGAIN,
    "Internal": "Read the trainer's log: kubectl logs -n {namespace} job/{rayjob} --tail=100; "
    "on a laptop: finetune local logs ray",
}
WAITING = {
    "Queued": "Nothing: the job starts when there is room. kubectl get workloads -n {namespace} shows the queue, "
    "if Kueue keeps it.",
    "Retrying": "Nothing: another attempt starts by itself. To stop that: "
    "kubectl annotate ftj {name} -n {namespace} finetune.dev/action=cancel",
    "Suspended": "To go on: kubectl patch ftj {name} -n {namespace} --type=merge -p "
    '\'{{"spec":{{"suspend":false}}}}\'',
    "Pending": "Nothing runs yet. If this stays: is the operator up (finetune local status, or its Deployment)?",
    "Provisioning": "The cluster starts the training pod. If this stays: "
    "kubectl describe pod -n {namespace} -l finetune.dev/job={name}",
}


# Reasons of a job that waits and for which nobody has to do anything.
ORDINARY = frozenset(
    {"", "Accepted", "Provisioning", "Submitting", "Starting", "Stopping", "Resumed", "Queued", "NameTaken",
     "WaitingForModel", "AdmissionChecks", "Preempted"}
)  # fmt: skip


def describe(job: Job, events: Sequence[Mapping[str, Any]], now: datetime) -> str:
    """The whole page. `events` are the job's Event objects in any order; the last five are shown."""
    sections = [
        _title(job, now),
        section("What", what(job)),
        section("Why", [status_of(job).get("message") or "The operator has not looked at the job yet."]),
        section("Do", [next_step(job)]),
        section("Queue", _queue(job)),
        section("Progress", _progress(job, now)),
        section("Used", _effective(job)),
        section("Result", result_lines(job)),
        section("Cost", _cost(job)),
        section("Attempts", _attempts(job)),
        section("Conditions", condition_lines(job, now)),
        section("Events", event_lines(events, now)),
    ]
    return "\n".join(line for section in sections for line in section)


def what(job: Job) -> list[str]:
    """The spec in sentences."""
    spec = job["spec"]
    method, hyper, data = spec["method"], spec["hyperparameters"], spec["dataset"]
    sources = [source["uri"] for source in data["sources"]]
    length = f"{hyper['maxSteps']} steps" if hyper.get("maxSteps") else f"{hyper['epochs']:g} epochs"
    resources = spec["resources"]
    lines = [
        f"{spec['objective']} with {method['type']} of {model_of(job)}",
        f"on {', '.join(sources[:3])}" + (f" and {len(sources) - 3} more" if len(sources) > 3 else ""),
        f"for {length} of {hyper['globalBatchSize']} rows, at most {hyper['maxLength']} tokens a row; "
        f"{data['split']['eval']:.0%} of the rows held out",
        f"with {resources['cpu']} CPU, {resources['memory']} memory, {resources['gpusPerWorker']} GPU",
    ]
    if spec.get("earlyStopping"):
        lines.append(f"stops early after {spec['earlyStopping']['patience']} evaluations without improvement")
    return lines


def next_step(job: Job) -> str:
    """What the user does now."""
    status, meta = status_of(job), job["metadata"]
    phase, reason = status.get("phase", "Pending"), status.get("reason", "")
    attempts = status.get("attempts") or [{}]
    rayjob = attempts[-1].get("rayJob", f"{meta['name']}-a1")
    names = {"name": meta["name"], "namespace": meta["namespace"], "rayjob": rayjob}
    if phase == "Succeeded":
        kind = "adapter" if (status.get("artifact") or {}).get("rank") else "model"
        return f"Use the {kind}: it is in the folder below, with manifest.json (hashes) and README.md (model card)."
    if phase in ("Failed", "Cancelled"):
        return REMEDIES.get(reason, REMEDIES["Internal"]).format(**names)
    if phase == "Pending" and _refused(status):
        return "Do what the message says; the operator tries again by itself."
    if phase in ("Pending", "Provisioning", "Queued") and reason not in ORDINARY:
        return "Do what the message says; the job goes on by itself then."
    if reason == "TrainerSilent":
        return (
            "Look into what the message names; the attempt goes on, and is given up at the time that it says."
        )
    if phase in WAITING:
        return WAITING[phase].format(**names)
    return f"Nothing; it runs. To follow it: finetune jobs watch {meta['name']} -n {meta['namespace']}"


def _refused(status: Mapping[str, Any]) -> bool:
    return any(c["type"] == "Accepted" and c["status"] == "False" for c in status.get("conditions", ()))


def _title(job: Job, now: datetime) -> list[str]:
    status, meta = status_of(job), job["metadata"]
    reason = f" ({status['reason']})" if status.get("reason") else ""
    took = elapsed(job, now)
    word = "took" if exit_code(job) is not None else "for"
    time = "" if took is None else f", {word} {format_duration(took)}"
    return [f"FineTuneJob {meta['namespace']}/{meta['name']}: {status.get('phase', 'Pending')}{reason}{time}"]


def _progress(job: Job, now: datetime) -> list[str]:
    progress = status_of(job).get("progress") or {}
    done = steps(job)
    if not done:
        return []
    epoch = f", epoch {number(progress['epoch'], digits=3)}" if progress.get("epoch") is not None else ""
    reported = seconds_between(progress.get("lastReportTime"), now)
    lines = [f"step {done}{epoch}", ", ".join(measures(job, now))]
    if reported is not None and exit_code(job) is None:
        lines.append(f"last report {format_duration(reported)} ago")
    return [line for line in lines if line]


def _effective(job: Job) -> list[str]:
    effective = status_of(job).get("effective") or {}
    labels = {
        "modelRevision": "model revision",
        "datasetDigest": "data",
        "trainRows": "rows trained on",
        "evalRows": "rows held out",
        "learningRate": "learning rate",
        "microBatchSize": "rows per forward pass",
        "precision": "precision",
        "device": "device",
        "image": "image",
        "outputUri": "output",
        "checkpointUri": "checkpoints",
        "modelUri": "model",
    }
    return [f"{label}: {effective[key]}" for key, label in labels.items() if effective.get(key) is not None]


def _queue(job: Job) -> list[str]:
    queue = status_of(job).get("queue")
    if queue is None:
        return []
    place = f", position {queue['position']}" if queue.get("position") is not None else ""
    lines = [f"{queue['name']}{place}: {queue['reason']}"]
    if queue.get("workload"):
        lines.append(f"more: kubectl describe workload {queue['workload']} -n {job['metadata']['namespace']}")
    return lines


def _cost(job: Job) -> list[str]:
    cost = status_of(job).get("cost")
    if cost is None:
        return []
    lost = cost.get("lostGpuSeconds", 0)
    used = f"{format_duration(cost.get('gpuSeconds', 0))} of GPUs"
    line = used + (f", {format_duration(lost)} of them lost" if lost else "")
    if cost.get("estimated") is not None:
        line += f"; about {cost['estimated']:.2f} {cost.get('currency', '')}".rstrip()
    return [line]


def _attempts(job: Job) -> list[str]:
    lines = []
    for attempt in status_of(job).get("attempts", ()):
        took = seconds_between(attempt["startTime"], attempt.get("endTime"))
        parts = [f"{attempt['number']}: RayJob {attempt['rayJob']}", attempt.get("class") or "running"]
        if attempt.get("exitCode") is not None:
            parts.append(f"exit code {attempt['exitCode']}")
        if attempt.get("lastStep") is not None:
            parts.append(f"last step {attempt['lastStep']}")
        if attempt.get("resumedFromStep"):
            parts.append(f"from step {attempt['resumedFromStep']}")
        if attempt.get("lostSteps"):
            parts.append(f"{attempt['lostSteps']} steps lost")
        if rows := (attempt.get("overrides") or {}).get("microBatchSize"):
            parts.append(f"{rows} rows per forward pass")
        if memory := (attempt.get("overrides") or {}).get("memory"):
            parts.append(f"{memory} memory")
        if took is not None:
            parts.append(format_duration(took))
        lines.append(", ".join(parts))
    return lines

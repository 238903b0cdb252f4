"""The page of `finetune rollout describe`: what is deployed, why it is where it is, and what to do about it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from finetune_cli import rollout_views
from finetune_cli.pages import condition_lines, event_lines, section
from finetune_cli.rollout_views import Rollout
from finetune_cli.texts import seconds_between, status_of
from finetune_operator.core.durations import format_duration

AGAIN = "deploy another adapter (change spec.adapter), or try this one again: finetune rollout retry {where}"
DONE, UNDERWAY, TO_COME = "✔", "▶", "·"
# Why a rollout waits -> what somebody does about it.
PAUSES = {
    "CanaryPauseStep": "A pause of the steps. Go on at once: finetune rollout promote {where}",
    "UserPause": "Somebody said pause. Go on: finetune rollout resume {where}",
    "InconclusiveAnalysis": "The evidence allows no verdict. Look at the checks: wait for more and say resume, "
    "go on all the same: finetune rollout promote {where}, or stop: finetune rollout abort {where}",
    "MetricsUnavailable": "No evidence arrives, so nothing is decided. Do the routers run and reach the operator "
    "(on a laptop: finetune local status), and does Prometheus answer? It goes on by itself when it arrives; to wait "
    "no longer: finetune rollout abort {where}",
    "InsufficientSamples": "Too few answers for a verdict: wait for more traffic, or make the step longer "
    "(finetune rollout plan shows how long). Go on all the same: finetune rollout promote {where}",
    "SampleRatioMismatch": "The sides get other shares of the users than they should, so the comparison is not fair. "
    "Look for a client or proxy that sends its own x-adapter-key or retries on one side only. Then: "
    "finetune rollout resume {where}, or abort",
    "DriftDetected": "The candidate's answers look different (their lengths, refusals, cut ends). Read some. If it is "
    "meant so: finetune rollout resume {where}; else: finetune rollout abort {where}",
    "AwaitingApproval": "A person decides: finetune rollout promote {where}, or finetune rollout abort {where}",
}
BY_SPEC = "spec.paused is true: set it to false to go on"
MESSAGE = "The message above says what is wrong and what to change"
JOB = "Correct the FineTuneJob, or name another one in spec.adapter. What serves goes on"
ENGINES = "Start an engine, or correct spec.serving: the message above names what is looked for"
# What holds a rollout that is not paused and does not go on by itself, as status.reason has it -> what somebody does.
HOLDS = {
    "InvalidSpec": "Correct the field of the spec that the message above names. Until then only abort and pause are "
    "obeyed",
    "AliasConflict": MESSAGE,
    "EndpointNotAllowed": MESSAGE,
    "CapacityFull": MESSAGE,
    "RankTooLarge": MESSAGE,
    "IncompatibleBase": MESSAGE,
    "NoEngines": ENGINES,
    "EnginesNotReady": ENGINES,
    "StableLost": "No engine has the stable revision, so its users get 503: bring an engine back",
    "AdapterMissing": "An engine lacks what it should have; its agent tries again. Adapters below says which",
    "AgentSilent": "Restart the agent that the message above names, or take its engine out of service",
    "RoutersBehind": "Restart the router that the message above names, or remove it from its Service",
    "NotPublished": "The operator's log says why it does not publish the routes",
    "EvidenceMissing": "Do the routers run and reach the operator (on a laptop: finetune local status)? It goes on by "
    "itself when they answer",
    "AwaitingConfirmation": "A webhook of spec.webhooks has to say yes. Without it: finetune rollout promote {where} "
    "(while loading: promote --full, which leaves out the steps too)",
    "FineTuneJobFailed": JOB,
    "FineTuneJobNotFound": JOB,
    "NotAnAdapter": JOB,
    "NotALanguageModel": JOB,
}
# Why a candidate was rolled back -> what somebody does about it.
ABORTS = {
    "GuardrailBreached": "The candidate failed more often than the stable revision. Find out why (its answers, the "
    "engine's log), train another one; then " + AGAIN,
    "NonInferiorityRejected": "The candidate is worse by more than the margin. Train another one; then "
    + AGAIN,
    "MetricFailed": "A query of spec.analysis.metrics failed too often: look at its value below; then "
    + AGAIN,
    "EvalGateFailed": "The candidate's score on the golden rows is below the bar. Train another one, or correct "
    "rows or bar; then " + AGAIN,
    "AdapterLoadFailed": "An engine could not load the adapter; the message says why. Correct that; then "
    + AGAIN,
    "ProgressDeadlineExceeded": "It took longer than spec.progressDeadlineSeconds. Look at what it waited for; then "
    + AGAIN,
    "MetricsUnavailable": "There was no evidence, and spec.analysis.onMetricsUnavailable is Abort. Bring the routers "
    "(or Prometheus) back; then " + AGAIN,
    "ApprovalTimedOut": "Nobody approved it in time. " + AGAIN[0].upper() + AGAIN[1:],
    "UserAbort": "Somebody said abort or undo. " + AGAIN[0].upper() + AGAIN[1:],
    "RollbackWebhook": "A rollback webhook asked for it: see spec.webhooks and its log; then " + AGAIN,
}


def describe(rollout: Rollout, events: Sequence[Mapping[str, Any]], now: datetime) -> str:
    """The whole page. `events` are the deployment's Event objects in any order; the last five are shown."""
    checks = rollout_views.check_rows(rollout)
    history = rollout_views.history_rows(rollout, now)[:4]
    sections = [
        _title(rollout, now),
        section("What", what(rollout)),
        section("Why", why(rollout, now)),
        section("Do", what_to_do(rollout)),
        section("Traffic", rollout_views.weight_parts(rollout)),
        section("Adapters", aligned(rollout_views.adapter_rows(rollout, now))),
        section("Steps", step_lines(rollout, now)),
        section("Checks", aligned([list(rollout_views.CHECK_HEADER), *checks]) if checks else []),
        section("", check_messages(rollout)),
        section("Evaluation", evaluation_lines(rollout)),
        section("History", aligned(history) if len(history) > 1 else []),
        section("Conditions", condition_lines(rollout, now)),
        section("Events", event_lines(events, now)),
    ]
    return "\n".join(line for part in sections for line in part)


def what(rollout: Rollout) -> list[str]:
    """The spec in sentences."""
    spec = rollout["spec"]
    adapter, serving = spec["adapter"], spec.get("serving") or {}
    source = (
        f"the adapter of FineTuneJob {adapter['fineTuneJobRef']['name']}"
        if adapter.get("fineTuneJobRef")
        else f"the adapter {(adapter.get('source') or {}).get('uri')}"
    )
    where = serving.get("endpoint") or (
        "pods with " + ",".join(f"{k}={v}" for k, v in serving["podSelector"]["matchLabels"].items())
        if serving.get("podSelector")
        else "the operator's default engine"
    )
    return [
        f"clients ask for the model {rollout_views.alias_of(rollout)}",
        f"wanted is {source} on {spec['baseModelRef']['name']}",
        f"served by {where}",
    ]


def why(rollout: Rollout, now: datetime) -> list[str]:
    """What the operator says."""
    status = status_of(rollout)
    lines = [status.get("message") or "The operator has not looked at the deployment yet."]
    for pause in status.get("pauseConditions") or ():
        since = format_duration(seconds_between(pause["startTime"], now) or 0)
        lines.append(f"paused for {since}, {pause['reason']}: {pause['message']}")
    if abort := status.get("abort"):
        ago = format_duration(seconds_between(abort["at"], now) or 0)
        lines.append(f"rolled back {ago} ago, {abort['reason']}: {abort['message']}")
    return list(dict.fromkeys(lines))


def what_to_do(rollout: Rollout) -> list[str]:
    """What somebody does now."""
    status, meta = status_of(rollout), rollout["metadata"]
    where = f"{meta['name']} -n {meta['namespace']}"
    phase = status.get("phase", "Pending")
    if lines := needed(rollout):
        return lines
    if phase == "Healthy":
        served = [entry for entry in status.get("history") or () if entry["completionStatus"] != "Aborted"]
        has_former = {entry["revision"] for entry in served} - {status.get("stableRevision")}
        back = f" Back to the former one: finetune rollout undo {where}" if has_former else ""
        return [f"Nothing. To deploy another adapter, change spec.adapter.{back}"]
    if phase == "Pending" and not status.get("message"):
        return ["If this stays: is the operator up (finetune local status, or its Deployment)?"]
    return [f"Nothing; it goes on. To follow it: finetune rollout watch {where}"]


def needed(rollout: Rollout) -> list[str]:
    """What only somebody can do: a line for what holds, one per pause, or one for the rollback. Empty: nothing."""
    status, meta = status_of(rollout), rollout["metadata"]
    where = f"{meta['name']} -n {meta['namespace']}"
    reason, phase = status.get("reason"), status.get("phase")
    lines = [HOLDS[reason]] if reason in HOLDS else []
    if reason != "InvalidSpec":
        waits = [pause["reason"] for pause in status.get("pauseConditions") or ()]
        paused = {**PAUSES, "UserPause": BY_SPEC} if rollout["spec"].get("paused") else PAUSES
        lines += [paused[wait] for wait in waits if wait in paused]
    if not lines and phase == "Degraded":
        abort = status.get("abort")
        lines = [ABORTS.get(abort["reason"], AGAIN) if abort else HOLDS["AdapterMissing"]]
    return [line.format(where=where) for line in lines]


def step_lines(rollout: Rollout, now: datetime) -> list[str]:
    """Each step with a mark: done, under way (with the time that is left), to come."""
    lines = []
    for step, mark in marked_steps(rollout):
        left = rollout_views.time_left(rollout, now) if mark == UNDERWAY else None
        lines.append(f"{mark} {step}" + (f", {format_duration(left)} left" if left is not None else ""))
    return lines


def marked_steps(rollout: Rollout) -> list[tuple[str, str]]:
    """Text and mark of each step."""
    steps, index = rollout_views.steps_of(rollout), status_of(rollout).get("currentStepIndex", -1)
    if rollout_views.exit_code(rollout) == 0:
        index = len(steps)
    underway = rollout_views.is_underway(rollout)
    return [
        (
            rollout_views.step_text(step),
            DONE if n < index else UNDERWAY if n == index and underway else TO_COME,
        )
        for n, step in enumerate(steps)
    ]


def check_messages(rollout: Rollout) -> list[str]:
    """What the checks say that are not fine."""
    return [
        f"{check['name']}: {check['message']}"
        for check in status_of(rollout).get("analysis") or ()
        if check.get("message") and check["phase"] != "Successful"
    ]


def evaluation_lines(rollout: Rollout) -> list[str]:
    """The evalGate under way, or the last one."""
    one = status_of(rollout).get("evaluation")
    if not one:
        return []
    scores = [f"{arm} {one[arm]:.3f}" for arm in ("candidate", "stable") if one.get(arm) is not None]
    rows = f" on {one['rows']} rows" if one.get("rows") else ""
    text = f"{one['name']}: {one['phase']}" + (f", {' and '.join(scores)}{rows}" if scores else "")
    return [text, *([one["message"]] if one.get("message") else [])]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equal length as columns, two blanks between them."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))] if rows else []
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def _title(rollout: Rollout, now: datetime) -> list[str]:
    status, meta = status_of(rollout), rollout["metadata"]
    stage = f" ({status['stage']})" if status.get("stage") else ""
    since = seconds_between(status.get("stageStartTime"), now)
    time = "" if since is None else f", for {format_duration(since)}"
    return [
        f"AdapterDeployment {meta['namespace']}/{meta['name']}: {status.get('phase', 'Pending')}{stage}{time}"
    ]

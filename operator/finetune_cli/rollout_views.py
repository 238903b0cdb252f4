"""What people read about an AdapterDeployment: pure functions from the object's dict to text; tests need no cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from finetune_cli.texts import number, seconds_between, status_of
from finetune_operator.api.adapterdeployment_status import AdapterDeploymentStatus
from finetune_operator.api.adapterdeployment_strategy import STEP_KINDS
from finetune_operator.core.durations import format_duration, parse_duration
from finetune_operator.core.rollout_pauses import stopped_since

Rollout = Mapping[str, Any]

HEADER = ("NAME", "PHASE", "STAGE", "STEP", "WEIGHT", "STABLE", "CANDIDATE", "AGE")
CHECK_HEADER = ("CHECK", "KIND", "VERDICT", "STABLE", "CANDIDATE", "ESTIMATE", "EVIDENCE")
HISTORY_HEADER = ("REVISION", "ENDED", "TOOK", "HOW", "WHY", "ADAPTER")


def exit_code(rollout: Rollout) -> int | None:
    """0 once the wanted revision serves, 1 once it was rolled back, None while neither is known."""
    status = status_of(rollout)
    if (status.get("observedGeneration") or 0) < rollout["metadata"].get("generation", 0):
        return None  # the status is about an older spec
    if status.get("phase") == "Healthy":
        return 0
    # Degraded without an abort means that an engine lacks an adapter for a while, and that heals.
    rolled_back = status.get("phase") == "Degraded" and status.get("abort")
    return 1 if rolled_back and status.get("stage") != "Aborting" else None


def alias_of(rollout: Rollout) -> str:
    return str(rollout["spec"].get("alias") or rollout["metadata"]["name"])


def steps_of(rollout: Rollout) -> list[Mapping[str, Any]]:
    return list(((rollout["spec"].get("strategy") or {}).get("canary") or {}).get("steps") or [])


def step_text(step: Mapping[str, Any]) -> str:
    """One step as short as it can be said: setWeight 5%, pause 10m, setMirror 20% 10m."""
    kind = next((kind for kind in STEP_KINDS if kind in step), "step")
    value = step.get(kind)
    match kind:
        case "setWeight":
            return f"setWeight {value}%"
        case "setMirror":
            return f"setMirror {(value or {}).get('percent')}% {(value or {}).get('duration')}"
        case "evalGate":
            return f"evalGate {(value or {}).get('evalRef')}"
        case "approval":
            limit = (value or {}).get("timeout")
            return f"approval within {limit}" if limit else "approval"
    duration = (value or {}).get("duration")
    return f"{kind} {duration}" if duration else kind


def time_left(rollout: Rollout, now: datetime) -> float | None:
    """Seconds until the step under way ends by its own clock, None where it has none."""
    status = status_of(rollout)
    index, steps = status.get("currentStepIndex"), steps_of(rollout)
    if index is None or index >= len(steps) or not is_underway(rollout):
        return None
    for kind, field in (("pause", "duration"), ("setMirror", "duration"), ("approval", "timeout")):
        duration = (steps[index].get(kind) or {}).get(field)
        passed = seconds_between(status.get("stepStartTime"), _stopped_at(status, now))
        if duration and passed is not None:
            return max(0.0, parse_duration(duration) - max(0.0, passed))
    return None


def _stopped_at(status: Mapping[str, Any], now: datetime) -> datetime:
    """Now, or since when the step's time has not counted."""
    parts = {name: status[name] for name in ("pauseConditions", "conditions") if name in status}
    try:
        since = stopped_since(AdapterDeploymentStatus.model_validate(parts))
    except ValidationError:  # of a newer operator, with reasons that are not known here
        return now
    return min(now, since) if since else now


def is_underway(rollout: Rollout) -> bool:
    """Whether a candidate is on its way."""
    return status_of(rollout).get("phase") in ("Progressing", "Paused") and bool(
        status_of(rollout).get("candidateRevision")
    )


def list_rows(rollouts: Sequence[Rollout], now: datetime, *, namespaces: bool) -> list[list[str]]:
    """Header and one row for each deployment, by name."""
    rows = [["NAMESPACE", *HEADER] if namespaces else list(HEADER)]
    for one in sorted(rollouts, key=lambda one: (one["metadata"]["namespace"], one["metadata"]["name"])):
        status = status_of(one)
        weights = status.get("weights")
        row = [
            one["metadata"]["name"],
            status.get("phase", "Pending"),
            status.get("stage", ""),
            status.get("step", ""),
            f"{weights['candidate']:g}%" if weights else "",
            status.get("stableRevision", ""),
            status.get("candidateRevision", ""),
            format_duration(seconds_between(one["metadata"]["creationTimestamp"], now) or 0),
        ]
        rows.append([one["metadata"]["namespace"], *row] if namespaces else row)
    return rows


def weight_parts(rollout: Rollout) -> list[str]:
    """Who gets how much: stable 1a2b3c4d 95%, candidate 9f8e7d6c 5%, and what is to be known about it."""
    status = status_of(rollout)
    weights = status.get("weights") or {}
    parts = []
    if stable := status.get("stableRevision"):
        parts.append(f"stable {stable} {weights.get('stable', 100):g}%")
    if (candidate := status.get("candidateRevision")) and candidate != stable:
        parts.append(f"candidate {candidate} {weights.get('candidate', 0):g}%")
    if weights.get("mirror"):
        parts.append(f"copies {weights['mirror']:g}%")
    if parts and weights.get("version") is not None and not weights.get("verified"):
        parts.append("not confirmed by all routers yet")
    return parts


def adapter_rows(rollout: Rollout, now: datetime) -> list[list[str]]:
    """Revision, role, engines that have it, where it comes from."""
    status, rows = status_of(rollout), []
    roles = {status.get("candidateRevision"): "candidate", status.get("stableRevision"): "stable"}
    for one in status.get("adapters") or ():
        loaded = f"loaded {one.get('loadedReplicas', 0)}/{one.get('desiredReplicas', 0)}"
        left = seconds_between(_text(now), one.get("unloadAt"))
        note = f"unloaded in {format_duration(left)}" if left is not None else one.get("message") or ""
        source = f"job {one['fineTuneJob']}" if one.get("fineTuneJob") else one.get("uri", "")
        rows.append([one["revision"], roles.get(one["revision"], "former"), loaded, source, note])
    return rows


def _text(moment: datetime) -> str:
    return moment.isoformat()


def check_rows(rollout: Rollout) -> list[list[str]]:
    """CHECK_HEADER's columns for each guardrail, objective, metric and alarm; no header."""
    return [
        [
            f"{check['name']} (dry run)" if check.get("dryRun") else check["name"],
            check["kind"],
            check["phase"],
            _arm(check, "stable"),
            _arm(check, "candidate"),
            _estimate(check),
            _evidence(check),
        ]
        for check in status_of(rollout).get("analysis") or ()
    ]


def _arm(check: Mapping[str, Any], arm: str) -> str:
    """Samples of a side, for a guardrail with the events among them: 12/1200."""
    count = (check.get("n") or {}).get(arm)
    failures = (check.get("failures") or {}).get(arm)
    if count is None:
        return ""
    return f"{count}" if failures is None else f"{failures}/{count}"


def _estimate(check: Mapping[str, Any]) -> str:
    estimate = check.get("estimate")
    if estimate is None:
        return ""
    if check["kind"] == "Guardrail":
        seen = any((check.get("failures") or {}).values())
        return f"{number(estimate, digits=3)} times as often" if seen else ""
    if check["kind"] != "Objective":
        return number(estimate, digits=3)
    interval = check.get("interval") or {}
    low, high = interval.get("low"), interval.get("high")
    if low is None or high is None:
        return f"{estimate:+.3g}"
    return f"{estimate:+.3g} in [{low:+.3g}, {high:+.3g}]"


def _evidence(check: Mapping[str, Any]) -> str:
    """How near the check is to its limit."""
    tally = check.get("measurements")
    if tally:
        words = ("successful", "failed", "inconclusive", "error")
        return ", ".join(f"{tally[word]} {word}" for word in words if tally.get(word)) or "not measured yet"
    threshold = check.get("threshold")
    value = check.get("eValue") if check.get("eValue") is not None else check.get("estimate")
    if threshold is None or value is None or check["kind"] == "Objective":
        return ""
    return f"{_round(value)} of {_round(threshold)}"


def _round(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else number(value, digits=3)


def state_line(rollout: Rollout) -> str:
    """Phase, stage, step, and who gets how much."""
    status = status_of(rollout)
    head = [status.get("phase", "Pending"), status.get("stage"), status.get("step"), *weight_parts(rollout)]
    return "  ".join(part for part in head if part)


def progress_lines(rollout: Rollout, now: datetime) -> list[str]:
    """For a log: where the rollout is, why it waits, how the checks stand, what happened; nothing that moves all the
    time."""
    del now
    status = status_of(rollout)
    lines = [state_line(rollout)]
    if exit_code(rollout) is not None:
        return lines
    for pause in status.get("pauseConditions") or ():
        lines.append(f"paused {pause['reason']}: {pause['message']}")
    for check in status.get("analysis") or ():
        bad = check["phase"] in ("Failed", "Error") and check.get("message")
        lines.append(f"check {check['name']}: {check['phase']}" + (f", {check['message']}" if bad else ""))
    for event in rollout.get("events") or ():
        lines.append(f"event {event['type']} {event['reason']}: {event.get('message', '')}")
    return list(dict.fromkeys(lines))


def moving_lines(rollout: Rollout, now: datetime) -> list[str]:
    """The operator's sentence, which counts on while a step lasts."""
    del now
    over = exit_code(rollout) is not None
    return [] if over else [status_of(rollout).get("message") or "waits for the operator"]


def final_lines(rollout: Rollout) -> list[str]:
    """How the rollout ended and what serves now."""
    status, meta = status_of(rollout), rollout["metadata"]
    name = meta["name"]
    last: Mapping[str, Any] = next(iter(status.get("history") or ()), {})
    took = seconds_between(last.get("startTime"), last.get("endTime"))
    after = "" if took is None else f" after {format_duration(took)}"
    if exit_code(rollout) == 0:
        how = status.get("completionStatus")
        done = f"{how}{after}, " if how else ""
        return [f"{name}: {done}{status.get('stableRevision')} serves {alias_of(rollout)}"]
    abort = status.get("abort") or {}
    weight = f" at {abort['weight']:g}%" if abort.get("weight") else ""
    return [
        f"{name}: {abort.get('revision') or status.get('candidateRevision')} was rolled back"
        f" ({abort.get('reason') or status.get('reason', 'Unknown')}){weight}{after}; "
        f"{status.get('stableRevision') or 'nothing'} serves",
        abort.get("message") or status.get("message") or "no message",
        f"more: finetune rollout describe {name} -n {meta['namespace']}",
    ]


def history_rows(rollout: Rollout, now: datetime) -> list[list[str]]:
    """Header and one row for each rollout that is over, newest first."""
    rows = [list(HISTORY_HEADER)]
    for one in status_of(rollout).get("history") or ():
        ended = seconds_between(one["endTime"], now)
        rows.append(
            [
                one["revision"],
                f"{format_duration(ended or 0)} ago",
                format_duration(seconds_between(one["startTime"], one["endTime"]) or 0),
                one["completionStatus"],
                one.get("reason", ""),
                one.get("fineTuneJob") or one["uri"],
            ]
        )
    return rows

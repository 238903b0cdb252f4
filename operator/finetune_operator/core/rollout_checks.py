"""What the evidence means for a rollout: go back, wait, or nothing.

Proof of harm rolls back in every stage in which the candidate answers requests, whatever else is being waited for.
Alarms and missing evidence only ever stop: nothing is decided from what is not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from finetune_operator.api.adapterdeployment_analysis import OnMetricsUnavailable
from finetune_operator.api.adapterdeployment_status import (
    AbortReason,
    AdapterDeploymentStatus,
    Check,
    CheckKind,
    CheckPhase,
    PauseReason,
    SampleRatio,
)
from finetune_operator.core import rollout_metrics as metrics
from finetune_operator.core import rollout_pauses as pauses
from finetune_operator.core.durations import parse_duration
from finetune_operator.core.rollout_facts import Withdrawal
from finetune_operator.core.rollout_turns import Turn, clock, first_three

SETTLE_SECONDS = 60.0  # most answers have ended by then
LEAST_SILENCE_SECONDS = 15.0  # a router that restarts is silent for a few seconds
ROUTER_REMEDY = "see its pod (kubectl get pods -A -o wide), restart it, or remove it from the Service"
ALARMS = {
    CheckKind.SAMPLE_RATIO: PauseReason.SAMPLE_RATIO_MISMATCH,
    CheckKind.DRIFT: PauseReason.DRIFT_DETECTED,
}
HARM = {
    CheckKind.GUARDRAIL: AbortReason.GUARDRAIL_BREACHED,
    CheckKind.OBJECTIVE: AbortReason.NON_INFERIORITY_REJECTED,
    CheckKind.METRIC: AbortReason.METRIC_FAILED,
}


def interval(turn: Turn) -> float:
    return parse_duration(turn.spec.analysis.interval)


def refresh(turn: Turn) -> Turn:
    """The checks of the rollout under way as of now, and since when evidence has been missing."""
    if not turn.underway or turn.first:
        return turn.update(evidence_missing_since=None)
    known = {check.name: check for check in turn.status.analysis}
    told = turn.seen.evidence.checks if turn.seen.evidence else ()
    checks = [_acknowledged(check, known.get(check.name)) for check in told]
    if not checks:
        checks = [check for check in turn.status.analysis if check.kind is not CheckKind.METRIC]
    checks += _measured(turn, known)
    missing = None
    if _counted(turn) and not _heard(turn):
        missing = turn.status.evidence_missing_since or turn.now
    return turn.update(
        analysis=checks[:64], sample_ratio=_sample_ratio(checks), evidence_missing_since=missing
    )


def _sample_ratio(checks: Sequence[Check]) -> SampleRatio | None:
    for check in checks:
        if check.kind is CheckKind.SAMPLE_RATIO:
            return SampleRatio(expected=check.expected, observed=check.estimate, e_value=check.e_value)
    return None


def _acknowledged(check: Check, known: Check | None) -> Check:
    """An alarm that a person answered with `resume` is only shown for the rest of the rollout."""
    if check.kind in ALARMS and known is not None and known.dry_run:
        return check.model_copy(update={"dry_run": True})
    return check


def _measured(turn: Turn, known: dict[str, Check]) -> list[Check]:
    made = {m.name: m for m in turn.seen.measurements} if turn.exposed else {}
    dry = turn.spec.analysis.dry_run
    return [
        metrics.tally(m, known.get(m.name), made.get(m.name), dry_run=m.name in dry, now=turn.now)
        for m in turn.spec.analysis.metrics
    ]


def _counted(turn: Turn) -> bool:
    """Whether the routers have anything to count: the published route gives the candidate requests."""
    route = turn.seen.routing.published
    named = route.candidate.revision if route is not None and route.candidate is not None else None
    given = route is not None and (route.weight > 0 or route.mirror > 0)
    return turn.exposed and given and named == turn.status.candidate_revision


def is_settling(status: AdapterDeploymentStatus, *, interval: float, now: datetime) -> bool:
    """Whether answers may come in whose requests were given out at a former weight. Each change of the weights is
    progress, and so is their confirmation, with which the next step begins."""
    changed = status.last_progress_time
    return changed is not None and (now - changed).total_seconds() < SETTLE_SECONDS + interval


def longest_silence(turn: Turn) -> float:
    return max(LEAST_SILENCE_SECONDS, 3 * interval(turn))


def _heard(turn: Turn) -> bool:
    """Whether every router told its counters a short while ago."""
    evidence = turn.seen.evidence
    if evidence is None or evidence.last_heard is None:
        return False
    return turn.elapsed(evidence.last_heard) <= longest_silence(turn)


def measure_due(turn: Turn) -> bool:
    if not turn.exposed or turn.first:
        return False
    known = {check.name: check for check in turn.status.analysis}
    seconds = interval(turn)
    return any(
        metrics.due(known.get(m.name), interval=seconds, now=turn.now) for m in turn.spec.analysis.metrics
    )


# ---------------------------------------------------------------- back


@dataclass(frozen=True)
class Harm:
    reason: AbortReason
    message: str


def harm(turn: Turn) -> Harm | None:
    """Proof that the candidate does harm, or a policy that asks to go back without evidence."""
    if not turn.exposed or turn.first:
        return None
    withdrawn = turn.seen.withdrawal
    if withdrawn is not None and concerns(withdrawn, turn.status):
        return Harm(withdrawn.reason, withdrawn.message)
    for kind, reason in HARM.items():
        for check in turn.status.analysis:
            if check.kind is kind and check.phase is CheckPhase.FAILED and not check.dry_run:
                return Harm(reason, f"{str(kind).lower()} {check.name}: {check.message or 'failed'}")
    if turn.spec.analysis.on_metrics_unavailable is OnMetricsUnavailable.ABORT:
        missing = missing_evidence(turn)
        if missing is not None:
            return Harm(AbortReason.METRICS_UNAVAILABLE, missing)
    return None


def concerns(withdrawn: Withdrawal, status: AdapterDeploymentStatus) -> bool:
    """Whether the rollout under way is the one whose candidate was withdrawn."""
    return (withdrawn.revision, withdrawn.rollout_start_time) == (
        status.candidate_revision,
        status.rollout_start_time,
    )


# ---------------------------------------------------------------- wait


def refresh_pauses(turn: Turn) -> Turn:
    """Pauses that the evidence asks for; those of missing evidence go when it is back, alarms stay until `resume`."""
    if not turn.underway:
        return turn
    for check in turn.status.analysis:
        alarm = ALARMS.get(check.kind)
        if alarm is not None and turn.exposed and check.phase is CheckPhase.FAILED and not check.dry_run:
            turn = pauses.add(turn, alarm, f"{check.message or check.name}; {ALARM_ADVICE[check.kind]}")
    inconclusive = inconclusive_metric(turn) if turn.exposed else None
    if inconclusive is not None:
        turn = pauses.add(turn, PauseReason.INCONCLUSIVE_ANALYSIS, f"{inconclusive}; {METRIC_ADVICE}")
    missing = missing_evidence(turn)
    if missing is None or turn.spec.analysis.on_metrics_unavailable is OnMetricsUnavailable.ABORT:
        turn = pauses.remove(turn, PauseReason.METRICS_UNAVAILABLE)
    else:
        turn = pauses.add(
            turn, PauseReason.METRICS_UNAVAILABLE, f"{missing}; it goes on by itself when it is back"
        )
    return turn


ALARM_ADVICE = {
    CheckKind.SAMPLE_RATIO: "find out why before you trust the comparison (see docs/rollouts.md), then say `resume` or "
    "`abort`",
    CheckKind.DRIFT: "read some of the candidate's answers, then say `resume` or `abort`",
}
METRIC_ADVICE = "correct its query or conditions, then say `resume` (as many again are borne), or `abort`"


def missing_evidence(turn: Turn) -> str | None:
    """What has been missing for so long that the rollout may not just wait; None while all is well or young."""
    since = turn.status.evidence_missing_since
    hold = turn.spec.analysis.on_metrics_unavailable is OnMetricsUnavailable.HOLD
    patience = float(turn.spec.progress_deadline_seconds) if hold else longest_silence(turn)
    if since is not None and turn.elapsed(since) >= patience:
        return _silence(turn, since)
    for check in turn.status.analysis:
        if check.kind is CheckKind.METRIC and check.phase is CheckPhase.ERROR and not check.dry_run:
            return f"metric {check.name}: {check.message}"
    return None


def inconclusive_metric(turn: Turn) -> str | None:
    """A metric that gave more measurements without a verdict than are borne."""
    specs = {metric.name: metric for metric in turn.spec.analysis.metrics}
    for check in turn.status.analysis:
        if check.name in specs and not check.dry_run and metrics.too_inconclusive(specs[check.name], check):
            return f"metric {check.name}: {check.message}"
    return None


def evidence_gap(turn: Turn) -> str | None:
    """Why the weight may not rise for want of evidence; None where there is nothing to be had or it is fresh."""
    if turn.first or not turn.exposed:
        return None
    since = turn.status.evidence_missing_since
    return unanswered_metric(turn) if since is None else _silence(turn, since)


def _silence(turn: Turn, since: datetime) -> str:
    silent = first_three(turn.seen.routing.silent)
    which = f": {silent}; {ROUTER_REMEDY}" if silent else ""
    return f"not every router has told its counters since {clock(since)}{which}"


def unanswered_metric(turn: Turn) -> str | None:
    """A metric whose last query had no answer."""
    for check in turn.status.analysis:
        if check.measurements and check.measurements.consecutive_errors and not check.dry_run:
            return f"metric {check.name}: {check.message}"
    return None


def unanswered(turn: Turn) -> str | None:
    """That users meet the stable revision and nobody has met the candidate: time alone proves nothing of it. None where
    nobody asks anything, as then there is no comparison to wait for."""
    if turn.first or turn.weights.candidate == 0:
        return None
    counted = (CheckKind.GUARDRAIL, CheckKind.SAMPLE_RATIO)
    told = [check.n for check in turn.status.analysis if check.kind in counted and check.n is not None]
    if not any(n.stable for n in told) or any(n.candidate for n in told):
        return None
    return (
        f"the stable revision has answered users and the candidate none, at {turn.weights.candidate:g}% of them; it "
        "goes on by itself with the candidate's first answer"
    )


# ---------------------------------------------------------------- analysis steps


def undecided(turn: Turn) -> list[Check]:
    """Objectives and metrics that are not Successful yet; those that were never looked at count as Inconclusive."""
    known = {check.name: check for check in turn.status.analysis}
    found = []
    for names, kind in (
        ([o.name for o in turn.spec.analysis.objectives], CheckKind.OBJECTIVE),
        ([m.name for m in turn.spec.analysis.metrics], CheckKind.METRIC),
    ):
        for name in names:
            if name in turn.spec.analysis.dry_run:
                continue
            check = known.get(name) or Check(name=name, kind=kind, phase=CheckPhase.INCONCLUSIVE)
            if check.phase is not CheckPhase.SUCCESSFUL:
                found.append(check)
    return found


def short_of_samples(turn: Turn, checks: list[Check]) -> list[Check]:
    least = {objective.name: objective.min_samples_per_arm for objective in turn.spec.analysis.objectives}
    return [
        check
        for check in checks
        if check.name in least
        and (check.n is None or min(check.n.stable, check.n.candidate) < least[check.name])
    ]


def reset(turn: Turn) -> Turn:
    """After `resume`: the alarms are only shown from here on, and what metrics bore is forgotten."""
    checks = []
    for check in turn.status.analysis:
        if check.kind in ALARMS and check.phase is CheckPhase.FAILED:
            checks.append(check.model_copy(update={"dry_run": True}))
        else:
            checks.append(metrics.borne_again(check))
    since = turn.status.evidence_missing_since
    return turn.update(analysis=checks, evidence_missing_since=None if since is None else turn.now)

"""How a rollout begins and ends: every change of `stableRevision`, `candidateRevision`, `abort` and `history`."""

from __future__ import annotations

from datetime import datetime, timedelta

from finetune_operator.api.adapterdeployment_status import (
    Abort,
    AbortReason,
    CompletionStatus,
    HistoryEntry,
    LoadedAdapter,
    Stage,
)
from finetune_operator.core import rollout_adapters as adapters
from finetune_operator.core import texts
from finetune_operator.core.rollout_facts import ArtifactFacts
from finetune_operator.core.rollout_turns import OVER, Turn, hash_of

MAX_ADAPTERS = 16
SERVED = frozenset(
    {CompletionStatus.PROMOTED, CompletionStatus.FAST_PROMOTED, CompletionStatus.FAST_ROLLED_BACK}
)
ADVICE = {
    AbortReason.GUARDRAIL_BREACHED: "see status.analysis; train a better adapter and set spec.adapter to it",
    AbortReason.NON_INFERIORITY_REJECTED: "see status.analysis; train a better adapter and set spec.adapter to it",
    AbortReason.METRIC_FAILED: "see status.analysis; say `retry` if the metric was wrong, or set spec.adapter anew",
    AbortReason.EVAL_GATE_FAILED: "see status.evaluation; set spec.adapter to a better one, or correct the gate and "
    "say `retry`",
    AbortReason.ADAPTER_LOAD_FAILED: "correct what the engines say and say `retry`, or set spec.adapter to another one",
    AbortReason.PROGRESS_DEADLINE_EXCEEDED: "remove what it waited for, then say `retry`",
    AbortReason.METRICS_UNAVAILABLE: "bring the metrics back, then say `retry`",
    AbortReason.APPROVAL_TIMED_OUT: "say `retry` to begin anew",
    AbortReason.USER_ABORT: "say `retry` to begin anew, or set spec.adapter to another one",
    AbortReason.ROLLBACK_WEBHOOK: "say `retry` to begin anew, or set spec.adapter to another one",
}


def served_before(turn: Turn) -> list[str]:
    """Former stable revisions that were not rolled back since, newest first. A return that was cut short because spec
    named another one says nothing against them."""
    latest: dict[str, CompletionStatus] = {}
    for entry in turn.status.history:
        if entry.completion_status in SERVED or entry.completion_status is CompletionStatus.ABORTED:
            latest.setdefault(entry.revision, entry.completion_status)
    return [
        revision
        for revision, ending in latest.items()
        if ending in SERVED and revision != turn.status.stable_revision
    ]


def in_window(turn: Turn, revision: str) -> bool:
    return revision in served_before(turn)[: turn.spec.rollback_window.revisions]


def artifact_of(turn: Turn, revision: str) -> ArtifactFacts | None:
    """Where a known revision's artifact is: loaded, or in the history."""
    known = turn.adapter(revision) or next(
        (entry for entry in turn.status.history if entry.revision == revision), None
    )
    if known is None:
        return None
    return ArtifactFacts(digest=known.digest, uri=known.uri, fine_tune_job=known.fine_tune_job)


def begin(turn: Turn, artifact: ArtifactFacts, *, fast: bool = False, barred: Abort | None = None) -> Turn:
    """A new candidate, at weight 0. Without steps when it served before (rollbackWindow) or `fast`.

    `barred` is the revision that spec names and that is not to come back by itself when the candidate is another one.
    """
    revision = artifact.revision
    turn = displace(turn, f"{revision} was asked for") if turn.underway else turn
    known = turn.adapter(revision)
    entry = LoadedAdapter(
        revision=revision,
        served_name=adapters.served_name(turn.alias, revision),
        digest=artifact.digest,
        uri=artifact.uri,
        fine_tune_job=artifact.fine_tune_job,
        loaded_replicas=known.loaded_replicas if known else 0,
    )
    fast = fast or in_window(turn, revision)
    turn = _limited(turn.with_adapter(entry), keep=revision)
    turn = turn.update(
        candidate_revision=revision,
        completion_status=None,
        current_step_index=None,
        current_step_hash=None if fast else hash_of(turn.spec.strategy.canary.steps),
        pause_conditions=[],
        abort=barred,
        analysis=[],
        sample_ratio=None,
        evaluation=None,
        rollout_start_time=_later(turn.now, turn.status.rollout_start_time),
        step_start_time=None,
        evidence_missing_since=None,
    )
    turn = turn.stage(Stage.LOADING).update(stage_start_time=turn.now)
    return turn.weigh(candidate=0).again_in(0)


def _later(now: datetime, before: datetime | None) -> datetime:
    """A start that no rollout had before: with the revision it names the evidence, and times are whole seconds."""
    return now if before is None or now > before else before + timedelta(seconds=1)


def _limited(turn: Turn, *, keep: str) -> Turn:
    """At most as many entries as the schema allows; the ones that go first would be unloaded first."""
    spare = sorted(
        (a for a in turn.status.adapters if a.unload_at is not None and a.revision != keep),
        key=lambda adapter: adapter.unload_at or turn.now,
    )
    surplus = spare[: max(0, len(turn.status.adapters) - MAX_ADAPTERS)]
    return turn.update(adapters=[a for a in turn.status.adapters if a not in surplus]) if surplus else turn


def displace(turn: Turn, why: str) -> Turn:
    """The candidate gives way to another revision; stable serves everybody at once."""
    turn = _recorded(turn, CompletionStatus.SUPERSEDED, f"superseded: {why}")
    turn = _unload_later(
        turn, turn.status.candidate_revision, turn.spec.strategy.canary.abort_scale_down_delay_seconds
    )
    return _without_candidate(turn).update(completion_status=CompletionStatus.SUPERSEDED)


def roll_back(turn: Turn) -> Turn:
    """spec asks for the stable revision again: there is nothing left to roll out."""
    turn = _recorded(turn, CompletionStatus.ROLLED_BACK, "spec.adapter went back to the stable revision")
    turn = _unload_later(
        turn, turn.status.candidate_revision, turn.spec.strategy.canary.abort_scale_down_delay_seconds
    )
    turn = _without_candidate(turn).update(completion_status=CompletionStatus.ROLLED_BACK, abort=None)
    return turn.stage(Stage.FINALISING)


def abort(turn: Turn, reason: AbortReason, message: str) -> Turn:
    """Back to the stable revision. One way: only another revision or `retry` leads out."""
    revision, weight = turn.status.candidate_revision or "", turn.weights.candidate
    advice = ADVICE[reason]
    text = f"{message.strip().rstrip('.')}; {advice}"[: texts.LONGEST]
    aborted = Abort(reason=reason, message=text, at=turn.now, revision=revision, weight=weight)
    barred = turn.status.abort
    if barred is not None and barred.revision != turn.status.stable_revision:
        # A way back by hand has failed; what spec names must still not come back by itself.
        failed = f"{barred.message}; the return to {revision} failed: {text}"[: texts.LONGEST]
        aborted = barred.model_copy(update={"message": failed, "at": turn.now})
    turn = _recorded(turn, CompletionStatus.ABORTED, text, reason=reason)
    turn = _unload_later(turn, revision, turn.spec.strategy.canary.abort_scale_down_delay_seconds)
    return (
        turn.weigh(candidate=0)
        .update(
            abort=aborted,
            completion_status=CompletionStatus.ABORTED,
            pause_conditions=[],
            step_start_time=None,
            evidence_missing_since=None,
        )
        .stage(Stage.ABORTING)
        .again_in(0)
    )


def promote(turn: Turn) -> Turn:
    """The pointer flip: everybody has the candidate by now, so nobody moves."""
    revision, previous = turn.status.candidate_revision or "", turn.status.stable_revision
    ending = CompletionStatus.PROMOTED
    if turn.status.current_step_hash is None:
        ending = CompletionStatus.FAST_PROMOTED
        if in_window(turn, revision):
            ending = CompletionStatus.FAST_ROLLED_BACK
    elif not turn.spec.strategy.canary.steps:
        ending = CompletionStatus.FAST_PROMOTED
    turn = _recorded(turn, ending, f"{revision} serves everybody")
    turn = _unload_later(turn, previous, turn.spec.strategy.canary.scale_down_delay_seconds)
    turn = turn.update(stable_revision=revision, completion_status=ending)
    turn = _without_candidate(turn).stage(Stage.FINALISING)
    return turn.again_in(0)


def _without_candidate(turn: Turn) -> Turn:
    # The weights say the same as before, of other revisions: they count when the routers have confirmed them anew.
    weights = turn.weights.model_copy(
        update={
            "stable": 0.0 if turn.first else 100.0,
            "candidate": 0.0,
            "mirror": 0.0,
            "version": None,
            "verified": False,
        }
    )
    return turn.update(
        candidate_revision=None,
        weights=weights,
        pause_conditions=[],
        current_step_index=None,
        current_step_hash=None,
        step_start_time=None,
        evidence_missing_since=None,
    )


def settled(turn: Turn) -> Turn:
    """The wanted revision serves and nothing is left of an aborted candidate."""
    if turn.status.candidate_revision is None and turn.status.abort is None:
        return turn
    turn = _without_candidate(turn) if turn.status.candidate_revision is not None else turn
    # How the aborted rollout ended stands in the history; of what serves now it would be untrue.
    return turn.update(abort=None, completion_status=None).stage(Stage.FINALISING)


def forget_aborted(turn: Turn) -> Turn:
    """spec names something else that is not there yet: the aborted candidate is nobody's candidate any more, and what
    a return by hand has barred is barred no longer."""
    if turn.status.stage in OVER:
        turn = _without_candidate(turn)
    return turn.update(abort=None)


def _unload_later(turn: Turn, revision: str | None, seconds: int) -> Turn:
    adapter = turn.adapter(revision)
    if adapter is None:
        return turn
    return turn.with_adapter(adapter.model_copy(update={"unload_at": turn.now + timedelta(seconds=seconds)}))


def _recorded(
    turn: Turn, ending: CompletionStatus, message: str, *, reason: AbortReason | None = None
) -> Turn:
    adapter = turn.candidate
    if adapter is None:
        return turn
    entry = HistoryEntry(
        revision=adapter.revision,
        digest=adapter.digest,
        uri=adapter.uri,
        fine_tune_job=adapter.fine_tune_job,
        completion_status=ending,
        reason=reason,
        message=message[: texts.LONGEST],
        start_time=turn.status.rollout_start_time or turn.now,
        end_time=turn.now,
    )
    return turn.update(history=[entry, *turn.status.history][: turn.spec.revision_history_limit])

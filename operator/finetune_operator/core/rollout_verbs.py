"""What people say: the verbs of the annotation finetune.dev/action, each obeyed once.

The obeyed value is in the same status write as what it did; only then is the annotation removed. So whoever is killed
in between finds the value recorded and does not obey it again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from finetune_operator.api.adapterdeployment_status import (
    Abort,
    AbortReason,
    PauseReason,
    Stage,
    TakenAction,
)
from finetune_operator.core import rollout_checks as checks
from finetune_operator.core import rollout_endings as endings
from finetune_operator.core import rollout_pauses as pauses
from finetune_operator.core import rollout_stages as stages
from finetune_operator.core import rollout_steps as steps
from finetune_operator.core import texts
from finetune_operator.core.rollout_facts import ClearAction
from finetune_operator.core.rollout_turns import Turn

MAX_VALUE = 128


@dataclass(frozen=True)
class Refusal:
    """Why a verb makes no sense now, and what would."""

    message: str


Answer = tuple[Turn, str] | Refusal
NOTHING = Refusal("no rollout is under way")


def obey(turn: Turn) -> Turn:
    """Do what the annotation says, unless that was done before."""
    value, taken = turn.seen.deployment.action, turn.status.last_action
    if value is None:
        if taken is not None and taken.pending:
            return turn.update(last_action=taken.model_copy(update={"pending": False}))
        return turn
    if taken is not None and taken.pending and taken.value == value[:MAX_VALUE]:
        return turn.act(ClearAction(value))
    verb = value.partition("/")[0].strip().lower()
    answer = _answer(turn, verb)
    if isinstance(answer, Refusal):
        message, refused = f"{verb} was refused: {answer.message}", True
    else:
        (turn, message), refused = answer, False
    taken = TakenAction(
        value=value[:MAX_VALUE], pending=True, refused=refused, message=message[: texts.LONGEST]
    )
    return turn.update(last_action=taken).act(ClearAction(value)).again_in(0)


def _answer(turn: Turn, verb: str) -> Answer:
    if verb not in _VERBS:
        return _unknown(verb)
    problem = turn.seen.deployment.problem
    stops = verb in ("abort", "pause") or (verb == "rollback" and turn.underway)
    if problem is not None and not stops:  # of its steps and weights nothing is known for sure
        return Refusal(f"the spec cannot be read ({problem}); correct it first, or say `abort`")
    return _VERBS[verb](turn)


def _unknown(verb: str) -> Refusal:
    return Refusal(f"{verb!r} is no action; there are {', '.join(_VERBS)}")


def _promote(turn: Turn) -> Answer:
    if not turn.underway:
        return NOTHING
    if turn.spec.paused:
        return Refusal("spec.paused is true; set it to false first")
    stage = turn.status.stage
    if stage in (Stage.LOADING, Stage.PROMOTING):
        return Refusal(f"there is no step to leave in stage {stage}; `promote-full` leaves all of them out")
    step, text = steps.current(turn), steps.text_of(turn)
    turn = _without_user_pause(checks.reset(turn))
    if stage is Stage.WAITING_PROMOTION:
        return stages.promoting_begins(turn), "promotes without waiting for confirm-promotion"
    if step is not None and step.set_weight is not None:
        if turn.weights.candidate == step.set_weight and checks.unanswered(turn) is not None:
            return steps.leave(turn), f"step {text} is left without an answer of the candidate"
        held = steps.hold(turn) if step.set_weight >= turn.weights.candidate else None
        if held is not None:  # a person may do without an answer, not without engines, routers and counters
            return Refusal(f"step {text} has to wait: {held[1]}")
        if turn.weights.candidate == step.set_weight:
            return steps.leave(turn), f"step {text} is left"
        turn = turn.weigh(candidate=step.set_weight).update(last_progress_time=turn.now)
        return turn, f"step {text} is taken without confirmation"
    return steps.leave(turn), f"step {text} is left"


def _promote_full(turn: Turn) -> Answer:
    if not turn.underway:
        return NOTHING
    if turn.spec.paused:
        return Refusal("spec.paused is true; set it to false first")
    turn = _without_user_pause(checks.reset(turn)).update(current_step_hash=None, current_step_index=None)
    if turn.status.stage is Stage.LOADING:
        return turn, "all steps are left out once the adapter is loaded"
    turn = pauses.remove(turn, *pauses.OWN).update(step_start_time=None)
    return stages.promoting_begins(
        turn.weigh(candidate=turn.weights.candidate)
    ), "all other steps are left out"


def _abort(turn: Turn) -> Answer:
    if not turn.underway:
        return Refusal(
            "no rollout is under way; `rollback` (finetune rollout undo) returns to the previous revision"
        )
    return endings.abort(turn, AbortReason.USER_ABORT, "aborted by hand"), "aborted"


def _pause(turn: Turn) -> Answer:
    if not turn.underway:
        return NOTHING
    if pauses.by_hand(turn):
        return Refusal("it is paused already")
    return pauses.add(turn, PauseReason.USER_PAUSE, pauses.BY_VERB), "paused; say `resume` to go on"


def _resume(turn: Turn) -> Answer:
    """Go on after a pause of any kind; in a pause step with nothing else to wait for, leave it."""
    if not turn.underway:
        return NOTHING
    if turn.spec.paused:
        return Refusal("spec.paused is true; set it to false")
    waits = [pause.reason for pause in turn.status.pause_conditions]
    if not waits:
        return Refusal("nothing is paused")
    if waits == [PauseReason.AWAITING_APPROVAL]:
        return Refusal("the step waits for approval; say `promote` to approve, or `abort`")
    if waits == [PauseReason.CANARY_PAUSE_STEP]:
        return steps.leave(turn), f"step {steps.text_of(turn)} is left"
    turn = _without_user_pause(checks.reset(turn))
    if set(waits) & {PauseReason.INCONCLUSIVE_ANALYSIS, PauseReason.INSUFFICIENT_SAMPLES}:
        turn = turn.update(step_start_time=None)  # another maxStepDuration
        turn = pauses.remove(turn, PauseReason.INCONCLUSIVE_ANALYSIS, PauseReason.INSUFFICIENT_SAMPLES)
    left = [reason for reason in waits if pauses.has(turn, reason)]
    over = ", ".join(reason for reason in waits if reason not in left)
    return turn, f"resumed after {over}" + (f"; {', '.join(left)} still holds it" if left else "")


def _without_user_pause(turn: Turn) -> Turn:
    return pauses.remove(
        turn,
        PauseReason.USER_PAUSE,
        PauseReason.SAMPLE_RATIO_MISMATCH,
        PauseReason.DRIFT_DETECTED,
        PauseReason.METRICS_UNAVAILABLE,
    )


def _retry(turn: Turn) -> Answer:
    aborted = turn.status.abort
    if aborted is None or turn.underway:
        return Refusal("nothing was rolled back")
    wanted = turn.seen.wanted.artifact
    artifact = wanted if wanted and wanted.revision == aborted.revision else None
    artifact = artifact or endings.artifact_of(turn, aborted.revision)
    if artifact is None:
        return Refusal(f"the artifact of {aborted.revision} is not known any more; set spec.adapter")
    return endings.begin(turn, artifact), f"the rollout of {aborted.revision} begins anew"


def _rollback(turn: Turn) -> Answer:
    """Back to the revision that served before; the one that spec names is barred until it changes or `retry`."""
    if turn.underway:
        message = "rolled back by hand during its rollout"
        return endings.abort(turn, AbortReason.USER_ABORT, message), "the rollout is aborted"
    stable = turn.status.stable_revision
    before = endings.served_before(turn)
    if stable is None or not before:
        return Refusal("no revision served before this one (see status.history and revisionHistoryLimit)")
    artifact = endings.artifact_of(turn, before[0])
    if artifact is None:
        return Refusal(f"where the artifact of {before[0]} is, is not known any more; set spec.adapter")
    barred = turn.status.abort or Abort(
        reason=AbortReason.USER_ABORT,
        message=f"rolled back by hand to {before[0]}; set spec.adapter, or say `retry` to bring {stable} back",
        at=turn.now,
        revision=stable,
        weight=100,
    )
    return endings.begin(turn, artifact, fast=True, barred=barred), f"returns to {before[0]}"


_VERBS: dict[str, Callable[[Turn], Answer]] = {
    "promote": _promote,
    "promote-full": _promote_full,
    "abort": _abort,
    "pause": _pause,
    "resume": _resume,
    "retry": _retry,
    "rollback": _rollback,
}

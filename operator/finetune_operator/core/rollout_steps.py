"""The steps of a rollout: what each waits for, and when the next one follows.

A step's time begins when every router applies its weight, and stands still while anything else holds the rollout.
"""

from __future__ import annotations

from finetune_operator.api.adapterdeployment_status import AbortReason, LoadedAdapter, PauseReason, Stage
from finetune_operator.api.adapterdeployment_strategy import OnTimeout, Step, WebhookType
from finetune_operator.core import rollout_adapters as adapters
from finetune_operator.core import rollout_checks as checks
from finetune_operator.core import rollout_conditions as conditions
from finetune_operator.core import rollout_endings as endings
from finetune_operator.core import rollout_gates as gates
from finetune_operator.core import rollout_pauses as pauses
from finetune_operator.core import rollout_stages as stages
from finetune_operator.core.durations import format_duration, parse_duration
from finetune_operator.core.rollout_turns import Turn, hash_of, kind_of


def steps_of(turn: Turn) -> list[Step]:
    return turn.spec.strategy.canary.steps


def current(turn: Turn) -> Step | None:
    index = turn.status.current_step_index
    steps = steps_of(turn)
    return steps[index] if index is not None and index < len(steps) else None


def begin(turn: Turn) -> Turn:
    """The first step, or none for a revision that needs no steps."""
    return stages.await_promotion(turn) if turn.status.current_step_hash is None else enter(turn, 0)


def restart(turn: Turn) -> Turn:
    """The steps were edited: step 0 at weight 0, same users in front (the salt stays)."""
    turn = turn.update(current_step_hash=hash_of(steps_of(turn)))
    return turn if turn.status.stage is Stage.LOADING else enter(turn.weigh(candidate=0), 0)


def edited(turn: Turn) -> bool:
    known = turn.status.current_step_hash
    return known is not None and known != hash_of(steps_of(turn))


def enter(turn: Turn, index: int) -> Turn:
    """Go to a step (or past the last one); a first deployment has only evalGates."""
    steps = steps_of(turn)
    while turn.first and index < len(steps) and steps[index].eval_gate is None:
        index += 1
    turn = pauses.remove(turn, *pauses.OWN).weigh(candidate=turn.weights.candidate)
    turn = turn.update(current_step_index=index, step_start_time=None)
    if index >= len(steps):
        return stages.await_promotion(turn)
    stage = Stage.CANARY
    if steps[index].eval_gate is not None:
        stage = Stage.VALIDATING
    elif steps[index].set_mirror is not None:
        stage = Stage.SHADOWING
    return turn.stage(stage).again_in(0)


def leave(turn: Turn) -> Turn:
    return enter(turn, (turn.status.current_step_index or 0) + 1)


def text_of(turn: Turn) -> str | None:
    """The step for printing, for example `3/6 pause`."""
    step, index = current(turn), turn.status.current_step_index
    if step is None or index is None or not turn.underway:
        return None
    number = f"{index + 1}/{len(steps_of(turn))} {kind_of(step)}"
    return f"{number} {step.set_weight}" if step.set_weight is not None else number


# ---------------------------------------------------------------- what holds


def hold(turn: Turn) -> tuple[str, str] | None:
    """Why the rollout may not go on now, apart from what its step waits for."""
    paused = pauses.holding(turn)
    if paused:
        return str(paused[0].reason), paused[0].message
    for adapter in adapters.needed(turn):
        missing = _missing(turn, adapter)
        if missing is not None:
            return missing
    silence, step = adapters.silence(turn.seen), current(turn)
    gated = step is not None and step.eval_gate is not None  # it asks agents itself, within the deadline
    if silence is not None and not gated:
        return "AgentSilent", silence
    behind = _behind(turn)
    if behind is not None:
        return behind
    gap = checks.evidence_gap(turn)
    if gap is not None:
        return "EvidenceMissing", f"{gap}; the weight is held, and the rollout goes on when evidence is back"
    inconclusive = checks.inconclusive_metric(turn)
    return (str(PauseReason.INCONCLUSIVE_ANALYSIS), inconclusive) if inconclusive else None


def _missing(turn: Turn, adapter: LoadedAdapter) -> tuple[str, str] | None:
    found = adapters.coverage(turn.seen, adapter)
    if found.complete:
        return None
    if not turn.seen.engines:
        why = turn.seen.engines_problem or "no engine is known"
        return "NoEngines", f"{why}; what is published stays, and the weight is held until engines are known"
    why = found.why() or "none of them is ready"
    return "AdapterMissing", f"{found.numbers()}; the weight is held until all have it: {why}"


def _behind(turn: Turn) -> tuple[str, str] | None:
    if turn.first or turn.weights.verified:
        return None
    return conditions.behind(turn)


def wait_for(turn: Turn, held: tuple[str, str]) -> Turn:
    """Hold. A candidate that an engine lacks though it answers is waited for no longer than the deadline; a stable
    revision as long as it takes, because there is nothing to go back to. Weights that never get into the routes are an
    error of ours, and no reason to leave users between two revisions for ever."""
    turn = turn.say(*held).again_in(stages.SOON_SECONDS)
    if held[0] == conditions.NOT_PUBLISHED:
        return stages.within_deadline(turn, AbortReason.PROGRESS_DEADLINE_EXCEEDED)
    candidate = turn.candidate
    if candidate is None or held[0] != "AdapterMissing":
        return turn
    lacking = adapters.coverage(turn.seen, candidate).lacking
    if not any(engine.reachable for engine in lacking):
        return turn
    return stages.within_deadline(turn, AbortReason.ADAPTER_LOAD_FAILED)


def promoting(turn: Turn) -> Turn:
    """Weight 100, confirmed by every router, then the pointer flip.

    What may hold it is less than in a step: where everybody has the candidate already, and on the way back to a
    revision that served before, neither evidence nor the revision that is left is waited for.
    """
    candidate = turn.candidate
    if candidate is None:
        return turn
    everybody = turn.weights.candidate == 100
    if everybody or turn.stepless:
        by_hand = [p for p in pauses.holding(turn) if p.reason is not PauseReason.METRICS_UNAVAILABLE]
        paused = (str(by_hand[0].reason), by_hand[0].message) if by_hand else None
        held = paused or _missing(turn, candidate) or _behind(turn)
    else:
        held = hold(turn)
    if held is not None:
        return wait_for(turn, held)
    if turn.first or everybody:
        return endings.promote(turn)
    return turn.weigh(candidate=100).update(last_progress_time=turn.now).again_in(0)


def run(turn: Turn) -> Turn:
    """The step under way: leave it, wait in it, or go back."""
    step = current(turn)
    if step is None:
        return stages.await_promotion(turn)
    held = hold(turn)
    if held is not None:
        return wait_for(turn, held)
    if step.set_weight is not None:
        return _set_weight(turn, step.set_weight)
    if step.set_mirror is not None and turn.weights.mirror != step.set_mirror.percent:
        return turn.weigh(candidate=turn.weights.candidate, mirror=step.set_mirror.percent).again_in(0)
    if turn.status.step_start_time is None:
        turn = turn.update(step_start_time=turn.now)
    if step.eval_gate is not None:
        turn, passed = gates.evaluate(turn, step.eval_gate)
        return _onward(turn) if passed else turn
    if step.set_mirror is not None:
        duration = step.set_mirror.duration
        return _onward(turn, duration) if _over(turn, duration) else _until(turn, duration)
    if step.analysis is not None:
        return _analysis(turn, step.analysis.duration)
    if step.approval is not None:
        return _approval(turn, step.approval.timeout, step.approval.on_timeout)
    return _pause(turn, step.pause.duration if step.pause else None)


def _onward(turn: Turn, duration: str | None = None) -> Turn:
    """Leave the step by time or by a gate, and not before a candidate that has users has answered one of them: a timed
    step ends with its time, and any step before the promotion."""
    step, index = current(turn), turn.status.current_step_index or 0
    timed = step is not None and step.eval_gate is None and step.set_weight is None
    silent = checks.unanswered(turn) if timed or index + 1 >= len(steps_of(turn)) else None
    if silent is None:
        return leave(turn)
    turn = pauses.remove(turn, *(pauses.OWN - {PauseReason.INSUFFICIENT_SAMPLES}))
    turn = turn.say(str(PauseReason.INSUFFICIENT_SAMPLES), silent).again_in(checks.interval(turn))
    waited = turn.elapsed(turn.status.step_start_time or turn.status.last_progress_time)
    if waited < (parse_duration(duration) if duration else 0.0) + checks.longest_silence(turn):
        return turn
    advice = "send traffic or raise the weight, or say `promote` to go on without it"
    return pauses.add(turn, PauseReason.INSUFFICIENT_SAMPLES, f"{silent}; {advice}")


def _over(turn: Turn, duration: str | None) -> bool:
    return duration is not None and turn.elapsed(turn.status.step_start_time) >= parse_duration(duration)


def _until(turn: Turn, duration: str | None) -> Turn:
    if duration is None:
        return turn
    return turn.again_in(parse_duration(duration) - turn.elapsed(turn.status.step_start_time))


def _set_weight(turn: Turn, weight: int) -> Turn:
    """Recorded here, published after, and left when every router has confirmed it."""
    if turn.weights.candidate == weight:
        return _onward(turn)
    if weight > turn.weights.candidate:
        turn, confirmed = stages.confirm(turn, WebhookType.CONFIRM_TRAFFIC_INCREASE)
        if not confirmed:
            return turn
    return turn.weigh(candidate=weight).update(last_progress_time=turn.now).again_in(0)


def _pause(turn: Turn, duration: str | None) -> Turn:
    if _over(turn, duration):
        return _onward(turn, duration)
    what = f"for {duration}" if duration else "until somebody says `promote` or `resume`"
    return _until(pauses.add(turn, PauseReason.CANARY_PAUSE_STEP, f"the step waits {what}"), duration)


def _approval(turn: Turn, timeout: str | None, on_timeout: OnTimeout) -> Turn:
    if _over(turn, timeout):
        if on_timeout is OnTimeout.PROMOTE:
            return _onward(turn, timeout)
        return endings.abort(turn, AbortReason.APPROVAL_TIMED_OUT, f"nobody approved within {timeout}")
    message = "say `promote` to approve, or `abort`"
    if timeout is not None:
        message += f"; after {timeout} without an answer: {on_timeout}"
    return _until(pauses.add(turn, PauseReason.AWAITING_APPROVAL, message), timeout)


def _analysis(turn: Turn, duration: str | None) -> Turn:
    """On when every objective and metric is Successful; a pause when there is no verdict for too long."""
    undecided = checks.undecided(turn)
    at_least = parse_duration(duration) if duration else 0.0
    elapsed = turn.elapsed(turn.status.step_start_time)
    if not undecided and elapsed >= at_least:
        return _onward(turn, duration)
    turn = turn.again_in(checks.interval(turn))
    patience = max(at_least, parse_duration(turn.spec.strategy.canary.max_step_duration))
    if not undecided or elapsed < patience:
        return turn
    few = checks.short_of_samples(turn, undecided)
    if few:
        names = ", ".join(f"{check.name}: {check.message or 'no samples'}" for check in few)
        message = (
            f"too few samples after {format_duration(patience)} ({names}); is feedback sent? Else send more traffic or "
            "raise the weight, say `resume` to wait for as long again, `promote` to go on without a verdict, or `abort`"
        )
        turn = pauses.remove(turn, PauseReason.INCONCLUSIVE_ANALYSIS)
        return pauses.add(turn, PauseReason.INSUFFICIENT_SAMPLES, message)
    names = ", ".join(f"{check.name}: {check.message or check.phase}" for check in undecided)
    message = (
        f"no verdict after {format_duration(patience)} ({names}); say `promote` to go on without one, `resume` to look "
        f"for another {turn.spec.strategy.canary.max_step_duration}, or `abort`"
    )
    turn = pauses.remove(turn, PauseReason.INSUFFICIENT_SAMPLES)
    return pauses.add(turn, PauseReason.INCONCLUSIVE_ANALYSIS, message)

"""evalGate steps: both revisions answer golden rows at an engine's agent before any user meets the candidate."""

from __future__ import annotations

import math

from finetune_operator.api.adapterdeployment_status import AbortReason, CheckPhase, EvaluationResult
from finetune_operator.api.adapterdeployment_strategy import EvalGateStep, EvaluationSpec
from finetune_operator.core import rollout_adapters as adapters
from finetune_operator.core import rollout_endings as endings
from finetune_operator.core import rollout_stages as stages
from finetune_operator.core.rollout_facts import BASE, Evaluate, EvaluationFacts
from finetune_operator.core.rollout_turns import Turn

POLL_SECONDS = 2.0
RETRY_SECONDS = 10.0  # between two attempts, on average: what failed may be a download


def evaluate(turn: Turn, gate: EvalGateStep) -> tuple[Turn, bool]:
    """Whether the gate is passed. An evaluation that could not run is tried again within the deadline."""
    evaluation = next((e for e in turn.spec.evaluations if e.name == gate.eval_ref), None)
    if evaluation is None:
        message = f"evalGate.evalRef {gate.eval_ref!r} names none of spec.evaluations"
        return endings.abort(turn, AbortReason.EVAL_GATE_FAILED, message), False
    known = turn.status.evaluation
    if known is None or not known.id.startswith(_identity(turn)):
        return _record(turn, gate, attempt=1).again_in(0), False
    if known.phase is CheckPhase.SUCCESSFUL:  # the same run: steps were edited, and edited back
        return turn, True
    facts = turn.seen.evaluation
    if facts is None or facts.id != known.id or facts.state == "Missing":
        return _ask(turn, known, evaluation), False
    if facts.state == "Running":
        turn = turn.say(
            "Evaluating", f"evaluation {gate.eval_ref} is running: {facts.message or 'no rows yet'}"
        )
        return _wait(turn), False
    if facts.state == "Failed":
        return _again(turn, gate, known, f"evaluation {gate.eval_ref} could not run: {facts.message}"), False
    return _judge(turn, gate, known, facts)


def _identity(turn: Turn) -> str:
    """Everything that makes it this run: rollout, revisions and step."""
    status = turn.status
    began = int((status.rollout_start_time or turn.now).timestamp())
    return (
        f"{turn.seen.deployment.uid[:8]}-{status.candidate_revision}-{status.stable_revision or BASE}"
        f"-{began}-{status.current_step_hash}-{status.current_step_index}."
    )


def reference_name(turn: Turn) -> str:
    """Served name of what the candidate is compared with: the stable revision, or at first the base model."""
    return turn.stable.served_name if turn.stable is not None else turn.spec.base_model_ref.name


def _record(turn: Turn, gate: EvalGateStep, *, attempt: int) -> Turn:
    result = EvaluationResult(
        name=gate.eval_ref,
        id=f"{_identity(turn)}{attempt}",
        phase=CheckPhase.INCONCLUSIVE,
        message="not started yet" if attempt == 1 else (turn.note[1] if turn.note else None),
    )
    return turn.update(evaluation=result)


def _ask(turn: Turn, known: EvaluationResult, evaluation: EvaluationSpec) -> Turn:
    candidate = turn.candidate
    if candidate is None:
        return turn
    able = set(adapters.coverage(turn.seen, candidate).upstreams)
    if turn.stable is not None:
        able &= set(adapters.coverage(turn.seen, turn.stable).upstreams)
    agents = sorted(e.agent_url for e in turn.seen.engines if e.url in able and e.reachable)
    if not agents:
        return _wait(turn.say("EnginesNotReady", "no engine that answers has both revisions loaded"))
    order = Evaluate(agents[0], known.id, (candidate.served_name, reference_name(turn)), evaluation)
    return _wait(turn.act(order).say("Evaluating", f"evaluation {evaluation.name} starts at {agents[0]}"))


def _again(turn: Turn, gate: EvalGateStep, known: EvaluationResult, problem: str) -> Turn:
    """Another attempt under another id, after a while, until the deadline."""
    attempts = int(known.id.rpartition(".")[2])
    turn = _wait(turn.say("EvaluationFailed", problem))
    if not turn.underway or turn.elapsed(turn.status.last_progress_time) < RETRY_SECONDS * attempts:
        return turn
    return _record(turn, gate, attempt=attempts + 1)


def _wait(turn: Turn) -> Turn:
    return stages.within_deadline(turn.again_in(POLL_SECONDS), AbortReason.EVAL_GATE_FAILED)


def _judge(
    turn: Turn, gate: EvalGateStep, known: EvaluationResult, facts: EvaluationFacts
) -> tuple[Turn, bool]:
    candidate = facts.scores.get(turn.candidate.served_name if turn.candidate else "")
    stable = facts.scores.get(reference_name(turn))
    needed = [candidate] + ([stable] if gate.max_regression is not None else [])
    if any(score is None or not math.isfinite(score) for score in needed):
        return _again(
            turn, gate, known, f"evaluation {gate.eval_ref} brought no score: {facts.message}"
        ), False
    score, reference = candidate or 0.0, stable
    bars = []
    if gate.min_score is not None and score < gate.min_score:
        bars.append(f"below minScore {gate.min_score:g}")
    if gate.max_regression is not None and reference is not None and score < reference - gate.max_regression:
        bars.append(
            f"more than maxRegression {gate.max_regression:g} below {reference:.3f} of {reference_name(turn)}"
        )
    compared = f", {reference_name(turn)} {reference:.3f}" if reference is not None else ""
    message = f"{gate.eval_ref}: candidate {score:.3f}{compared} over {facts.rows} rows"
    result = known.model_copy(
        update={
            "phase": CheckPhase.FAILED if bars else CheckPhase.SUCCESSFUL,
            "candidate": score,
            "stable": reference,
            "rows": facts.rows,
            "message": f"{message}: {' and '.join(bars)}" if bars else message,
        }
    )
    turn = turn.update(evaluation=result)
    if bars:
        return endings.abort(turn, AbortReason.EVAL_GATE_FAILED, result.message or message), False
    return turn, True

"""The status for people: phase, reason, and one sentence with the numbers that matter now."""

from __future__ import annotations

from datetime import datetime

from finetune_operator.api.adapterdeployment_status import (
    AdapterDeploymentStatus,
    CheckKind,
    RolloutPhase,
    Stage,
)
from finetune_operator.core import conditions, texts
from finetune_operator.core import rollout_conditions as rollout
from finetune_operator.core import rollout_pauses as pauses
from finetune_operator.core import rollout_steps as steps
from finetune_operator.core.conditions import Claim
from finetune_operator.core.rollout_conditions import RolloutCondition
from finetune_operator.core.rollout_facts import Observed
from finetune_operator.core.rollout_turns import OVER, UNDERWAY, Turn, clock, engines


def traffic(turn: Turn) -> Turn:
    """What stops the clocks of steps, as of the facts and before anything is decided."""
    return _claimed(turn, [rollout.traffic_routed(turn), rollout.invalid_spec(turn)])


def sum_up(turn: Turn) -> Turn:
    """Everything that follows from the decided parts of the status."""
    turn = turn.update(
        observed_generation=turn.seen.deployment.generation,
        step=_step(turn),
    )
    turn = _claimed(turn, list(rollout.claims(turn)))
    reason, message = _story(turn)
    phase = _phase(turn)
    if turn.seen.deployment.problem is not None and turn.status.stage not in OVER:
        claim = rollout.invalid_spec(turn)
        reason, message = claim.reason, claim.message
        phase = _standing(turn.status) if phase is not RolloutPhase.DEGRADED else phase
    turn = turn.update(phase=phase, reason=reason, message=message[: texts.LONGEST])
    return _claimed(turn, _kstatus(turn.status))


def _kstatus(status: AdapterDeploymentStatus) -> list[Claim]:
    """Stalled: nothing goes on by itself. Degraded without a rollback heals, and goes on."""
    degraded = status.phase is RolloutPhase.DEGRADED
    rolled_back = degraded and status.abort is not None and status.stage is not Stage.ABORTING
    invalid = any((c.type, c.status) == (RolloutCondition.INVALID_SPEC, "True") for c in status.conditions)
    stalled = rolled_back or invalid
    return conditions.kstatus(
        reconciling=not stalled and status.phase is not RolloutPhase.HEALTHY,
        stalled=stalled,
        reason=status.reason or "",
        message=status.message or "",
    )


def _step(turn: Turn) -> str | None:
    """Of a spec that cannot be read the steps may be others than those that the rollout is in."""
    if turn.seen.deployment.problem is None:
        return steps.text_of(turn)
    return turn.status.step if turn.underway else None


def _standing(status: AdapterDeploymentStatus) -> RolloutPhase:
    """While the spec cannot be read: a rollout waits for somebody; without one, nobody knows what spec names."""
    if status.candidate_revision is not None and status.stage in UNDERWAY:
        return RolloutPhase.PAUSED
    return RolloutPhase.PENDING if status.stable_revision is None else RolloutPhase.DEGRADED


def _claimed(turn: Turn, claims: list[Claim]) -> Turn:
    generation = turn.seen.deployment.generation
    merged = conditions.merge(turn.status.conditions, claims, now=turn.now, generation=generation)
    return turn.update(conditions=merged)


def _phase(turn: Turn) -> RolloutPhase:
    status = turn.status
    if status.stage in OVER:
        return RolloutPhase.DEGRADED
    if not turn.first and rollout.available(turn).holds is False:
        return RolloutPhase.DEGRADED
    if turn.underway:
        return RolloutPhase.PAUSED if status.pause_conditions else RolloutPhase.PROGRESSING
    if turn.first:
        return RolloutPhase.PENDING
    if status.stage is Stage.INITIALIZING:
        return RolloutPhase.PROGRESSING
    loaded = next(c for c in status.conditions if c.type == RolloutCondition.ADAPTERS_LOADED)
    if loaded.status != "True" or status.abort is not None:
        return RolloutPhase.DEGRADED
    # Whoever waits for Healthy and then sends a request must not be too early at any router.
    return RolloutPhase.HEALTHY if turn.weights.verified else RolloutPhase.PROGRESSING


def _story(turn: Turn) -> tuple[str, str]:
    """One word and one sentence: the most urgent first."""
    status = turn.status
    if not turn.first:
        available = rollout.available(turn)
        if available.holds is False:
            return available.reason, available.message
    if status.abort is not None and not turn.underway:
        return str(status.abort.reason), status.abort.message
    if turn.underway:
        return _underway(turn)
    if turn.note is not None:
        return turn.note
    if status.stage in (Stage.FINALISING, Stage.SUCCEEDED):
        missing = next(c for c in status.conditions if c.type == RolloutCondition.ADAPTERS_LOADED)
        if missing.status == "False":
            return "AdapterMissing", missing.message
        return _serving(turn)
    return str(status.stage), f"stage {status.stage}"


def _serving(turn: Turn) -> tuple[str, str]:
    status, stable = turn.status, turn.stable
    leaving = [a for a in status.adapters if a.unload_at is not None]
    text = f"{status.stable_revision} serves everybody on {engines(stable.loaded_replicas if stable else 0)}"
    if leaving and leaving[0].unload_at is not None:
        text += f"; {leaving[0].revision} stays loaded until {clock(leaving[0].unload_at)}"
    return str(status.completion_status or "Serving"), text


def _underway(turn: Turn) -> tuple[str, str]:
    status = turn.status
    where = f"step {status.step}" if status.step else f"{status.stage} {status.candidate_revision}"
    holding = pauses.holding(turn)
    if turn.note is not None and not holding:
        return turn.note[0], f"{where}: {turn.note[1]}{_numbers(turn)}"
    if status.pause_conditions:
        pause = (holding or status.pause_conditions)[0]
        return str(pause.reason), f"{where}: {pause.message}{_numbers(turn)}"
    return str(status.stage), f"{where}{_numbers(turn)}"


def _numbers(turn: Turn) -> str:
    """Answers per side and the strongest evidence against the candidate, for example `: 212 stable and 70 candidate
    answers, errors e-value 0.4 of 100`."""
    guardrails = [c for c in turn.status.analysis if c.kind is CheckKind.GUARDRAIL and c.n is not None]
    if not turn.exposed or not guardrails:
        return ""
    worst = max(guardrails, key=lambda check: (check.e_value or 0.0) / (check.threshold or 1.0))
    n = worst.n
    text = f": {n.stable} stable and {n.candidate} candidate answers" if n else ""
    if worst.e_value is not None and worst.threshold is not None:
        text += f", {worst.name} e-value {worst.e_value:.2g} of {worst.threshold:g}"
    return text


# ---------------------------------------------------------------- specs that cannot be acted on


def unreadable(turn: Turn) -> AdapterDeploymentStatus:
    """What serves goes on as it is; nothing moves until the spec can be read, but by a hand that holds or takes
    back."""
    deployment = turn.seen.deployment
    message = f"{deployment.problem or 'the spec cannot be read'}; correct it, and until then everything stays as it is"
    return _invalid(turn.status, rollout.UNREADABLE, message, now=turn.now, generation=deployment.generation)


def alias_taken(seen: Observed, message: str, *, now: datetime) -> AdapterDeploymentStatus:
    deployment = seen.deployment
    return _invalid(deployment.status, "AliasConflict", message, now=now, generation=deployment.generation)


def _invalid(
    known: AdapterDeploymentStatus, reason: str, message: str, *, now: datetime, generation: int
) -> AdapterDeploymentStatus:
    phase = _standing(known)
    claims = [
        Claim(RolloutCondition.INVALID_SPEC, True, reason, message),
        Claim(RolloutCondition.PROMOTED, False, reason, message),
    ]
    if reason == "AliasConflict":
        phase = RolloutPhase.PENDING if known.stable_revision is None else RolloutPhase.DEGRADED
        claims.append(Claim(RolloutCondition.AVAILABLE, False, reason, message))
        claims.append(Claim(RolloutCondition.TRAFFIC_ROUTED, False, reason, message))
    elif phase is RolloutPhase.PAUSED:
        claims.append(Claim(RolloutCondition.PROGRESSING, False, reason, message))
        claims.append(Claim(RolloutCondition.PAUSED, True, reason, message))
    claims += conditions.kstatus(reconciling=False, stalled=True, reason=reason, message=message)
    return known.model_copy(
        update={
            "observed_generation": generation,
            "phase": phase,
            "reason": reason,
            "message": message[: texts.LONGEST],
            "conditions": conditions.merge(known.conditions, claims, now=now, generation=generation),
        }
    )

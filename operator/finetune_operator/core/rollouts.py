"""What an AdapterDeployment is in, and what to do next: `decide` turns facts and a time into a plan.

The order of the rules is the order of urgency: harm goes back before anything else is looked at, then people are
obeyed, then the spec is followed, then the stage goes on by one transition. Each transition is stored before anything
follows from it, all times are in the status, and a pass that is repeated gives the same plan; so the operator may be
killed between any two instructions.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from finetune_operator.api.adapterdeployment import AdapterDeploymentSpec
from finetune_operator.api.adapterdeployment_status import (
    AbortReason,
    LoadedAdapter,
    Stage,
)
from finetune_operator.api.adapterdeployment_strategy import WebhookType
from finetune_operator.api.adapterdeployment_traffic import AdapterReference, BaseModelReference
from finetune_operator.api.routes import Route
from finetune_operator.core import rollout_adapters as adapters
from finetune_operator.core import rollout_checks as checks
from finetune_operator.core import rollout_endings as endings
from finetune_operator.core import rollout_events as events
from finetune_operator.core import rollout_pauses as pauses
from finetune_operator.core import rollout_routes as routes
from finetune_operator.core import rollout_stages as stages
from finetune_operator.core import rollout_statuses as statuses
from finetune_operator.core import rollout_steps as steps
from finetune_operator.core import rollout_verbs as verbs
from finetune_operator.core.rollout_facts import AskWebhooks, Observed, Plan, Withdrawal
from finetune_operator.core.rollout_turns import Turn, clock

# What has a default has it; nobody may ask for the rest.
NO_SPEC = AdapterDeploymentSpec.model_construct(
    base_model_ref=BaseModelReference.model_construct(name=""), adapter=AdapterReference.model_construct()
)
# Engines tell of nothing by themselves: an adapter that one lost is noticed within this time.
WATCH_SECONDS = 15.0


def decide(seen: Observed, *, now: datetime) -> Plan:
    """The next step of a deployment. Pure: the same facts give the same plan."""
    deployment = replace(seen.deployment, status=pauses.not_ahead(seen.deployment.status, now))
    seen = replace(seen, deployment=deployment)
    # No route; whatever is left in the engines has no owner then, see reconcile.orphans.
    if deployment.deleting:
        return Plan(status=deployment.status)
    if deployment.spec is None:
        return _announced(seen, _hold(seen, now), now)
    if seen.alias_problem is not None:
        status = statuses.alias_taken(seen, seen.alias_problem, now=now)
        return _announced(seen, Plan(status=status, requeue_after=WATCH_SECONDS), now)
    turn = _look(Turn(seen, deployment.spec, now, deployment.status))
    turn = _go_on(turn) if deployment.problem is None else _stand_still(turn)
    turn = adapters.settle(turn)
    turn = statuses.sum_up(turn)
    return _announced(seen, _plan(turn, deployment.spec), now)


def withdraw(seen: Observed, *, now: datetime) -> tuple[Withdrawal, Route] | None:
    """The route without a candidate that is proved to do harm, for when the status cannot be written; None where
    nothing is proved. Nothing else may be done before it is recorded: whatever needs a record waits for it.
    """
    spec = seen.deployment.spec
    if spec is None or seen.deployment.deleting or seen.alias_problem is not None:
        return None
    turn = checks.refresh(Turn(seen, spec, now, seen.deployment.status))
    harm = checks.harm(turn)
    route = None if harm is None else routes.build(endings.abort(turn, harm.reason, harm.message))
    if harm is None or route is None:
        return None
    text = f"{harm.message}; found at {clock(now)}, when the status could not be written"
    found = Withdrawal(
        turn.status.candidate_revision or "", turn.status.rollout_start_time, harm.reason, text
    )
    return found, route


# ---------------------------------------------------------------- facts into the status


def _look(turn: Turn) -> Turn:
    """What engines, routers and evidence tell, before anything is decided."""
    turn = adapters.refresh(turn)
    turn = _confirm_weights(turn)
    turn = _notice_loss(turn)
    turn = checks.refresh(turn)
    return statuses.traffic(turn)


def _confirm_weights(turn: Turn) -> Turn:
    """Weights count once every router applied a snapshot with them, and no longer when the newest one has others (the
    candidate may be on no engine). A router that is behind a later snapshot has them still."""
    weights, routing = turn.status.weights, turn.seen.routing
    if weights is None:
        return turn
    carried = routes.carries(turn)
    if carried and weights.verified:
        return turn
    version, verified = (routing.version, routing.verified) if carried else (None, False)
    known = weights.pending_since if (weights.version is None) == (version is None) else None
    pending = None if verified else known or turn.now
    update = {"version": version, "verified": verified, "pending_since": pending}
    return turn.update(weights=weights.model_copy(update=update))


def _notice_loss(turn: Turn) -> Turn:
    """The deadline for an adapter that an engine lost counts from when that was noticed."""
    before = {adapter.revision: adapter for adapter in turn.before.adapters}
    for adapter in adapters.needed(turn):
        known = before.get(adapter.revision)
        was_complete = known is not None and known.loaded_replicas >= known.desired_replicas > 0
        if was_complete and adapters.coverage(turn.seen, adapter).lacking:
            return turn.update(last_progress_time=turn.now)
    return turn


# ---------------------------------------------------------------- decisions


def _go_on(turn: Turn) -> Turn:
    """At most one transition."""
    turn, changed = _urgent(turn)
    return turn if changed else _follow(turn)


def _urgent(turn: Turn) -> tuple[Turn, bool]:
    """What comes before the spec: harm and people. Whether that moved anything."""
    harm = checks.harm(turn)
    if harm is not None:
        turn = endings.abort(turn, harm.reason, harm.message)
    asked = _rollback_answers(turn)
    if turn.exposed and asked:
        turn = endings.abort(turn, AbortReason.ROLLBACK_WEBHOOK, asked)
    obeyed = verbs.obey(turn)
    changed = obeyed.status.stage is not turn.status.stage or _position(obeyed) != _position(turn)
    turn = pauses.shift_clocks(checks.refresh_pauses(pauses.follow_spec(obeyed)))
    return turn, changed or harm is not None


def _stand_still(turn: Turn) -> Turn:
    """The spec cannot be read, and an earlier or a part of it is known: nobody is moved towards the candidate, and the
    guardrails stay armed."""
    turn, changed = _urgent(turn)
    if not changed and turn.status.stage in (Stage.ABORTING, Stage.FINALISING):
        turn = _stage(turn)
    return turn


def _hold(seen: Observed, now: datetime) -> Plan:
    """Nothing is known of a vital part of the spec: all stays as it is published, but people who hold or take back are
    obeyed."""
    turn = verbs.obey(_confirm_weights(Turn(seen, NO_SPEC, now, seen.deployment.status)))
    if turn.status.stage is Stage.ABORTING:
        turn = stages.aborting(turn)
    return Plan(
        status=statuses.unreadable(turn),
        route=routes.frozen(turn),
        actions=turn.actions,
        requeue_after=turn.again_in(WATCH_SECONDS).look_again,
    )


def _position(turn: Turn) -> tuple[object, ...]:
    status = turn.status
    return (status.candidate_revision, status.current_step_index, status.rollout_start_time, status.weights)


def _rollback_answers(turn: Turn) -> str:
    """What the rollback webhooks that want the candidate back say."""
    hooks = [hook.key for hook in turn.spec.webhooks if hook.type is WebhookType.ROLLBACK]
    answers = {name: turn.seen.webhooks[name] for name in hooks if name in turn.seen.webhooks}
    texts = [f"webhook {name} asks for it: {a.message}" for name, a in answers.items() if a.accepted]
    return "; ".join(texts)


def _follow(turn: Turn) -> Turn:
    """Follow the spec: begin, supersede, return, or let the rollout under way go on."""
    status, artifact = turn.status, turn.seen.wanted.artifact
    target = artifact.revision if artifact is not None else _still_named(turn)
    by_hand = turn.underway and status.abort is not None  # `rollback`: not where spec points
    if target is None:
        return _stage(turn) if by_hand else _without_artifact(turn)
    if artifact is not None:
        turn = _moved(turn, artifact.revision, artifact.uri)
    barred = status.abort is not None and status.abort.revision == target
    if turn.underway and (target == status.candidate_revision or barred):
        return _stage(turn)
    if barred and target != status.stable_revision:  # serves again after a second return by hand
        return _stage(turn)
    if target == status.stable_revision:
        if turn.underway:
            return endings.roll_back(turn)
        turn = _stage(endings.settled(turn))
        return turn if artifact is not None else _say_vanished(turn)
    found = artifact or endings.artifact_of(turn, target)
    return endings.begin(turn, found) if found is not None else _without_artifact(turn)


def _still_named(turn: Turn) -> str | None:
    """The known revision that spec.adapter means, when its artifact cannot be seen: what is loaded goes on serving."""
    reference = turn.spec.adapter

    def named(adapter: LoadedAdapter | None) -> bool:
        if adapter is None:
            return False
        if reference.fine_tune_job_ref is not None:
            return adapter.fine_tune_job == reference.fine_tune_job_ref.name
        return reference.source is not None and adapter.digest == reference.source.digest

    for adapter in (turn.candidate, turn.stable):
        if adapter is not None and named(adapter):
            return adapter.revision
    aborted = turn.status.abort
    if aborted is None:
        return None
    entry = next((e for e in turn.status.history if e.revision == aborted.revision), None)
    job = reference.fine_tune_job_ref
    same = entry is not None and job is not None and entry.fine_tune_job == job.name
    return aborted.revision if same else None


def _say_vanished(turn: Turn) -> Turn:
    wanted = turn.seen.wanted
    text = f"{turn.status.stable_revision} goes on serving; {wanted.message or 'its artifact cannot be seen'}"
    return turn.say(wanted.reason or "ArtifactNotFound", text)


def _moved(turn: Turn, revision: str, uri: str) -> Turn:
    """The same artifact in another place: later loads take it from there."""
    adapter = turn.adapter(revision)
    if adapter is None or adapter.uri == uri:
        return turn
    return turn.with_adapter(adapter.model_copy(update={"uri": uri}))


def _without_artifact(turn: Turn) -> Turn:
    """spec names something that is not there (yet): nobody is moved to it, and nobody to what spec no longer names."""
    if turn.underway:
        turn = endings.displace(turn, "spec.adapter names another one")
    turn = endings.forget_aborted(turn)
    wanted = turn.seen.wanted
    if turn.status.stage is not Stage.INITIALIZING:
        turn = turn.stage(Stage.INITIALIZING)
    return turn.say(wanted.reason or "ArtifactNotFound", wanted.message or "spec.adapter names nothing yet")


def _stage(turn: Turn) -> Turn:
    if turn.underway and steps.edited(turn):
        return steps.restart(turn)
    match turn.status.stage:
        case Stage.LOADING:
            turn, ready = stages.loading(turn)
            return steps.begin(turn) if ready else turn
        case Stage.VALIDATING | Stage.SHADOWING | Stage.CANARY:
            return steps.run(turn)
        case Stage.WAITING_PROMOTION:
            return stages.waiting_promotion(turn)
        case Stage.PROMOTING:
            return steps.promoting(turn)
        case Stage.ABORTING:
            return stages.aborting(turn)
        case Stage.FINALISING:
            return stages.finalising(turn)
        case Stage.FAILED | Stage.SUCCEEDED:
            return turn
        case _:
            return turn.stage(Stage.FINALISING)


# ---------------------------------------------------------------- the plan


def _plan(turn: Turn, spec: AdapterDeploymentSpec) -> Plan:
    if turn.exposed and _has_rollback_hooks(spec) and not _rollback_heard(turn):
        turn = turn.act(AskWebhooks(WebhookType.ROLLBACK))
    turn = turn.again_in(checks.interval(turn) if turn.exposed else WATCH_SECONDS)
    return Plan(
        status=turn.status,
        route=routes.build(turn),
        actions=turn.actions,
        measure=checks.measure_due(turn),
        collect=turn.underway and not turn.first,
        requeue_after=turn.look_again,
    )


def _has_rollback_hooks(spec: AdapterDeploymentSpec) -> bool:
    return any(hook.type is WebhookType.ROLLBACK for hook in spec.webhooks)


def _rollback_heard(turn: Turn) -> bool:
    """They were asked for this pass, so the next question is due an interval later."""
    return any(h.key in turn.seen.webhooks for h in turn.spec.webhooks if h.type is WebhookType.ROLLBACK)


def _announced(seen: Observed, plan: Plan, now: datetime) -> Plan:
    """With what the pass changed in the status's outbox, so that a repeated pass announces nothing anew."""
    fresh = events.announce(seen.deployment, plan.status, now=now)
    waiting = events.outbox(seen.deployment.status, fresh, told=seen.told)
    return replace(
        plan, status=plan.status.model_copy(update={"announcements": waiting}), announcements=fresh
    )

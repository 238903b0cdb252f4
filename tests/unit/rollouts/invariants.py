"""What must hold in every pass of every story."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune_operator.api.adapterdeployment_status import PauseReason, Stage
from finetune_operator.core import rollout_pauses
from finetune_operator.core.rollout_facts import Observed, Plan

if TYPE_CHECKING:
    from tests.unit.rollouts.world import World

ON_THE_WAY = {
    Stage.LOADING,
    Stage.VALIDATING,
    Stage.SHADOWING,
    Stage.CANARY,
    Stage.WAITING_PROMOTION,
    Stage.PROMOTING,
}


def check(world: World, seen: Observed, plan: Plan) -> None:
    _targets_are_loaded(world, seen, plan)
    _weight_rises_only_on_evidence(seen, plan)
    _abort_is_one_way(seen, plan)
    _stable_changes_only_by_promotion(seen, plan)
    _clocks_do_not_restart(world, seen, plan)
    _words_are_there(plan)


def _targets_are_loaded(world: World, seen: Observed, plan: Plan) -> None:
    """Every engine of a route's target has the adapter, by its own word; a silent one may stay where it was."""
    if plan.route is None:
        return
    before = seen.routing.published
    kept = {
        (target.served_name, url)
        for target in ((before.stable, before.candidate) if before else ())
        if target
        for url in target.upstreams
    }
    engines = {engine.url: engine for engine in seen.engines}
    for target in (plan.route.stable, plan.route.candidate):
        for url in target.upstreams if target else ():
            assert target is not None
            engine = engines.get(url)
            if engine is None:
                assert (target.served_name, url) in kept, f"{url} is unknown and new in the route"
                others = engines.keys() & set(target.upstreams)
                assert not others, f"{url} is routed to and unknown, and {others} have {target.served_name}"
                continue
            told = engine.adapters.get(target.served_name)
            if engine.reachable:
                assert told is not None
                assert told.state == "Loaded", (
                    f"{url} is sent requests for {target.served_name}, {told.state}"
                )
            else:
                assert (target.served_name, url) in kept, f"{url} is silent and new in the route"


def _weight_rises_only_on_evidence(seen: Observed, plan: Plan) -> None:
    old, new = seen.deployment.status, plan.status
    before = old.weights.candidate if old.weights else 0
    after = new.weights.candidate if new.weights else 0
    if after <= before:
        return
    assert old.stage in ON_THE_WAY
    assert new.evidence_missing_since is None, "the weight rises without evidence"
    assert new.weights is not None
    assert not new.weights.verified, "a new weight is not verified yet"
    assert old.weights is not None
    published = seen.routing.published
    targets = (published.stable, published.candidate) if published else ()
    routed = {url for target in targets if target for url in target.upstreams}
    if new.current_step_hash is not None:  # what served before, and promote-full, wait for less
        silent = [e.url for e in seen.engines if e.url in routed and not e.reachable]
        assert not silent, f"the weight rises while nobody knows what {silent} have"
    said = seen.deployment.action or ""
    if not said.startswith("promote"):
        reasons = [p.reason for p in new.pause_conditions if p.reason not in rollout_pauses.OWN]
        assert not reasons, f"the weight rises during {reasons}"
        confirmed = plan.status.conditions
        assert confirmed
        assert old.weights.verified or _verified_now(seen), "the weight before was not verified"
    candidate = next(a for a in new.adapters if a.revision == new.candidate_revision)
    assert candidate.loaded_replicas == candidate.desired_replicas > 0, "an engine lacks the candidate"


def _verified_now(seen: Observed) -> bool:
    return seen.routing.verified


def _abort_is_one_way(seen: Observed, plan: Plan) -> None:
    old, new = seen.deployment.status, plan.status
    if old.stage not in (Stage.ABORTING, Stage.FAILED) or old.abort is None:
        return
    if new.rollout_start_time == old.rollout_start_time and new.weights is not None:
        assert new.weights.candidate == 0
        assert new.weights.mirror == 0
        assert plan.route is None or plan.route.candidate is None
    if new.candidate_revision == old.abort.revision and new.stage in ON_THE_WAY:
        said = seen.deployment.action or ""
        assert said.startswith(("retry", "rollback")), "an aborted revision came back by itself"


def _stable_changes_only_by_promotion(seen: Observed, plan: Plan) -> None:
    old, new = seen.deployment.status, plan.status
    if new.stable_revision == old.stable_revision:
        return
    assert new.stable_revision == old.candidate_revision
    assert old.stage is Stage.PROMOTING
    if old.stable_revision is not None:
        assert old.weights is not None
        assert old.weights.candidate == 100, "the pointer flips before everybody has the candidate"
    assert new.history[:1] or (seen.deployment.spec and seen.deployment.spec.revision_history_limit == 0)


def _clocks_do_not_restart(world: World, seen: Observed, plan: Plan) -> None:
    """A step's begin never moves while the same step goes on, apart from the time that did not count."""
    now = world.now.replace(microsecond=0)
    old, new = rollout_pauses.not_ahead(seen.deployment.status, now), plan.status
    same = (old.rollout_start_time, old.current_step_index, old.current_step_hash) == (
        new.rollout_start_time,
        new.current_step_index,
        new.current_step_hash,
    )
    if not same or old.step_start_time is None or new.stage not in ON_THE_WAY:
        return
    if new.step_start_time == old.step_start_time:
        return
    if (seen.deployment.action or "").startswith(("resume", "promote")):
        return
    stopped = rollout_pauses.stopped_since(old)
    assert stopped is not None, "a clock was moved without a reason"
    assert new.step_start_time is not None
    assert new.step_start_time >= old.step_start_time


def _words_are_there(plan: Plan) -> None:
    status = plan.status
    assert status.phase
    assert status.reason
    assert status.message
    reasons = [pause.reason for pause in status.pause_conditions]
    assert len(set(reasons)) == len(reasons)
    if PauseReason.USER_PAUSE in reasons:
        assert status.stage in ON_THE_WAY
    assert len({a.revision for a in status.adapters}) == len(status.adapters)
    assert len({c.type for c in status.conditions}) == len(status.conditions)

"""What must hold in every pass over a job, whatever happens around it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from finetune_operator.api.finetunejob import UNLIMITED, Phase, Retries
from finetune_operator.core import jobs, policies
from finetune_operator.core.facts import CreateRayJob, DeleteRayJob, Observed, Plan

if TYPE_CHECKING:
    from tests.unit.operator.world import World


def check(world: World, seen: Observed, plan: Plan) -> None:
    _one_attempt_at_a_time(world, plan)
    _terminal_is_final(seen, plan)
    _recorded_before_done(seen, plan)
    _budgets_hold(seen, plan)
    _nothing_goes_backwards(seen, plan)
    _success_is_committed(world, plan)
    _deleted_rayjobs_were_given_up(seen, plan)
    _words_are_there(plan)


def _one_attempt_at_a_time(world: World, plan: Plan) -> None:
    """When an attempt is created, no pod of another one is left, in truth and not only as it was seen."""
    for action in plan.actions:
        if isinstance(action, CreateRayJob):
            others = [name for name, pod in world.pods.items() if pod.attempt != action.attempt]
            assert not others, f"{action.name} would run beside {others}"
    training = {pod.attempt for pod in world.pods.values() if not pod.inspect}
    assert len(training) <= 1, f"attempts {training} run at once"


def _terminal_is_final(seen: Observed, plan: Plan) -> None:
    if jobs.is_finished(seen.job.status):
        assert plan.status == seen.job.status
        assert not any(isinstance(action, CreateRayJob) for action in plan.actions)
        assert not plan.events


def _recorded_before_done(seen: Observed, plan: Plan) -> None:
    for action in plan.actions:
        if isinstance(action, CreateRayJob):
            recorded = seen.job.status.attempts[-1]
            assert action.name in (recorded.ray_job, recorded.inspection)


def _budgets_hold(seen: Observed, plan: Plan) -> None:
    old, new = seen.job.status.retries or Retries(), plan.status.retries or Retries()
    assert seen.job.spec is not None
    retry = seen.job.spec.retry
    for before, after, limit in (
        (old.user, new.user, retry.max_user_retries),
        (old.infrastructure, new.infrastructure, retry.max_infra_retries),
        (old.preemption, new.preemption, retry.preemptions),
    ):
        assert after in (before, before + 1)
        if after > before and limit != UNLIMITED:
            assert after <= int(limit), "a budget is overdrawn"
    attempts = plan.status.attempts
    if len(attempts) > 1 and attempts[-1].number > seen.job.status.attempts[-1].number:
        assert attempts[-2].error_class is not None
        assert policies.BUDGETS[attempts[-2].error_class] is not policies.Budget.NONE


def _nothing_goes_backwards(seen: Observed, plan: Plan) -> None:
    old, new = seen.job.status, plan.status
    before = {attempt.number: attempt for attempt in old.attempts}
    after = {attempt.number: attempt for attempt in new.attempts}
    assert max(after, default=0) in (max(before, default=0), max(before, default=0) + 1)
    assert len(new.attempts) <= 10
    for number in before.keys() & after.keys():
        assert after[number].start_time == before[number].start_time
        if before[number].end_time is not None:
            assert after[number].end_time == before[number].end_time
    if old.start_time is not None:
        assert new.start_time == old.start_time
    assert (new.suspended_seconds or 0) >= (old.suspended_seconds or 0)
    if len(after) and max(after) > max(before, default=0) and before:
        assert before[max(before)].end_time is not None, "the next attempt was recorded before this one ended"


def _success_is_committed(world: World, plan: Plan) -> None:
    if plan.status.phase is Phase.SUCCEEDED:
        assert world.committed
        assert plan.status.artifact is not None


def _deleted_rayjobs_were_given_up(seen: Observed, plan: Plan) -> None:
    for action in plan.actions:
        if isinstance(action, DeleteRayJob):
            assert seen.job.status.attempts[-1].end_time is not None, "a live attempt is deleted"


def _words_are_there(plan: Plan) -> None:
    status = plan.status
    assert status.phase
    assert status.reason
    assert status.message
    kinds = [condition.type for condition in status.conditions]
    assert len(set(kinds)) == len(kinds)
    true = {condition.type for condition in status.conditions if condition.status == "True"}
    final = {"Succeeded": {"Complete"}, "Failed": {"Failed"}, "Cancelled": {"Failed"}}.get(
        status.phase, set()
    )
    assert true & {"Complete", "Failed"} == final
    assert ("Suspended" in true) == (status.phase is Phase.SUSPENDED) or "Stopping" in status.reason
    if status.phase is Phase.RUNNING:
        assert "Training" in true or status.reason == "Stopping"

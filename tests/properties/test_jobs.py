"""Anything may happen to a job at any time: the invariants hold in every pass, and a healed job comes to its end."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_operator.api.finetunejob import Phase
from finetune_operator.core import jobs
from tests.unit.operator import invariants
from tests.unit.operator.world import World

FAULTS = ["silent", "1", "65", "74", "75", "80", "81", "82", "83", "84", "silent"]
HAPPENINGS = st.one_of(
    st.tuples(st.just("wait"), st.sampled_from([1, 5, 20, 70])),
    st.tuples(st.just("fault"), st.sampled_from(FAULTS)),
    st.tuples(st.just("next fault"), st.sampled_from(FAULTS)),
    st.tuples(st.just("head lost"), st.just(0)),
    st.tuples(st.just("rayjob deleted"), st.just(0)),
    st.tuples(st.just("rayjob invalid"), st.just(0)),
    st.tuples(st.just("rayjob failed but runs"), st.just(0)),
    st.tuples(st.just("stopped"), st.just(0)),
    st.tuples(st.just("node away"), st.booleans()),
    st.tuples(st.just("kuberay"), st.booleans()),
    st.tuples(st.just("reports"), st.booleans()),
    st.tuples(st.just("quota"), st.booleans()),
    st.tuples(st.just("hold"), st.booleans()),
    st.tuples(st.just("operator"), st.sampled_from(["before", "between"])),
    st.tuples(st.just("clock"), st.sampled_from([3600, -3600, 0])),
    st.tuples(st.just("suspend"), st.booleans()),
    st.tuples(st.just("cancel"), st.just(0)),
    st.tuples(st.just("retries"), st.integers(0, 3)),
    st.tuples(st.just("deadline"), st.sampled_from([60, 10_000])),
)


def happen(world: World, what: str, how: Any) -> None:
    ray = world.current
    match what:
        case "wait":
            world.run(how)
        case "fault" if ray is not None:
            ray.fault = how
        case "next fault":
            world.next_fault = how
        case "head lost" if ray is not None and ray.facts.deployment_status == "Running":
            world.pods.pop(f"{ray.facts.name}-head", None)
            if not ray.facts.is_over:
                world.change(
                    ray, deployment_status="Failed", reason="SubmissionFailed", message="BackoffLimitExceeded"
                )
        case "rayjob deleted" if ray is not None:
            world.change(ray, deleting_since=world.now)
        case "rayjob invalid" if ray is not None and ray.facts.job_status == "RUNNING":
            world.change(ray, deployment_status="ValidationFailed", message="someone edited it")
        case "rayjob failed but runs" if ray is not None and ray.facts.deployment_status == "Running":
            world.change(ray, deployment_status="Failed", reason="SubmissionFailed", message="submitter died")
        case "stopped" if ray is not None and ray.facts.job_status == "RUNNING":
            world.change(ray, deployment_status="Complete", job_status="STOPPED")
        case "node away":
            for pod in world.pods.values():
                pod.node_away = how
        case "kuberay":
            world.kuberay_up = how
        case "reports":
            world.listening = how
        case "quota":
            world.quota = how
        case "hold":
            world.held = how
            if ray is not None and not ray.facts.is_over:
                world.change(ray, suspended=how, queue="q")
        case "operator":
            world.killed_at = how
        case "clock":  # whoever starts next has it from its machine
            world.wall = timedelta(seconds=how)
        case "suspend" if world.job is not None:
            world.edit(suspend=how)
        case "cancel" if world.job is not None:
            world.act("cancel/1")
        case "retries" if world.job is not None:
            world.edit(retry={"maxInfraRetries": how, "preemptions": how})
        case "deadline" if world.job is not None:
            world.edit(deadlines={"totalSeconds": how})
    world.run(2)


def heal(world: World) -> None:
    """Everything works, nobody holds anything, and there is time enough."""
    world.kuberay_up = world.listening = True
    world.quota = world.held = False
    world.killed_at = world.next_fault = None
    for pod in world.pods.values():
        pod.node_away = False
    for ray in world.rayjobs.values():
        if ray.facts.suspended:
            world.change(ray, suspended=False)
    world.edit(suspend=False, deadlines={"stallSeconds": 60})
    for _ in range(600):  # a step back of an hour delays the end by an hour
        if jobs.is_finished(world.status):
            break
        world.run(10)
    world.run(90)  # what is left of it goes


ALONE = [
    *(("fault", code) for code in ("1", "74", "75", "80", "81", "83", "84", "silent")),
    ("head lost", 0),
    ("rayjob deleted", 0),
    ("rayjob invalid", 0),
    ("rayjob failed but runs", 0),
    ("node away", True),
    ("kuberay", False),
    ("reports", False),
    ("hold", True),
    ("operator", "before"),
    ("operator", "between"),
    ("suspend", True),
    ("wait", 70),
]


@pytest.mark.parametrize("head_start", [3, 12, 20, 35])
@pytest.mark.parametrize("what", ALONE, ids=str)
def test_one_mishap_never_costs_the_job(what: tuple[str, Any], head_start: int) -> None:
    world = World({"retry": {"backoffSeconds": {"min": 2, "max": 10}}}, check=invariants.check)
    world.run(head_start)
    happen(world, *what)
    heal(world)
    assert world.status.phase is Phase.SUCCEEDED, f"{world.status.reason}: {world.status.message}"
    assert not world.pods


def test_work_lost_is_at_most_what_was_done_since_the_last_checkpoint() -> None:
    world = World({"retry": {"backoffSeconds": {"min": 0, "max": 0}}}, check=invariants.check)
    world.run(30)
    happen(world, "head lost", 0)
    heal(world)
    first, second = world.status.attempts
    assert first.last_step is not None
    assert second.resumed_from_step == first.last_step // 10 * 10
    assert first.lost_steps == first.last_step % 10


@settings(max_examples=120, deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(HAPPENINGS, min_size=2, max_size=14), st.integers(0, 25))
def test_whatever_happens_the_invariants_hold_and_a_healed_job_comes_to_its_end(
    story: list[tuple[str, Any]], head_start: int
) -> None:
    world = World({"retry": {"backoffSeconds": {"min": 2, "max": 10}}}, check=invariants.check)
    world.run(head_start)
    for what, how in story:
        happen(world, what, how)
    heal(world)
    status = world.status
    assert jobs.is_finished(status), f"{status.phase} {status.reason}: {status.message}"
    assert not world.pods, "pods are left"
    assert all(ray.facts.is_over for ray in world.rayjobs.values()), "a RayJob is left running"
    harmful = {"stopped", "cancel", "deadline", "retries"}
    deadly = {("fault", "65"), ("fault", "82"), ("next fault", "65"), ("next fault", "82"), ("fault", "80"),
              ("next fault", "80"), ("fault", "81"), ("next fault", "81")}  # fmt: skip
    infra = [what for what, how in story if what not in ("wait", "suspend", "operator", "reports", "hold")]
    if not harmful & {what for what, _ in story} and not deadly & set(story) and len(infra) <= 3:
        assert status.phase is Phase.SUCCEEDED, f"{status.reason}: {status.message}"

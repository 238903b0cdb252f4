"""Anything may happen at any time: the invariants hold in every pass, and a healed world comes to rest.

A failure prints the shortest sequence of happenings that hypothesis found, and the blob that repeats it.
"""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from finetune_operator.api.adapterdeployment_status import Stage
from finetune_operator.core.rollout_facts import Wanted
from tests.unit.rollouts.engines import SimulatedEngine
from tests.unit.rollouts.world import World, artifact, revision, serving

LETTERS = "abc"
STEPS: list[list[dict[str, Any]]] = [
    [{"setWeight": 5}, {"pause": {"duration": "20s"}}, {"setWeight": 50}, {"analysis": {}}],
    [{"setMirror": {"percent": 10, "duration": "20s"}}, {"setWeight": 20}, {"approval": {"timeout": "1m"}}],
    [{"setWeight": 100}, {"setWeight": 10}, {"pause": {"duration": "10s"}}],
    [{"setWeight": 20}, {"evalGate": {"evalRef": "golden", "minScore": 0.5}}, {"setWeight": 50}],
    [],
]
VERBS = ["promote", "promote-full", "abort", "pause", "resume", "retry", "rollback", "nonsense"]
DEATHS = ["status", "route", "action", ""]

happenings = st.one_of(
    st.tuples(st.just("wait"), st.sampled_from([1, 10, 40, 90])),
    st.tuples(st.just("deploy"), st.sampled_from(LETTERS)),
    st.tuples(st.just("say"), st.sampled_from(VERBS)),
    st.tuples(st.just("bad"), st.sampled_from(LETTERS)),
    st.tuples(st.just("evidence"), st.sampled_from(["fine", "missing", "nan", "late"])),
    st.tuples(st.just("alarm"), st.booleans()),
    st.tuples(st.just("restart"), st.integers(0, 1)),
    st.tuples(st.just("replace"), st.integers(0, 1)),
    st.tuples(st.just("silence"), st.integers(0, 1)),
    st.tuples(st.just("refuse"), st.sampled_from(["DownloadFailed", "IncompatibleBase", "LoadFailed"])),
    st.tuples(st.just("engine"), st.booleans()),
    st.tuples(st.just("router"), st.integers(0, 1)),
    st.tuples(st.just("steps"), st.integers(0, len(STEPS) - 1)),
    st.tuples(st.just("paused"), st.booleans()),
    st.tuples(st.just("vanish"), st.booleans()),
    st.tuples(st.just("evaluations fail"), st.integers(0, 3)),
    st.tuples(st.just("death"), st.sampled_from(DEATHS)),
)


def happen(world: World, what: str, how: Any) -> None:
    match what:
        case "wait":
            world.run(how)
        case "deploy":
            world.deploy(how)
        case "say":
            world.say(f"{how}/{len(world.plans):08x}")
        case "bad":
            world.evidence.bad ^= {revision(how)}
        case "evidence":
            world.evidence.mode = how
        case "alarm":
            world.evidence.skewed = how
        case "restart":
            world.engines[how].restart(world.now)
        case "replace":
            world.engines[how].replace()
        case "silence":
            world.engines[how].reachable = not world.engines[how].reachable
        case "refuse":
            world.engines[0].refusals = {f"bot--{revision('b')}": how}
        case "engine":
            world.engines = world.engines[:2]
            if how:
                world.engines.append(SimulatedEngine("http://e3:8000", load_seconds=20))
        case "router":
            world.routing.routers[how].reachable = not world.routing.routers[how].reachable
        case "steps":
            world.edit(lambda spec: spec["strategy"]["canary"].update(steps=STEPS[how]))
        case "paused":
            world.edit(lambda spec: spec.update(paused=how))
        case "vanish":
            assert world.spec is not None
            job = world.spec.adapter.fine_tune_job_ref
            letter = job.name[-1] if job else "a"
            gone = Wanted(reason="FineTuneJobNotFound", message="no such job")
            world.wanted = gone if how else Wanted(artifact=artifact(letter))
        case "evaluations fail":
            world.evaluation_fails = how
        case "death":
            points = iter(range(2))
            world.killed = lambda point: (
                bool(how) and point.startswith(how) and next(points, None) is not None
            )
    world.run(3)


def heal(world: World) -> None:
    """Everything works again, nobody holds anything, and the candidate is a good one."""
    world.killed = lambda point: False
    world.evidence.mode, world.evidence.bad, world.evidence.skewed = "fine", set(), False
    world.engines = world.engines[:2]
    for engine in world.engines:
        engine.reachable, engine.refusals = True, {}
    for router in world.routing.routers:
        router.reachable = True
    happen(world, "vanish", False)
    world.edit(lambda spec: spec.update(paused=False))
    world.run(60)
    if any(pause.reason in ("UserPause", "SampleRatioMismatch") for pause in world.status.pause_conditions):
        world.say("resume/0000abcd")
    world.run(400)


@settings(
    max_examples=60,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
    derandomize=False,
)
@given(st.lists(happenings, min_size=3, max_size=14))
def test_whatever_happens_the_invariants_hold_and_a_healed_world_comes_to_rest(
    story: list[tuple[str, Any]],
) -> None:
    canary = {"scaleDownDelaySeconds": 20, "abortScaleDownDelaySeconds": 5, "maxStepDuration": "1m"}
    objectives = {"objectives": [{"name": "helpful", "metric": "helpful", "minSamplesPerArm": 20}]}
    evaluations = [{"name": "golden", "uri": "file:///golden.jsonl"}]
    world = serving(
        steps=STEPS[0],
        canary=canary,
        analysis=objectives,
        evaluations=evaluations,
        progressDeadlineSeconds=60,
    )
    for what, how in story:
        happen(world, what, how)
    heal(world)
    status = world.status
    assert status.stage in (Stage.SUCCEEDED, Stage.FAILED), f"{status.stage}: {status.message}"
    assert status.stable_revision is not None
    assert world.everybody_gets() == status.stable_revision, status.message
    assert [adapter.revision for adapter in status.adapters] == [status.stable_revision]
    for engine in world.engines:
        assert set(engine.held) == {f"bot--{status.stable_revision}"}
    wanted = world.wanted.artifact
    assert wanted is not None
    assert (status.stable_revision == wanted.revision) is (status.abort is None)
    if status.abort is not None:
        assert status.abort.revision == wanted.revision
        assert status.phase == "Degraded"
    else:
        assert status.phase == "Healthy"
        assert world.condition("Promoted")[0] == "True"

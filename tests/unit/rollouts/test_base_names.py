"""Whose engines answer requests for a base model's own name: never a stranger's."""

from __future__ import annotations

from finetune_operator.api.routes import BaseModelRoute, Snapshot
from finetune_operator.core import rollouts
from finetune_operator.core.rollout_facts import EngineFacts, Wanted
from finetune_operator.reconcile import deployment_facts
from finetune_operator.reconcile.aliases import Claim
from finetune_operator.reconcile.base_names import Base, BaseNames, base_of
from finetune_operator.reconcile.queue import Key
from tests.unit.rollouts.world import START, World, artifact, spec_of

A, B, C = ("team-a", "bot"), ("team-b", "bot"), ("team-c", "bot")
OURS, THEIRS = "http://engine:8000", "http://stranger:8000"


def claim(key: Key, created: str, *, default: bool = False, base: str = "qwen") -> Claim:
    return Claim(key, f"uid-{key[0]}", created, key[1], base, default)


def names(*claims: Claim) -> BaseNames:
    made = BaseNames()
    for one in claims:
        made.claim(one)
    return made


def published(
    made: BaseNames, bases: dict[Key, Base], *, inherited: dict[str, tuple[str, ...]] | None = None,
    silent: set[Key] | None = None,
) -> dict[str, set[str]]:  # fmt: skip
    return made.published(bases, inherited=inherited or {}, silent=(silent or set()).__contains__)


def test_a_stranger_gets_no_request_for_a_name_that_another_namespace_had_first() -> None:
    made = names(claim(B, "2026-02"), claim(A, "2026-01"))
    bases = {A: Base("qwen", (OURS,)), B: Base("qwen", (THEIRS,))}
    assert published(made, bases) == {"qwen": {OURS}}
    assert made.owner_of("qwen", bases) == A
    made.release(A)
    del bases[A]
    assert published(made, bases) == {"qwen": {THEIRS}}, "nobody else has the name any more"
    made.claim(claim(A, "2026-01"))
    bases[A] = Base("qwen", (OURS,))
    assert published(made, bases) == {"qwen": {THEIRS}}, "whoever has it keeps it"


def test_the_default_engine_has_its_names_whoever_came_first() -> None:
    made = names(claim(A, "2026-01"), claim(B, "2026-02", default=True), claim(C, "2026-03", default=True))
    bases = {A: Base("qwen", (THEIRS,)), B: Base("qwen", (OURS,)), C: Base("qwen", (OURS,))}
    assert published(made, bases) == {"qwen": {OURS}}


def test_a_name_that_the_default_engine_does_not_serve_is_not_taken_from_anybody() -> None:
    made = names(claim(A, "2026-02"), claim(B, "2026-01", default=True))
    bases = {A: Base("qwen", (OURS,)), B: Base("qwen", ())}
    assert published(made, bases) == {"qwen": {OURS}}


def test_a_deployment_whose_engines_do_not_answer_for_the_name_is_told_who_does() -> None:
    ours, theirs, default = claim(A, "2026-01"), claim(B, "2026-02"), claim(C, "2026-03", default=True)
    made = names(ours, theirs)
    bases = {A: Base("qwen", (OURS,)), B: Base("qwen", (THEIRS,))}
    published(made, bases)
    assert made.answered_by(ours, bases) is None
    assert made.answered_by(theirs, bases) == "the engines of namespace team-a"
    made.claim(default)
    bases[C] = Base("qwen", ("http://default",))
    assert made.answered_by(ours, bases) == "the operator's default engine"
    assert made.answered_by(default, bases) is None
    assert made.answered_by(claim(A, "2026-01", base="llama"), bases) is None, "nobody serves it"


def test_to_ask_who_answers_settles_nothing() -> None:
    late = claim(B, "2026-02")
    made = names(late)  # the first one that is told of, and not the first one that there was
    bases = {A: Base("qwen", (OURS,)), B: Base("qwen", (THEIRS,))}
    assert made.answered_by(late, bases) is None
    assert made.owner_of("qwen", bases) is None
    made.claim(claim(A, "2026-01"))
    assert published(made, bases) == {"qwen": {OURS}}
    assert made.answered_by(late, bases) == "the engines of namespace team-a"


def test_the_status_tells_who_answers_for_the_base_model() -> None:
    world = World(spec=spec_of("a"), wanted=Wanted(artifact=artifact("a")))
    world.run(20)
    assert "requests for that name" not in world.message("BaseModelCompatible")
    world.base_answered_by = "the engines of namespace team-b"
    world.run(20)
    assert world.condition("BaseModelCompatible") == ("True", "Compatible")
    assert world.message("BaseModelCompatible").endswith(
        "requests for that name itself go to the engines of namespace team-b"
    )


def test_a_namespace_may_have_several_engines() -> None:
    other = ("team-a", "second")
    made = names(claim(A, "2026-01"), claim(other, "2026-02"), claim(B, "2026-03"))
    bases = {A: Base("qwen", (OURS,)), other: Base("qwen", ("http://two",)), B: Base("qwen", (THEIRS,))}
    assert published(made, bases) == {"qwen": {OURS, "http://two"}}


def test_nothing_changes_for_a_name_until_those_were_heard_that_had_it() -> None:
    default = claim(B, "2026-02", default=True)
    made = names(claim(A, "2026-01"), default)
    bases = {A: Base("qwen", (THEIRS,))}
    inherited: dict[str, tuple[str, ...]] = {"qwen": (OURS,)}
    assert published(made, bases, inherited=inherited, silent={B}) == {"qwen": {OURS}}
    bases[B] = Base("qwen", (OURS,))
    assert published(made, bases) == {"qwen": {OURS}}


def test_an_engine_counts_only_for_the_name_that_spec_has() -> None:
    engines = [
        EngineFacts(OURS, "http://a", reachable=True, ready=True, base_models=("qwen", "gpt-4", "llama")),
        EngineFacts("http://other", "http://b", reachable=True, ready=True, base_models=("llama",)),
        EngineFacts("http://late", "http://c", reachable=True, ready=False, base_models=("qwen",)),
        EngineFacts("http://silent", "http://d", reachable=False),
        EngineFacts("http://new", "http://e", reachable=False),
    ]
    snapshot = Snapshot(base_models=(BaseModelRoute(name="qwen", upstreams=("http://silent",)),))
    assert base_of("qwen", engines, snapshot) == Base("qwen", (OURS, "http://silent"))


def test_a_claim_names_the_base_model_and_who_serves_it() -> None:
    metadata = {"namespace": "team-a", "name": "bot", "uid": "u", "creationTimestamp": "2026-01"}
    spec = {"baseModelRef": {"name": "qwen"}}
    plain = deployment_facts.claim({"metadata": metadata, "spec": spec})
    assert (plain.base, plain.is_served_by_default) == ("qwen", True)
    for serving in ({"endpoint": OURS}, {"podSelector": {"matchLabels": {"a": "b"}}}):
        assert not deployment_facts.claim(
            {"metadata": metadata, "spec": {**spec, "serving": serving}}
        ).is_served_by_default


def test_an_alias_that_is_somebodys_base_model_is_not_routed() -> None:
    world = World(spec=spec_of("a"), wanted=Wanted(artifact=artifact("a")))
    world.alias_is_base_of = "team-a/bot"
    world.run(20)
    assert world.routing.route is None
    assert world.condition("InvalidSpec") == ("True", "AliasConflict")
    message = world.status.message or ""
    assert "team-a/bot" in message
    assert "another spec.alias" in message
    assert rollouts.withdraw(world.observe(), now=START) is None
    world.alias_is_base_of = None
    world.run(30)
    assert world.condition("Available")[0] == "True"
    world.alias_is_base_of = "team-a/bot"
    world.run(30)
    assert world.condition("Available")[0] == "True", "what serves under a name keeps it"

"""Names that engines and deployments claim: nobody draws another one's requests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_local.cluster import Cluster
from tests.clients import Json, Kubectl
from tests.integration.rollout_lab import Engine
from tests.integration.rollout_operator import BETTER, GOOD, Lab, serves

pytestmark = pytest.mark.integration


@pytest.fixture
def lab(cluster: Cluster, kubectl: Kubectl, tmp_path: Path) -> Iterator[Lab]:
    made = Lab(cluster, kubectl, tmp_path)
    made.environment["FINETUNE_ENGINE_ENDPOINTS"] = "127.0.0.1"
    with made.running():
        yield made


def base_models(lab: Lab) -> list[tuple[str, tuple[str, ...]]]:
    snapshot = lab.routers[0].snapshot
    return [(base.name, base.upstreams) for base in snapshot.base_models] if snapshot else []


def test_an_engine_that_claims_a_name_gets_none_of_its_requests(lab: Lab) -> None:
    stranger = Engine(lab.loop)
    stranger.start()
    try:
        ours = [("base-model", (lab.operator_environment()["FINETUNE_ENGINE_URL"],))]
        lab.deploy(GOOD)
        lab.wait(serves(GOOD))
        assert base_models(lab) == ours
        serving = {"endpoint": stranger.url, "agentPort": stranger.port}
        lab.deploy(BETTER, name="second", serving=serving)
        lab.wait(serves(BETTER), name="second")
        assert base_models(lab) == ours
        lab.kill()
        lab.start()
        asked = stranger.asked
        lab.eventually(lambda: stranger.asked > asked + 1, seconds=60)
        assert {str(base_models_of) for base_models_of in seen(lab)} == {str(ours)}
        lab.deploy(GOOD, name="base-model", baseModelRef={"name": "other"})
        status = lab.wait(lambda s: s.get("reason") == "AliasConflict", name="base-model")
        assert status["phase"] == "Pending"
        assert "another spec.alias" in status["message"]
        assert lab.routers[0].route("base-model") is None
        assert lab.engine.loads == [f"bot--{GOOD}"]
    finally:
        stranger.stop()


def seen(lab: Lab) -> list[list[tuple[str, tuple[str, ...]]]]:
    """Base models of all snapshots since there was one with a base model."""
    found: list[list[tuple[str, tuple[str, ...]]]] = [
        [(base.name, base.upstreams) for base in snapshot.base_models]
        for _, snapshot in lab.routers[0].applied
    ]
    return [bases for bases in found if bases]


def test_the_namespace_that_had_a_name_first_keeps_it(lab: Lab) -> None:
    """Without a default engine: deployments of one namespace share their names, in every order."""
    first, second = Engine(lab.loop, "private-model"), Engine(lab.loop, "private-model")
    first.start()
    second.start()

    def serving(engine: Engine) -> Json:
        return {"endpoint": engine.url, "agentPort": engine.port}

    try:
        named = {"name": "private-model"}
        lab.deploy(GOOD, name="one", serving=serving(first), baseModelRef=named)
        lab.wait(serves(GOOD), name="one")
        lab.deploy(BETTER, name="two", serving=serving(second), baseModelRef=named)
        lab.wait(serves(BETTER), name="two")
        lab.eventually(
            lambda: base_models(lab) == [("private-model", tuple(sorted((first.url, second.url))))]
        )
        lab.kubectl("delete", "adep", "one")
        lab.eventually(lambda: base_models(lab) == [("private-model", (second.url,))])
    finally:
        first.stop()
        second.stop()

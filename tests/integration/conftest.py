"""Fixtures of the tests whose trainers are played: an API server of the module's own, and an operator's way to it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.rayjob_player import Story, all_well
from finetune_local.cluster import Cluster
from tests.integration.api_proxy import SEED, ApiProxy
from tests.integration.operators import Stage, played_cluster, staged

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with played_cluster(tmp_path_factory.mktemp("api")) as cluster:
        yield cluster


@pytest.fixture
def story() -> Story:
    """How attempts end."""
    return all_well


@pytest.fixture
def stage(api: Cluster, story: Story) -> Iterator[Stage]:
    """A namespace of the test's own whose trainers are played."""
    with staged(api, f"played-{next(_numbers)}", story=story) as playing:
        yield playing


@pytest.fixture
def proxy(api: Cluster, tmp_path: Path) -> Iterator[ApiProxy]:
    running = ApiProxy(api, tmp_path, seed=SEED)
    yield running
    running.close()

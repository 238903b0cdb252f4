"""Fixtures of rollouts by a real operator process: an API server of the module, and what surrounds the operator."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_local.cluster import Cluster
from tests.clients import Kubectl
from tests.clusters import api_server
from tests.integration.rollout_operator import COLLECTOR, Lab
from tests.integration.rollouts.webhooks import Receiver


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with api_server(tmp_path_factory.mktemp("api-server"), COLLECTOR) as running:
        yield running


@pytest.fixture
def lab(cluster: Cluster, kubectl: Kubectl, tmp_path: Path) -> Iterator[Lab]:
    made = Lab(cluster, kubectl, tmp_path)
    with made.running():
        yield made


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    made = Receiver()
    yield made
    made.close()

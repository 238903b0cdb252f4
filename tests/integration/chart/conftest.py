"""An API server without anything of ours: the chart brings it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from finetune_local.cluster import Cluster
from tests.clusters import api_server


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with api_server(tmp_path_factory.mktemp("api-server"), "kube-controller-manager") as running:
        yield running

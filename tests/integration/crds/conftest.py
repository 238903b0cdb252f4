"""An API server without the operator: here the tests are the ones who write statuses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from kubernetes import client, config

from finetune_local.cluster import Cluster
from finetune_operator.api import finetunejob
from finetune_operator.api.base import GROUP, VERSION
from tests.clusters import api_server


@pytest.fixture(scope="package")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with api_server(tmp_path_factory.mktemp("api-server")) as running:
        yield running


@pytest.fixture(scope="package")
def api(cluster: Cluster) -> client.CustomObjectsApi:
    return client.CustomObjectsApi(config.new_client_from_config(str(cluster.kubeconfig)))


@pytest.fixture
def create(api: client.CustomObjectsApi, namespace: str) -> Any:
    def create_job(job: dict[str, Any], *, dry_run: bool = True) -> dict[str, Any]:
        options: dict[str, Any] = {"dry_run": "All"} if dry_run else {}
        created: dict[str, Any] = api.create_namespaced_custom_object(
            GROUP, VERSION, namespace, finetunejob.PLURAL, job, field_validation="Strict", **options
        )
        return created

    return create_job

"""KubeRay is installed while the operator runs, and the API server serves its resources late."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.clients import Kubectl
from tests.clusters import api_server
from tests.integration.api_proxy import ApiProxy, Fault, Kind
from tests.integration.operators import Operator, apply_ray_crds, grant_own_rights
from tests.waiting import wait_until

pytestmark = pytest.mark.integration

LATE_SECONDS = 4.0  # longer than CRDs change after they are created
WATCH = r"GET /apis/ray.io/v1/.*rayjobs.*watch=true"


def test_what_is_served_long_after_its_crd_changed_is_watched(tmp_path: Path) -> None:
    with api_server(tmp_path / "cluster") as cluster:
        proxy = ApiProxy(cluster, tmp_path)
        operator = Operator(tmp_path / "operator", proxy.kubeconfig, "default")
        try:
            grant_own_rights(Kubectl(cluster.kubeconfig, "default"))
            operator.start()
            operator.wait_healthy()
            late = proxy.add(Fault(Kind.REFUSE, r"GET /apis/ray.io/v1$", status=404))
            apply_ray_crds(cluster)
            time.sleep(LATE_SECONDS)
            assert late.hits > 0, "nobody asked for the new resources"
            assert proxy.count(WATCH) == 0
            proxy.heal()
            wait_until(lambda: proxy.count(WATCH) > 0, seconds=30, what="a watch of RayJobs")
            assert operator.is_alive()
        finally:
            operator.kill()
            proxy.close()

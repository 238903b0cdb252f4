"""The API server refuses, is slow, loses answers, cuts watches, and goes away: jobs still end as they should."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetune_local import kubeapi
from finetune_local.cluster import Cluster
from tests.clusters import pid_of
from tests.integration.api_proxy import ApiProxy, Fault, Kind
from tests.integration.operators import PARTS, Operator, Stage, played_cluster, staged
from tests.integration.test_kills import check, quick_retries, story
from tests.waiting import wait_until

pytestmark = [pytest.mark.integration, pytest.mark.faults]

SEED = int(os.environ.get("FINETUNE_TEST_SEED", "20261121"))
AWAY_SECONDS = float(os.environ.get("FINETUNE_TEST_AWAY_SECONDS", "60"))
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with played_cluster(tmp_path_factory.mktemp("api")) as cluster:
        yield cluster


@pytest.fixture
def stage(api: Cluster) -> Iterator[Stage]:
    with staged(api, f"faults-{next(_numbers)}", story=story) as playing:
        yield playing


@pytest.fixture
def proxy(api: Cluster, tmp_path: Path) -> Iterator[ApiProxy]:
    running = ApiProxy(api, tmp_path, seed=SEED)
    yield running
    running.close()


@pytest.fixture
def operator(proxy: ApiProxy, stage: Stage, tmp_path: Path) -> Iterator[Operator]:
    running = Operator(tmp_path / "operator", proxy.kubeconfig, stage.kubectl.namespace)
    running.start()
    wait_until(lambda: running.get("/healthz") == "ok\n", seconds=30)
    yield running
    assert running.is_alive(), running.log()[-3000:]
    running.kill()


NAMES = [f"{kind}-{number}" for number in range(4) for kind in ("well", "lost", "bad")]
OWN = r"(finetunejobs|rayjobs|configmaps|events|pods|rayclusters|tokenreviews|apis/ray.io/v1$)"


@pytest.mark.parametrize(
    "fault",
    [
        Fault(Kind.REFUSE, OWN, status=429, chance=0.3),
        Fault(Kind.REFUSE, OWN, status=500, chance=0.3),
        Fault(Kind.REFUSE, r"^(POST|PATCH|PUT|DELETE) .*" + OWN, status=409, chance=0.3),
        Fault(Kind.DROP, OWN, chance=0.3),
        Fault(Kind.LOSE, r"^(POST|PATCH|PUT|DELETE) .*" + OWN, chance=0.3),
        Fault(Kind.DELAY, OWN, seconds=1.0, chance=0.3),
    ],
    ids=["429", "500", "409", "dropped", "answers-lost", "slow"],
)
def test_a_third_of_all_requests_goes_wrong(
    fault: Fault, operator: Operator, proxy: ApiProxy, stage: Stage
) -> None:
    proxy.add(fault)
    stage.apply(*NAMES, **quick_retries(""))
    check(stage, NAMES, seconds=240)
    assert fault.hits > 10


@pytest.mark.parametrize("gone", [False, True], ids=["cut", "410-gone"])
def test_watches_end_again_and_again(gone: bool, operator: Operator, proxy: ApiProxy, stage: Stage) -> None:
    cut = 0
    for number in range(5):
        stage.apply(f"well-{number}", f"lost-{number}", **quick_retries(""))
        time.sleep(0.5)
        cut += proxy.cut_watches(gone=gone)
    check(stage, [f"{kind}-{number}" for number in range(5) for kind in ("well", "lost")], seconds=120)
    assert cut > 5


def test_the_api_server_is_away(operator: Operator, proxy: ApiProxy, stage: Stage) -> None:
    stage.apply("well-before", "lost-before", **quick_retries(""))
    wait_until(lambda: len(stage.rayjobs_ever()) == 2, seconds=30)
    proxy.away.set()
    stage.apply("well-meanwhile")
    time.sleep(AWAY_SECONDS)
    assert operator.get("/healthz") == "ok\n", "it is not the operator's fault"
    proxy.away.clear()
    check(stage, ["well-before", "lost-before", "well-meanwhile"], seconds=120)


def test_the_api_server_and_etcd_are_killed_and_etcd_forgets_its_past(
    api: Cluster, operator: Operator, stage: Stage
) -> None:
    """After a compaction a watch that goes on from before gets 410 Gone from the real server."""
    stage.apply("well-before", "lost-before", **quick_retries(""))
    wait_until(lambda: len(stage.rayjobs_ever()) == 2, seconds=30)
    for part in ("kube-apiserver", "etcd"):
        os.kill(pid_of(api, part), signal.SIGKILL)
    time.sleep(2)
    api.up(PARTS)
    _compact(api)
    stage.apply("well-after")
    check(stage, ["well-before", "lost-before", "well-after"], seconds=180)


def _compact(api: Cluster) -> None:
    """Make etcd forget all revisions but the last one, through its JSON gateway."""
    server = f"https://127.0.0.1:{api.ports['etcd']}"
    etcd = kubeapi.ApiClient(server, pki=api.layout.pki, user="etcd-client")
    revision = etcd.call("POST", "/v3/maintenance/status", {})["header"]["revision"]
    etcd.call("POST", "/v3/kv/compaction", {"revision": revision, "physical": True})

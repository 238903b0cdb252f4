"""Clusters of a few parts, for tests that need no more or break theirs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from finetune_local import parts
from finetune_local.cluster import Cluster

API_SERVER = ("etcd", "kube-apiserver")
WITHOUT_RAY = (*parts.CONTROL_PLANE, "ray-gateway", "kuberay", "operator")


@contextlib.contextmanager
def started(folder: Path, names: Sequence[str]) -> Iterator[Cluster]:
    """A cluster of these parts; down in the end, also when it did not come up."""
    running = Cluster(folder)
    try:
        running.up(tuple(names))
        yield running
    finally:
        running.down()


def api_server(folder: Path, *more: str) -> contextlib.AbstractContextManager[Cluster]:
    """An API server without the operator, whose part the tests play. `more` are parts beside it."""
    return started(folder, (*API_SERVER, *more))


def pid_of(cluster: Cluster, part: str) -> int:
    """The process of a part that runs."""
    (pid,) = [status.pid for status in cluster.status() if status.name == part]
    assert pid is not None, f"{part} does not run"
    return pid

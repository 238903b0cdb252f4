"""Clusters of a few parts, for tests that need no more or break theirs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from finetune_local import parts
from finetune_local.cluster import Cluster
from finetune_local.errors import LocalClusterError

API_SERVER = ("etcd", "kube-apiserver")
WITHOUT_RAY = (*parts.CONTROL_PLANE, "ray-gateway", "kuberay", "operator")


@contextlib.contextmanager
def started(folder: Path, names: Sequence[str]) -> Iterator[Cluster]:
    """A cluster of these parts; down in the end, also when it did not come up."""
    running = Cluster(folder)
    try:
        bring_up(running, tuple(names))
        yield running
    finally:
        running.down()


def bring_up(cluster: Cluster, names: tuple[str, ...], *, report: Callable[[str], None] = print) -> None:
    """Start these parts; once more, as the error says, where one did not come up: tests side by side may take the same
    free port."""
    try:
        cluster.up(names, report=report)
    except LocalClusterError as error:
        report(f"again: {error}")
        cluster.up(names, report=report)


def api_server(folder: Path, *more: str) -> contextlib.AbstractContextManager[Cluster]:
    """An API server without the operator, whose part the tests play. `more` are parts beside it."""
    return started(folder, (*API_SERVER, *more))


def pid_of(cluster: Cluster, part: str) -> int:
    """The process of a part that runs."""
    (pid,) = [status.pid for status in cluster.status() if status.name == part]
    assert pid is not None, f"{part} does not run"
    return pid

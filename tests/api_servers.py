"""An API server without the operator, whose part the tests play."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from finetune_local.cluster import Cluster

API_SERVER = ("etcd", "kube-apiserver")


@contextlib.contextmanager
def api_server(folder: Path, *more: str) -> Iterator[Cluster]:
    """`more` are parts beside it."""
    running = Cluster(folder)
    try:
        running.up((*API_SERVER, *more))
        yield running
    finally:
        running.down()

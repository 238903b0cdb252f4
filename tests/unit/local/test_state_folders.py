"""State folders that somebody else uses, removes or waits for."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from finetune_local import errors, layouts, processes
from finetune_local.cluster import Cluster
from finetune_local.instances import Instance
from tests.waiting import wait_until


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path / "state")


def test_a_folder_with_files_of_the_user_is_no_state_folder(cluster: Cluster) -> None:
    work = cluster.layout.root / "thesis.txt"
    work.parent.mkdir()
    work.write_text("years of work")
    with pytest.raises(errors.LocalClusterError, match=r"holds thesis\.txt, and `down --purge` removes"):
        cluster.up(["etcd"])
    cluster.down(purge=True)
    assert list(cluster.layout.root.iterdir()) == [work]


def test_what_the_user_writes_for_the_cluster_is_not_foreign(cluster: Cluster) -> None:
    cluster.layout.create()  # an `up` that was killed at once
    cluster.layout.alerts.write_text("{}")
    assert cluster.layout.find_foreign() == []


def test_a_state_folder_whose_up_or_purge_was_killed_is_purged(cluster: Cluster) -> None:
    with cluster._locked(print):  # where an `up` may build programs for minutes
        pass
    cluster.down(purge=True)
    assert not cluster.layout.root.exists()


def test_a_purge_that_was_interrupted_is_repeated(cluster: Cluster) -> None:
    """Ctrl-C at each of its folders, in whatever order they are removed."""
    for number in range(1, len(cluster.layout.folders()) + 1):
        cluster.layout.create()
        cluster.layout.lock.touch()
        cluster.layout.kubeconfig.touch()
        Instance.load(cluster.layout.instance).save(cluster.layout.instance)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "rmdir", _interrupted(number))
            with pytest.raises(KeyboardInterrupt):
                cluster.down(purge=True)
        cluster.down(purge=True)
        assert not cluster.layout.root.exists(), number


def _interrupted(number: int) -> Callable[..., None]:
    """`os.rmdir`, with Ctrl-C at this call of it."""
    rmdir, calls = os.rmdir, itertools.count(1)

    def remove(*args: Any, **kwargs: Any) -> None:
        if next(calls) == number:
            raise KeyboardInterrupt
        rmdir(*args, **kwargs)

    return remove


def test_processes_whose_state_folder_was_removed_are_stopped(cluster: Cluster) -> None:
    cluster.layout.create()
    record = processes.start(
        "etcd",
        ["sleep", "300"],
        layout=cluster.layout,
        identity=Instance.load(cluster.layout.instance).identity,
        environment=dict(os.environ),
        fingerprint="f",
    )
    shutil.rmtree(cluster.layout.root)
    assert cluster.down() == ["etcd"]
    assert record.find() is None
    assert not psutil.pid_exists(record.pid)
    assert cluster.down() == []


def test_a_lock_that_was_purged_is_taken_anew(cluster: Cluster) -> None:
    """Else a third command would not see the second one, which waited for the first, and both would start parts."""
    waiting, inside, leave = threading.Event(), threading.Event(), threading.Event()

    def second() -> None:
        with cluster._locked(lambda line: waiting.set()):
            inside.set()
            leave.wait(30)

    thread = threading.Thread(target=second)
    with cluster._locked(lambda line: None):
        thread.start()
        assert waiting.wait(30)
        shutil.rmtree(cluster.layout.root)
    assert inside.wait(30)
    third: list[str] = []
    other = threading.Thread(target=lambda: cluster._locked(third.append).__enter__())
    other.start()
    wait_until(lambda: third or not other.is_alive(), seconds=30, what="the third one waits or is through")
    leave.set()
    thread.join()
    other.join()
    assert third == ["waiting for another `finetune local` command"]


def test_rays_sockets_fit_whatever_the_folder_for_temporary_files(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/home/somebody/with/a/long/path/for/temporary/files")
    of_ray = "session_2026-11-30_04-22-16_303844_4194304/sockets/plasma_store"
    assert len(str(cluster.layout.ray_folder("0" * 32) / of_ray)) <= 107


def test_a_folder_keeps_its_identity(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real").mkdir()
    one, same, other = (layouts.Layout(tmp_path / name).instance for name in ("real", "link", "other"))
    assert Instance.load(one).identity == Instance.load(same).identity != Instance.load(other).identity

"""A full disk is told with the file that did not fit, and `down --purge` makes room."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_local.cluster import Cluster
from finetune_local.instances import Instance
from tests.disks import full_disk


def test_a_full_disk_is_told_with_the_file_and_purged_all_the_same(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path / "state")
    cluster.layout.create()
    Instance(identity="0" * 32, ports={}, wanted=["router"]).save(cluster.layout.instance)
    with full_disk():
        with pytest.raises(OSError) as caught:
            cluster.down()
        assert caught.value.filename == str(cluster.layout.instance)
        assert not list(cluster.layout.root.glob(".*"))
        cluster.down(purge=True)
    assert not cluster.layout.root.exists()

"""The router's own files, on a disk that is full."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from finetune_operator.api.routes import Snapshot
from finetune_router import storage, tickets
from tests.disks import full_disk


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("instance", storage.read_instance),
        ("routes.json", lambda folder: storage.write_mirror(folder, Snapshot(version=1))),
        ("signing.key", lambda folder: tickets.load_key(None, folder)),
    ],
)
def test_a_file_that_does_not_fit_is_named_and_leaves_no_half(
    tmp_path: Path, name: str, write: Callable[[Path], object]
) -> None:
    with full_disk(), pytest.raises(OSError, match=name):
        write(tmp_path)
    assert list(tmp_path.iterdir()) == []
    write(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [name]

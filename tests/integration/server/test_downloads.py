"""Only what the manifest says gets into the cache, and a damaged copy is taken anew."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from finetune_server import downloads
from tests.adapters import commit_artifact


@pytest.fixture
def artifact(tiny_adapters: dict[str, Path], tmp_path: Path) -> tuple[Path, str]:
    folder = tmp_path / "published"
    return folder, commit_artifact(tiny_adapters["all"], folder, base_uri="file:///models/tiny")


def test_a_whole_artifact_is_copied_once_and_verified_each_time(
    artifact: tuple[Path, str], tmp_path: Path
) -> None:
    folder, digest = artifact
    copy = downloads.fetch(f"file://{folder}", digest, tmp_path / "cache").folder
    assert {path.name for path in copy.iterdir()} >= {"manifest.json", "adapter_model.safetensors"}

    weights = copy / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    again = downloads.fetch(f"file://{folder}", digest, tmp_path / "cache").folder
    assert again == copy
    assert weights.read_bytes() == (folder / "adapter_model.safetensors").read_bytes()

    folder.rename(tmp_path / "gone")  # after a restart without the store, the copy is enough
    assert downloads.fetch(f"file://{folder}", digest, tmp_path / "cache").manifest["rank"] == 8


def test_another_digest_or_a_changed_file_is_refused_and_leaves_nothing(
    artifact: tuple[Path, str], tmp_path: Path
) -> None:
    folder, digest = artifact
    cache = tmp_path / "cache"
    with pytest.raises(downloads.DigestMismatch, match=digest):
        downloads.fetch(f"file://{folder}", "sha256:" + "0" * 64, cache)
    with (folder / "adapter_model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(downloads.DigestMismatch, match=r"adapter_model\.safetensors differs"):
        downloads.fetch(f"file://{folder}", digest, cache)
    assert list(cache.iterdir()) == []


def test_missing_things_are_named(artifact: tuple[Path, str], tmp_path: Path) -> None:
    folder, digest = artifact
    with pytest.raises(downloads.DownloadFailed, match="nothing was committed"):
        downloads.fetch(f"file://{tmp_path}/nothing", digest, tmp_path / "cache")
    (folder / "adapter_config.json").unlink()
    with pytest.raises(downloads.DownloadFailed, match=r"adapter_config\.json does not exist"):
        downloads.fetch(f"file://{folder}", digest, tmp_path / "cache")
    with pytest.raises(downloads.DownloadFailed, match="no volumes are mounted"):
        downloads.fetch("pvc://claim/a", digest, tmp_path / "cache")


def publish(folder: Path, manifest: dict[str, Any]) -> str:
    folder.mkdir()
    content = json.dumps(manifest).encode()
    (folder / "manifest.json").write_bytes(content)
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([{"path": "../x.json", "sha256": "0", "size": 1}], "outside the artifact"),
        ([{"path": "/etc/x.json", "sha256": "0", "size": 1}], "outside the artifact"),
        ([{"path": "adapter_model.bin", "sha256": "0", "size": 1}], "may carry code"),
        ([{"path": "x.py", "sha256": "0", "size": 1}], "may carry code"),
        ([{"path": "x.safetensors", "sha256": "0", "size": 1 << 50}], "bytes"),
        ([{"path": "model.safetensors", "sha256": "0", "size": 1}], "no adapter_config"),
        ([{"size": 1}], "not one of ours"),
    ],
)
def test_manifests_that_would_do_harm_are_refused(
    tmp_path: Path, files: list[dict[str, Any]], message: str
) -> None:
    digest = publish(tmp_path / "bad", {"files": files})
    with pytest.raises(downloads.NotServable, match=message):
        downloads.fetch(f"file://{tmp_path}/bad", digest, tmp_path / "cache")


def test_copies_that_nobody_wants_are_few(tmp_path: Path) -> None:
    for number in range(downloads.KEPT + 5):
        (tmp_path / f"{number:02}").mkdir()
    downloads.clean(tmp_path, wanted={"sha256:00"})
    left = {path.name for path in tmp_path.iterdir()}
    assert "00" in left
    assert len(left) == downloads.KEPT + 1

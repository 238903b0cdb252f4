"""Only what the manifest says gets into the cache, and a damaged copy is taken anew."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
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
    weights = folder / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for other in (whole + b"x", whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        weights.write_bytes(other)
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
    for uri in ("file:///\0", "https://[no-address/x"):
        with pytest.raises(downloads.DownloadFailed, match="cannot be read: ValueError"):
            downloads.fetch(uri, digest, tmp_path / "cache")
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


@pytest.mark.parametrize("size", ["Infinity", "1e999", '"many"', "[" * 100_000])
def test_sizes_that_are_none_are_refused(tmp_path: Path, size: str) -> None:
    content = f'{{"files": [{{"path": "adapter_config.json", "sha256": "0", "size": {size}}}]}}'
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "manifest.json").write_text(content)
    digest = f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"
    with pytest.raises(downloads.NotServable, match="not one of ours"):
        downloads.fetch(f"file://{tmp_path}/bad", digest, tmp_path / "cache")


@pytest.mark.parametrize("name", ["a\0.json", "a\ud800.json"])
def test_names_that_no_file_can_have_are_refused(tmp_path: Path, name: str) -> None:
    names = ("adapter_config.json", name)
    digest = publish(tmp_path / "bad", {"files": [{"path": one, "sha256": "0", "size": 1} for one in names]})
    with pytest.raises(downloads.NotServable, match="no file's name"):
        downloads.fetch(f"file://{tmp_path}/bad", digest, tmp_path / "cache")


def test_a_file_without_end_does_not_fill_the_disk(artifact: tuple[Path, str], tmp_path: Path) -> None:
    folder, digest = artifact
    weights = folder / "adapter_model.safetensors"
    size = weights.stat().st_size
    weights.unlink()
    weights.symlink_to("/dev/zero")
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(64 << 20, 2 * size), resource.RLIM_INFINITY))
    try:
        with pytest.raises(downloads.DigestMismatch, match="it is longer"):
            downloads.fetch(f"file://{folder}", digest, tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_lies_in_the_place_of_a_copy_gives_way(artifact: tuple[Path, str], tmp_path: Path) -> None:
    folder, digest = artifact
    place = tmp_path / "cache" / digest.removeprefix("sha256:")
    place.parent.mkdir()
    place.write_text("no folder")
    assert downloads.fetch(f"file://{folder}", digest, place.parent).folder == place
    shutil.rmtree(place)
    place.symlink_to(tmp_path / "nowhere")
    assert downloads.fetch(f"file://{folder}", digest, place.parent).folder == place


def test_a_cache_folder_that_cannot_be_used_is_named(artifact: tuple[Path, str], tmp_path: Path) -> None:
    folder, digest = artifact
    (tmp_path / "cache").write_text("no folder")
    with pytest.raises(downloads.DownloadFailed, match=f"cache folder {tmp_path}/cache"):
        downloads.fetch(f"file://{folder}", digest, tmp_path / "cache")


def test_copies_that_nobody_wants_are_few_and_strange_things_stay(tmp_path: Path) -> None:
    for number in range(downloads.KEPT + 5):
        (tmp_path / f"{number:064x}").mkdir()
        (tmp_path / f"mine-{number}").mkdir()
    (tmp_path / f"{'f' * 64}").symlink_to(tmp_path / "nowhere")
    downloads.clean(tmp_path, wanted=lambda: {f"sha256:{0:064x}"})
    left = {path.name for path in tmp_path.iterdir()}
    assert f"{0:064x}" in left
    assert sum(path.name.startswith("0") for path in tmp_path.iterdir()) == downloads.KEPT + 1
    assert sum(name.startswith("mine-") for name in left) == downloads.KEPT + 5

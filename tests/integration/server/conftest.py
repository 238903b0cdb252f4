from __future__ import annotations

from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="session")
def tiny_adapters(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters that differ in rank, scaling and targets."""
    folder = tmp_path_factory.mktemp("adapters")
    kinds: dict[str, dict[str, Any]] = {
        "all": {"r": 8},
        "attention": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        "rslora": {"r": 16, "use_rslora": True},
        "patterns": {
            "r": 4,
            "rank_pattern": {"down_proj": 12},
            "alpha_pattern": {"layers.1.self_attn.q_proj": 64},
        },
    }
    return {
        name: write_adapter(tiny_model, folder / name, seed=seed, **settings)
        for seed, (name, settings) in enumerate(kinds.items(), 1)
    }

"""What `up` puts into the API server comes with the package itself, wherever that is installed."""

from __future__ import annotations

from pathlib import Path

import yaml

from finetune_local import contents, objects
from finetune_operator.api import crds


def test_our_crds_are_made_from_the_models(tmp_path: Path) -> None:
    files = contents.write_crds(tmp_path / "crds")
    assert [yaml.safe_load(file.read_text()) for file in files] == crds.build_crds()
    assert contents.write_crds(tmp_path / "crds") == files


def test_every_manifest_that_is_applied_is_there() -> None:
    for name in (*contents.RBAC_FILES, "kwok-stages.yaml"):
        assert list(yaml.safe_load_all((objects.MANIFESTS / name).read_text()))

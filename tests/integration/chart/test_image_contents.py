"""What the Dockerfiles install is enough: the programs start with nothing but the pinned packages and our wheel."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tools import cluster_images
from tools.cluster_images import IMAGES, PACKAGES, PREFIX

pytestmark = pytest.mark.integration

MODULES = {
    "finetune-operator": ("finetune_operator.__main__", "finetune_router.__main__", "finetune_cli.__main__"),
    "finetune-trainer": (
        "finetune_trainer.train",
        "finetune_trainer.__main__",
        "finetune_server.__main__",
        "ray.scripts.scripts",
    ),
}


@pytest.fixture(scope="module", params=IMAGES, ids=lambda image: image.name)
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    image: cluster_images.Image = request.param
    folder = tmp_path_factory.mktemp(image.name)
    cluster_images.fill(folder, image, base=Path("/"))
    return image.name, folder


def test_every_program_finds_what_it_imports(root: tuple[str, Path], tmp_path: Path) -> None:
    name, folder = root
    code = "; ".join(f"import {module}" for module in MODULES[name])
    environment = {"PYTHONPATH": str(folder / PACKAGES), "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    # -S: without the packages of the environment that runs this test.
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_programs_are_where_path_looks(root: tuple[str, Path]) -> None:
    name, folder = root
    programs = {path.name for path in (folder / PREFIX / "bin").iterdir()}
    assert {"python", "finetune-operator", "finetune-router", "finetune-trainer"} <= programs
    if name == "finetune-trainer":
        assert "ray" in programs, "KubeRay starts the head with it"


def test_nothing_of_this_machine_is_in_it(root: tuple[str, Path]) -> None:
    _, folder = root
    names = {path.name for path in (folder / PACKAGES).iterdir()}
    assert not [name for name in names if "editable" in name]
    assert not (folder / PACKAGES / "pytest").exists()

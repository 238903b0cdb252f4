"""The Dockerfiles, as far as they can be checked without a daemon."""

from __future__ import annotations

import fnmatch
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tools import cluster_images
from tools.chart_pages import CHART, ROOT

FILES = ("operator/Dockerfile", "trainer_image/Dockerfile")
PINNED = {"operator/Dockerfile": "operator.txt", "trainer_image/Dockerfile": "trainer.txt"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@dataclass(frozen=True)
class Instruction:
    word: str
    text: str


def read(file: str) -> list[Instruction]:
    """The instructions, continued lines joined, comments left out."""
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [Instruction(*line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def last_stage(file: str) -> list[Instruction]:
    instructions = read(file)
    start = max(i for i, instruction in enumerate(instructions) if instruction.word == "FROM")
    return instructions[start:]


def copied(file: str) -> list[str]:
    """Sources that are copied from the build context."""
    sources: list[str] = []
    for instruction in read(file):
        if instruction.word == "COPY" and not instruction.text.startswith("--from="):
            sources += instruction.text.split()[:-1]
    return sources


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path out of the build context; the last matching line counts."""
    verdict = False
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pattern = line.removeprefix("!")
        parents = ["/".join(path.split("/")[: i + 1]) for i in range(len(path.split("/")))]
        names = [pattern, pattern.removeprefix("**/")]
        if any(fnmatch.fnmatch(parent, name) for parent in parents for name in names):
            verdict = not line.startswith("!")
    return verdict


@pytest.mark.parametrize("file", FILES)
def test_everything_that_is_copied_exists_and_is_in_the_context(file: str) -> None:
    sources = copied(file)
    assert f"requirements/{PINNED[file]}" in sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert not ignored(source), source


@pytest.mark.parametrize("file", FILES)
def test_the_linter_has_nothing_to_say(file: str) -> None:
    program = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([program, "--no-color", ROOT / file], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout


@pytest.mark.parametrize(
    "path", [".git/config", ".venv/bin/python", "operator/.env", "tests/conftest.py", "key.pem", "helm/x"]
)
def test_nothing_else_is_in_the_context(path: str) -> None:
    assert ignored(path)


@pytest.mark.parametrize("file", FILES)
def test_the_wheel_is_built_from_what_the_context_has(file: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for package in project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        assert not ignored(f"{package}/__init__.py")
        assert package.split("/")[0] in copied(file)
    assert PROJECT["readme"] in copied(file)


@pytest.mark.parametrize("file", FILES)
def test_the_image_runs_as_a_numeric_user_that_the_pods_name(file: str) -> None:
    from finetune_operator.manifests import pods

    (user,) = [i.text for i in last_stage(file) if i.word == "USER"]
    number = int(user.split(":")[0])
    values = yaml.safe_load((ROOT / CHART / "values.yaml").read_text(encoding="utf-8"))
    wanted = {
        "operator/Dockerfile": values["podSecurityContext"]["runAsUser"],
        "trainer_image/Dockerfile": pods.USER,
    }
    assert number == wanted[file]
    assert number != 0


@pytest.mark.parametrize("file", FILES)
def test_the_command_is_an_entry_point_of_the_project(file: str) -> None:
    (command,) = [i.text for i in last_stage(file) if i.word == "CMD"]
    program = re.findall(r'"([^"]+)"', command)[0]
    assert program in PROJECT["scripts"]
    module, function = PROJECT["scripts"][program].split(":")
    root = "trainer_image" if module.startswith(("finetune_trainer", "finetune_server")) else "operator"
    source = (ROOT / root / Path(*module.split("."))).with_suffix(".py").read_text()
    assert f"def {function}(" in source


@pytest.mark.parametrize("file", FILES)
def test_the_path_finds_the_programs(file: str) -> None:
    (environment,) = [i.text for i in last_stage(file) if i.word == "ENV"]
    assert re.search(r"\bPATH=/opt/finetune/bin:", environment)
    assert any(i.word == "COPY" and i.text.endswith("/opt/finetune /opt/finetune") for i in last_stage(file))


@pytest.mark.parametrize("file", FILES)
def test_no_stage_takes_what_is_not_pinned(file: str) -> None:
    """Python packages come from requirements/*.txt and from our own wheel only."""
    for instruction in read(file):
        for install in re.findall(r"pip install ([^&;]*)", instruction.text):
            assert re.search(r"--requirement |/wheels/|\^torch==", install), install
        assert not re.search(r"(curl|wget|ADD) ", f"{instruction.word} {instruction.text} ")
        assert not re.search(r"(?i)(password|secret|token)=", instruction.text)


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "requirements").glob("*.txt")))
def test_pins_are_names_and_versions(name: str) -> None:
    for line in (ROOT / "requirements" / name).read_text().splitlines():
        assert re.fullmatch(r"[a-z0-9._-]+==[A-Za-z0-9.+!]+", line), line


@pytest.mark.parametrize("file", FILES)
def test_one_pin_per_package_over_all_files(file: str) -> None:
    """What the images hold is what the tests ran with."""
    tested = _pins("dev.txt")
    for name, version in _pins(PINNED[file]).items():
        assert tested.get(name) == version, name


@pytest.mark.parametrize("file", FILES)
def test_the_operators_dependencies_are_in_the_image(file: str) -> None:
    wanted = {re.split(r"[<>=\[]", text)[0] for text in PROJECT["dependencies"]}
    if file.startswith("trainer"):
        wanted |= {re.split(r"[<>=\[]", text)[0] for text in PROJECT["optional-dependencies"]["trainer"]}
    assert wanted <= set(_pins(PINNED[file]))


def _pins(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / name).read_text().split()
    return dict(line.split("==", 1) for line in lines)


@pytest.mark.parametrize("image", cluster_images.IMAGES, ids=lambda image: image.name)
def test_images_for_tests_end_as_the_dockerfile_ends(image: cluster_images.Image) -> None:
    environment, user, workdir = cluster_images.last_stage(image.dockerfile)
    assert any(variable.startswith("PATH=/opt/finetune/bin:") for variable in environment)
    assert re.fullmatch(r"[0-9]+:[0-9]+", user)
    assert workdir.startswith("/")
    assert image.requirements == PINNED[image.dockerfile]

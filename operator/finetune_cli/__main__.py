"""Entry point of `finetune`. One module per subcommand group; heavy imports happen inside the commands."""

from __future__ import annotations

import importlib.metadata
import io
import os
import signal
import sys
from pathlib import Path
from typing import Annotated

# Ctrl-C while the modules below are loaded ends the process without a traceback.
_on_interrupt = signal.getsignal(signal.SIGINT)
if _on_interrupt is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import typer

from finetune_cli import job_planning, jobs, local, rollouts, shared

signal.signal(signal.SIGINT, _on_interrupt)

app = typer.Typer(
    name="finetune",
    help="Fine-tune language models on Kubernetes, bring the adapters to users, and run the whole stack on a laptop.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.add_typer(jobs.app, name="jobs")
app.add_typer(rollouts.app, name="rollout")
app.add_typer(local.app, name="local")
app.command("plan")(job_planning.plan)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"finetune {importlib.metadata.version('finetune-operator')}")
        raise typer.Exit


@app.callback()
def _of_all_commands(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    pass


def main() -> None:
    _settle_streams()
    try:
        app()
    except OSError as error:
        if error.errno not in shared.NO_ROOM:
            raise
        typer.secho(f"error: the output cannot be written: {error.strerror}", fg="red", err=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python tries once more to write what is left
        sys.exit(shared.NOT_FOUND)


def _settle_streams() -> None:
    """A shell's `>&-` and `<&-`, and some that start services, leave a stream closed: Python has none then. And what
    the terminal's encoding lacks (a spinner, a letter of a name) is escaped, as Python does it on stderr."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115 - until the end
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    main()

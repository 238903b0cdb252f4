"""`finetune jobs`: FineTuneJobs for people. Also `kubectl finetune jobs`."""

from __future__ import annotations

import sys
import time
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from finetune_cli import connections, job_pages, job_screens, job_views, screens, shared, texts, watches
from finetune_cli.kinds import JOB
from finetune_cli.shared import (
    ContextOption,
    EverywhereOption,
    FilesOption,
    KubeconfigOption,
    NamespaceOption,
    Output,
    OutputOption,
    WatchOutput,
)

app = typer.Typer(help="Watch, explain and check FineTuneJobs.", no_args_is_help=True)

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of the FineTuneJob.")]


@app.command("list")
def list_jobs(
    namespace: NamespaceOption = None,
    everywhere: EverywhereOption = False,
    output: OutputOption = Output.TABLE,
    kubeconfig: KubeconfigOption = None,
    context: ContextOption = None,
) -> None:
    """The jobs and how far they are."""
    with shared.told(kubeconfig, context, JOB) as connection:
        where = namespace or connection.namespace
        found = shared.list_objects(connection, JOB, None if everywhere else where)
    if output is not Output.TABLE:
        shared.echo_data(found, as_yaml=output is Output.YAML)
    elif not found:
        typer.echo("No FineTuneJobs." if everywhere else f"No FineTuneJobs in namespace {where}.", err=True)
    else:
        rows = job_views.list_rows(found, datetime.now(UTC), namespaces=everywhere)
        screens.print_table(rows, colours=job_screens.COLOURS)


@app.command()
def watch(
    name: NameArgument,
    namespace: NamespaceOption = None,
    timeout: Annotated[
        str | None, typer.Option(help="Give up after this time, for example 90s, 10m or 2h; exit code 124.")
    ] = None,
    output: Annotated[
        WatchOutput, typer.Option("--output", "-o", help="text, or json or yaml: the final status.")
    ] = WatchOutput.TEXT,
    kubeconfig: KubeconfigOption = None,
    context: ContextOption = None,
) -> None:
    """Follow a job to its end.

    Exit code 0: succeeded. 1: failed or cancelled. 2: no such job. 124: --timeout is over.
    """
    deadline = None if timeout is None else time.monotonic() + shared.parse_seconds(timeout)
    # With -o json only the final status goes to stdout.
    stream = sys.stdout if output is WatchOutput.TEXT else sys.stderr
    with shared.told(kubeconfig, context, JOB) as connection:
        screen = screens.open_screen(stream, job_screens.VIEW)
        try:
            job = _watch(connection, namespace or connection.namespace, name, deadline, screen)
        except watches.WatchTimeoutError:
            shared.fail(f"{name} has not ended within {timeout} (--timeout); it goes on", shared.TIMED_OUT)
        except KeyboardInterrupt:
            shared.fail(f"stopped watching; {name} goes on", shared.INTERRUPTED)
    if output is WatchOutput.TEXT:
        typer.echo("\n".join(job_views.final_lines(job)))
    else:
        shared.echo_data(texts.status_of(job), as_yaml=output is WatchOutput.YAML)
    raise typer.Exit(job_views.exit_code(job) or 0)


def _watch(
    connection: connections.Connection,
    namespace: str,
    name: str,
    deadline: float | None,
    screen: screens.Screen,
) -> dict[str, Any]:
    """Shows the job until it has ended; returns it."""
    with screen:
        for job in watches.follow(
            connection.api, JOB, namespace, name, deadline=deadline, on_trouble=screen.trouble
        ):
            screen.show(job)
            if job_views.exit_code(job) is not None:
                return job
    raise AssertionError("follow() ends only by an exception")


@app.command()
def describe(
    name: NameArgument,
    namespace: NamespaceOption = None,
    kubeconfig: KubeconfigOption = None,
    context: ContextOption = None,
) -> None:
    """One page on a job: what it is, why it is where it is, and what to do."""
    with shared.told(kubeconfig, context, JOB) as connection:
        job = watches.get_object(connection.api, JOB, namespace or connection.namespace, name)
        events = shared.list_events(connection, job)
    typer.echo(job_pages.describe(job, events, datetime.now(UTC)))


@app.command()
def validate(
    files: FilesOption,
    namespace: NamespaceOption = None,
    kubeconfig: KubeconfigOption = None,
    context: ContextOption = None,
) -> None:
    """Have the API server check files without creating anything.

    Exit code 0: all are valid. 1: at least one is not. 2: a file cannot be read.
    """
    valid = shared.validate_files(files, JOB, namespace=namespace, kubeconfig=kubeconfig, context=context)
    raise typer.Exit(0 if valid else shared.INVALID)

"""`finetune jobs`: FineTuneJobs for people. Also `kubectl finetune jobs`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer

from finetune_cli import commands, job_pages, job_screens, job_views, shared, watches
from finetune_cli.kinds import JOB
from finetune_cli.shared import (
    ContextOption,
    KubeconfigOption,
    NamespaceOption,
    WatchOutput,
    WatchOutputOption,
    WatchTimeoutOption,
)

app = typer.Typer(help="Watch, explain and check FineTuneJobs.", no_args_is_help=True)

GROUP = commands.Group(
    kind=JOB,
    view=job_screens.VIEW,
    colours=job_screens.COLOURS,
    list_rows=job_views.list_rows,
    exit_code=job_views.exit_code,
    final_lines=job_views.final_lines,
)
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of the FineTuneJob.")]


commands.add_list(app, GROUP, "The jobs and how far they are.")


@app.command()
def watch(
    name: NameArgument,
    namespace: NamespaceOption = None,
    timeout: WatchTimeoutOption = None,
    output: WatchOutputOption = WatchOutput.TEXT,
    kubeconfig: KubeconfigOption = None,
    context: ContextOption = None,
) -> None:
    """Follow a job to its end.

    Exit code 0: succeeded. 1: failed or cancelled. 2: no such job. 124: --timeout is over.
    """
    commands.watch(
        GROUP,
        name,
        namespace=namespace,
        timeout=timeout,
        output=output,
        kubeconfig=kubeconfig,
        context=context,
    )


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


commands.add_validate(app, JOB)

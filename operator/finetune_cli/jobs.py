"""`finetune jobs`: FineTuneJobs for people. Also `kubectl finetune jobs`."""

from __future__ import annotations

from typing import Annotated

import typer

from finetune_cli import commands, job_pages, job_screens, job_views
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
    page=job_pages.describe,
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


commands.add_describe(app, GROUP, "One page on a job: what it is, why it is where it is, and what to do.")
commands.add_validate(app, JOB)

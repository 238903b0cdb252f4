"""`finetune jobs`: FineTuneJobs for people. Also `kubectl finetune jobs`."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from finetune_cli import connections, job_checks, job_files, job_pages, job_screens, job_views, job_watches
from finetune_operator.api import finetunejob
from finetune_operator.api.base import GROUP, VERSION

NOT_FOUND = 2
INVALID = 1
TIMED_OUT = 124
INTERRUPTED = 130

app = typer.Typer(help="Watch, explain and check FineTuneJobs.", no_args_is_help=True)


class Output(StrEnum):
    TABLE = "table"
    JSON = "json"


class WatchOutput(StrEnum):
    TEXT = "text"
    JSON = "json"


NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of the FineTuneJob.")]
NamespaceOption = Annotated[
    str | None,
    typer.Option("--namespace", "-n", help="Namespace; default: the one of the kubeconfig's context."),
]
KubeconfigOption = Annotated[
    Path | None,
    typer.Option(help="Default: KUBECONFIG, ~/.kube/config, or else the laptop cluster's."),
]
ContextOption = Annotated[str | None, typer.Option(help="Context of the kubeconfig.")]


@app.command("list")
def list_jobs(
    namespace: NamespaceOption = None,
    everywhere: Annotated[bool, typer.Option("--all-namespaces", "-A", help="In all namespaces.")] = False,
    output: Annotated[Output, typer.Option("--output", "-o", help="table or json")] = Output.TABLE,
    kubeconfig: KubeconfigOption = None,
    context: ContextOption = None,
) -> None:
    """The jobs and how far they are."""
    from kubernetes import client

    with _told(kubeconfig, context) as connection:
        objects = client.CustomObjectsApi(connection.api)
        if everywhere:
            found = objects.list_cluster_custom_object(GROUP, VERSION, finetunejob.PLURAL)
        else:
            where = namespace or connection.namespace
            found = objects.list_namespaced_custom_object(GROUP, VERSION, where, finetunejob.PLURAL)
    if output is Output.JSON:
        typer.echo(json.dumps(found["items"], indent=2))
    elif not found["items"]:
        typer.echo("No FineTuneJobs." if everywhere else f"No FineTuneJobs in namespace {where}.", err=True)
    else:
        job_screens.print_table(job_views.list_rows(found["items"], datetime.now(UTC), namespaces=everywhere))


@app.command()
def watch(
    name: NameArgument,
    namespace: NamespaceOption = None,
    timeout: Annotated[
        str | None, typer.Option(help="Give up after this time, for example 90s, 10m or 2h; exit code 124.")
    ] = None,
    output: Annotated[
        WatchOutput, typer.Option("--output", "-o", help="text, or json: the final status as JSON.")
    ] = WatchOutput.TEXT,
    kubeconfig: KubeconfigOption = None,
    context: ContextOption = None,
) -> None:
    """Follow a job to its end.

    Exit code 0: succeeded. 1: failed or cancelled. 2: no such job. 124: --timeout is over.
    """
    deadline = None if timeout is None else time.monotonic() + parse_seconds(timeout)
    with _told(kubeconfig, context) as connection:
        # With -o json only the final status goes to stdout.
        screen = job_screens.open_screen(sys.stderr if output is WatchOutput.JSON else sys.stdout)
        try:
            job = _watch(connection, namespace or connection.namespace, name, deadline, screen)
        except job_watches.WatchTimeoutError:
            _fail(f"{name} has not ended within {timeout} (--timeout); it goes on", TIMED_OUT)
        except KeyboardInterrupt:
            _fail(f"stopped watching; {name} goes on", INTERRUPTED)
    if output is WatchOutput.JSON:
        typer.echo(json.dumps(job_views.status_of(job), indent=2))
    else:
        typer.echo("\n".join(job_views.final_lines(job)))
    raise typer.Exit(job_views.exit_code(job) or 0)


def _watch(
    connection: connections.Connection,
    namespace: str,
    name: str,
    deadline: float | None,
    screen: job_screens.Screen,
) -> dict[str, Any]:
    """Shows the job until it has ended; returns it."""
    with screen:
        for job in job_watches.follow(
            connection.api, namespace, name, deadline=deadline, on_trouble=screen.trouble
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
    from kubernetes import client

    with _told(kubeconfig, context) as connection:
        where = namespace or connection.namespace
        job = job_watches.get_job(connection.api, where, name)
        selector = f"involvedObject.uid={job['metadata']['uid']}"
        events = client.CoreV1Api(connection.api).list_namespaced_event(where, field_selector=selector)
        plain = connection.api.sanitize_for_serialization(events)["items"]
    typer.echo(job_pages.describe(job, plain, datetime.now(UTC)))


@app.command()
def validate(
    files: Annotated[
        list[str],
        typer.Option("--filename", "-f", help="File with FineTuneJobs; - reads from standard input."),
    ],
    namespace: NamespaceOption = None,
    kubeconfig: KubeconfigOption = None,
    context: ContextOption = None,
) -> None:
    """Have the API server check files without creating anything.

    Exit code 0: all are valid. 1: at least one is not. 2: a file cannot be read.
    """
    valid = True
    for file in files:
        try:
            text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
            jobs = job_files.load_jobs(text)
        except (OSError, UnicodeDecodeError, job_files.UnreadableFileError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            _fail(f"{file}: {reason}", NOT_FOUND)
        with _told(kubeconfig, context) as connection:
            for job in jobs:
                meta = job.get("metadata") or {}
                where = namespace or meta.get("namespace") or connection.namespace
                problems = job_checks.find_problems(connection.api, where, job)
                valid = valid and not problems
                title = f"{file}: {finetunejob.KIND} {meta.get('name') or meta.get('generateName', '')}"
                typer.echo(f"{title}: {'not valid' if problems else 'valid'}")
                for problem in problems:
                    typer.echo(f"  {problem}")
    raise typer.Exit(0 if valid else INVALID)


def parse_seconds(text: str) -> float:
    """90, 90s, 10m or 2h in seconds. Raises typer.BadParameter."""
    units = {"s": 1, "m": 60, "h": 3600}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1)
    try:
        seconds = float(number) * unit
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise typer.BadParameter(
            f"{text!r} is not a time; write for example 90s, 10m or 2h", param_hint="--timeout"
        )
    return seconds


@contextlib.contextmanager
def _told(kubeconfig: Path | None, context: str | None) -> Iterator[connections.Connection]:
    """A connection, and errors of it in one sentence with exit code 2."""
    from kubernetes import client
    from urllib3.exceptions import HTTPError

    connection = None
    try:
        connection = connections.connect(kubeconfig, context)
        yield connection
    except BrokenPipeError:  # the reader of our output has gone, for example head
        raise
    except (connections.NoClusterError, job_watches.JobNotFoundError) as error:
        _fail(str(error), NOT_FOUND)
    except client.ApiException as error:
        _fail(_explain(error), NOT_FOUND)
    except (HTTPError, OSError) as error:
        server = connection.server if connection else "the cluster"
        _fail(f"{server} does not answer ({type(error).__name__}); is the cluster up?", NOT_FOUND)


def _explain(error: Any) -> str:
    try:
        message = json.loads(error.body)["message"]
    except (TypeError, ValueError, KeyError):
        message = error.reason
    if error.status == 404:
        message = f"this cluster has no {finetunejob.KIND} ({GROUP}/{VERSION}); install the operator's CRDs"
    return f"the API server refuses ({error.status}): {message}" if error.status != 404 else message


def _fail(message: str, code: int) -> NoReturn:
    typer.secho(f"error: {message}", fg="red", err=True)
    raise typer.Exit(code)

"""`finetune rollout`: AdapterDeployments for people, with the verbs of `kubectl argo rollouts`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from finetune_cli import (
    connections,
    pages,
    rollout_pages,
    rollout_planning,
    rollout_screens,
    rollout_verbs,
    rollout_views,
    screens,
    shared,
    texts,
    watches,
)
from finetune_cli.kinds import DEPLOYMENT
from finetune_cli.rollout_verbs import NameArgument
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

EVENT_SECONDS = 2.0  # at least, between two readings of the events

app = typer.Typer(help="Watch, steer, explain and plan rollouts of adapters.", no_args_is_help=True)


@app.command("list")
def list_rollouts(
    namespace: NamespaceOption = None,
    everywhere: EverywhereOption = False,
    output: OutputOption = Output.TABLE,
    kubeconfig: KubeconfigOption = None,
    context: ContextOption = None,
) -> None:
    """The deployments, what serves, and how far their rollouts are."""
    with shared.told(kubeconfig, context, DEPLOYMENT) as connection:
        where = namespace or connection.namespace
        found = shared.list_objects(connection, DEPLOYMENT, None if everywhere else where)
    if output is not Output.TABLE:
        shared.echo_data(found, as_yaml=output is Output.YAML)
    elif not found:
        typer.echo(
            "No AdapterDeployments." if everywhere else f"No AdapterDeployments in namespace {where}.",
            err=True,
        )
    else:
        rows = rollout_views.list_rows(found, datetime.now(UTC), namespaces=everywhere)
        screens.print_table(rows, colours=rollout_screens.COLOURS)


@app.command()
def watch(
    name: NameArgument,
    namespace: NamespaceOption = None,
    timeout: Annotated[
        str | None, typer.Option(help="Give up after this time, for example 90s, 10m or 2h; exit code 124.")
    ] = None,
    forever: Annotated[
        bool, typer.Option("--forever", help="Go on when the rollout is over, and show the next one.")
    ] = False,
    output: Annotated[
        WatchOutput, typer.Option("--output", "-o", help="text, or json or yaml: the final status.")
    ] = WatchOutput.TEXT,
    kubeconfig: KubeconfigOption = None,
    context: ContextOption = None,
) -> None:
    """Follow a rollout to its end.

    Exit code 0: the wanted adapter serves. 1: it was rolled back. 2: no such deployment. 124: --timeout is over.
    """
    deadline = None if timeout is None else time.monotonic() + shared.parse_seconds(timeout)
    # With -o json only the final status goes to stdout.
    stream = sys.stdout if output is WatchOutput.TEXT else sys.stderr
    with shared.told(kubeconfig, context, DEPLOYMENT) as connection:
        screen = screens.open_screen(stream, rollout_screens.VIEW)
        where = namespace or connection.namespace
        try:
            rollout = _watch(connection, where, name, deadline, screen, forever=forever)
        except watches.WatchTimeoutError:
            shared.fail(f"{name} has not ended within {timeout} (--timeout); it goes on", shared.TIMED_OUT)
        except KeyboardInterrupt:
            shared.fail(f"stopped watching; {name} goes on", shared.INTERRUPTED)
    if output is WatchOutput.TEXT:
        typer.echo("\n".join(rollout_views.final_lines(rollout)))
    else:
        shared.echo_data(texts.status_of(rollout), as_yaml=output is WatchOutput.YAML)
    raise typer.Exit(rollout_views.exit_code(rollout) or 0)


def _watch(
    connection: connections.Connection,
    namespace: str,
    name: str,
    deadline: float | None,
    screen: screens.Screen,
    *,
    forever: bool,
) -> dict[str, Any]:
    """Shows the rollout until it has ended; returns it."""
    changes = watches.follow(
        connection.api, DEPLOYMENT, namespace, name, deadline=deadline, on_trouble=screen.trouble
    )
    with screen:
        for rollout in _with_events(connection, changes):
            screen.show(rollout)
            if not forever and rollout_views.exit_code(rollout) is not None:
                return rollout
    raise AssertionError("follow() ends only by an exception")


def _with_events(
    connection: connections.Connection, changes: Iterator[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Each object with its Event objects under `events`, read again now and then; without them where they cannot be
    read, because the rollout is what matters."""
    from kubernetes import client
    from urllib3.exceptions import HTTPError

    events: list[Mapping[str, Any]] = []
    read = -EVENT_SECONDS
    for one in changes:
        if time.monotonic() - read >= EVENT_SECONDS:
            try:
                events = list(pages.last_events(shared.list_events(connection, one)))
            except (client.ApiException, HTTPError, OSError):
                events = []
            read = time.monotonic()
        yield {**one, "events": events}


@app.command()
def describe(
    name: NameArgument,
    namespace: NamespaceOption = None,
    kubeconfig: KubeconfigOption = None,
    context: ContextOption = None,
) -> None:
    """One page on a deployment: what serves, why the rollout is where it is, and what to do."""
    with shared.told(kubeconfig, context, DEPLOYMENT) as connection:
        rollout = watches.get_object(connection.api, DEPLOYMENT, namespace or connection.namespace, name)
        events = shared.list_events(connection, rollout)
    typer.echo(rollout_pages.describe(rollout, events, datetime.now(UTC)))


@app.command()
def history(
    name: NameArgument,
    namespace: NamespaceOption = None,
    output: OutputOption = Output.TABLE,
    kubeconfig: KubeconfigOption = None,
    context: ContextOption = None,
) -> None:
    """The rollouts that are over, newest first."""
    with shared.told(kubeconfig, context, DEPLOYMENT) as connection:
        rollout = watches.get_object(connection.api, DEPLOYMENT, namespace or connection.namespace, name)
    if output is not Output.TABLE:
        shared.echo_data(texts.status_of(rollout).get("history") or [], as_yaml=output is Output.YAML)
    else:
        screens.print_table(rollout_views.history_rows(rollout, datetime.now(UTC)), colours={})


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
    valid = shared.validate_files(
        files, DEPLOYMENT, namespace=namespace, kubeconfig=kubeconfig, context=context
    )
    raise typer.Exit(0 if valid else shared.INVALID)


app.command()(rollout_planning.plan)
rollout_verbs.register(app)

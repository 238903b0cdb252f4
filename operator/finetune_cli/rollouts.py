"""`finetune rollout`: AdapterDeployments for people, with the verbs of `kubectl argo rollouts`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Annotated, Any

import typer

from finetune_cli import (
    commands,
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
    KubeconfigOption,
    NamespaceOption,
    Output,
    OutputOption,
    WatchOutput,
    WatchOutputOption,
    WatchTimeoutOption,
)

EVENT_SECONDS = 2.0  # at least, between two readings of the events

app = typer.Typer(help="Watch, steer, explain and plan rollouts of adapters.", no_args_is_help=True)


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


GROUP = commands.Group(
    kind=DEPLOYMENT,
    view=rollout_screens.VIEW,
    colours=rollout_screens.COLOURS,
    list_rows=rollout_views.list_rows,
    exit_code=rollout_views.exit_code,
    final_lines=rollout_views.final_lines,
    page=rollout_pages.describe,
    complete=_with_events,
)


commands.add_list(app, GROUP, "The deployments, what serves, and how far their rollouts are.")


@app.command()
def watch(
    name: NameArgument,
    namespace: NamespaceOption = None,
    timeout: WatchTimeoutOption = None,
    forever: Annotated[
        bool, typer.Option("--forever", help="Go on when the rollout is over, and show the next one.")
    ] = False,
    output: WatchOutputOption = WatchOutput.TEXT,
    kubeconfig: KubeconfigOption = None,
    context: ContextOption = None,
) -> None:
    """Follow a rollout to its end.

    Exit code 0: the wanted adapter serves. 1: it was rolled back. 2: no such deployment. 124: --timeout is over.
    """
    commands.watch(
        GROUP,
        name,
        namespace=namespace,
        timeout=timeout,
        output=output,
        kubeconfig=kubeconfig,
        context=context,
        forever=forever,
    )


commands.add_describe(
    app, GROUP, "One page on a deployment: what serves, why the rollout is where it is, and what to do."
)


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


commands.add_validate(app, DEPLOYMENT)
app.command()(rollout_planning.plan)
rollout_verbs.register(app)

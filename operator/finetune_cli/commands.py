"""The commands that jobs and rollouts have in common: `list`, `watch`, `describe` and `validate`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from finetune_cli import checks, screens, shared, specs, texts, watches
from finetune_cli.connections import Connection
from finetune_cli.kinds import Kind
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
from finetune_cli.watches import Object


@dataclass(frozen=True)
class Group:
    """How the objects of one kind are shown."""

    kind: Kind
    view: screens.View
    colours: Mapping[str, str]
    """Of the phases in a list."""
    list_rows: Callable[..., list[list[str]]]
    exit_code: Callable[[Mapping[str, Any]], int | None]
    """Of `watch`; None while the object has not come to its end."""
    final_lines: Callable[[Mapping[str, Any]], list[str]]
    page: Callable[[Object, Sequence[Object], datetime], str]
    """Of `describe`: the object, its Event objects, and now."""
    complete: Callable[[Connection, Iterator[Object]], Iterator[Object]] = lambda connection, changes: changes
    """Adds to each object what a watch shows and the object does not hold."""


def add_list(app: typer.Typer, group: Group, text: str) -> None:
    """Add `list` to the commands of a group; `text` is its help."""

    @app.command("list", help=text)
    def list_all(
        namespace: NamespaceOption = None,
        everywhere: EverywhereOption = False,
        output: OutputOption = Output.TABLE,
        kubeconfig: KubeconfigOption = None,
        context: ContextOption = None,
    ) -> None:
        with shared.told(kubeconfig, context, group.kind) as connection:
            where = namespace or connection.namespace
            found = shared.list_objects(connection, group.kind, None if everywhere else where)
        if output is not Output.TABLE:
            shared.echo_data(found, as_yaml=output is Output.YAML)
        elif not found:
            place = "" if everywhere else f" in namespace {where}"
            typer.echo(f"No {group.kind.name}s{place}.", err=True)
        else:
            rows = group.list_rows(found, datetime.now(UTC), namespaces=everywhere)
            screens.print_table(rows, colours=group.colours)


def add_describe(app: typer.Typer, group: Group, text: str) -> None:
    """Add `describe` to the commands of a group; `text` is its help."""
    argument = typer.Argument(metavar="NAME", help=f"Name of the {group.kind.name}.")

    @app.command(help=text)
    def describe(
        name: str = argument,
        namespace: NamespaceOption = None,
        kubeconfig: KubeconfigOption = None,
        context: ContextOption = None,
    ) -> None:
        with shared.told(kubeconfig, context, group.kind) as connection:
            where = namespace or connection.namespace
            one = watches.get_object(connection.api, group.kind, where, name)
            events = shared.list_events(connection, one)
        typer.echo(group.page(one, events, datetime.now(UTC)))


def add_validate(app: typer.Typer, kind: Kind) -> None:
    """Add `validate` to the commands of a group."""

    @app.command()
    def validate(
        files: FilesOption,
        offline: Annotated[
            bool,
            typer.Option(
                "--offline", help="Ask no cluster: check against the CRDs of this version of finetune."
            ),
        ] = False,
        namespace: NamespaceOption = None,
        kubeconfig: KubeconfigOption = None,
        context: ContextOption = None,
    ) -> None:
        """Have the API server check files without creating anything.

        Exit code 0: all are valid. 1: at least one is not. 2: a file cannot be read.
        """
        valid = True
        for file in files:
            found = shared.read_objects(file, kind)
            with nullcontext() if offline else shared.told(kubeconfig, context, kind) as connection:
                for one in found:
                    problems = (
                        specs.find_problems(kind, one)
                        if connection is None
                        else checks.find_problems(connection, kind, namespace, one)
                    )
                    valid = valid and not problems
                    shared.print_verdict(file, kind, one, problems)
        raise typer.Exit(0 if valid else shared.INVALID)


def watch(
    group: Group,
    name: str,
    *,
    namespace: str | None,
    timeout: str | None,
    output: WatchOutput,
    kubeconfig: Path | None,
    context: str | None,
    forever: bool = False,
) -> None:
    """Show an object until it has come to its end; ends the command with the exit code that says how."""
    deadline = None if timeout is None else time.monotonic() + shared.parse_seconds(timeout)
    # With -o json only the final status goes to stdout.
    screen = screens.open_screen(sys.stdout if output is WatchOutput.TEXT else sys.stderr, group.view)
    with shared.told(kubeconfig, context, group.kind) as connection:
        where = namespace or connection.namespace
        changes = watches.follow(
            connection.api, group.kind, where, name, deadline=deadline, on_trouble=screen.trouble
        )
        try:
            one = _show(group, screen, group.complete(connection, changes), forever=forever)
        except watches.WatchTimeoutError:
            shared.fail(f"{name} has not ended within {timeout} (--timeout); it goes on", shared.TIMED_OUT)
        except KeyboardInterrupt:
            shared.fail(f"stopped watching; {name} goes on", shared.INTERRUPTED)
    if output is WatchOutput.TEXT:
        typer.echo("\n".join(group.final_lines(one)))
    else:
        shared.echo_data(texts.status_of(one), as_yaml=output is WatchOutput.YAML)
    raise typer.Exit(group.exit_code(one) or 0)


def _show(group: Group, screen: screens.Screen, changes: Iterator[Object], *, forever: bool) -> Object:
    """Shows the object until it has come to its end; returns it."""
    with screen:
        for one in changes:
            screen.show(one)
            if not forever and group.exit_code(one) is not None:
                return one
    raise AssertionError("follow() ends only by an exception")

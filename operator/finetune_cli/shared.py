"""What all groups of commands have in common: options, exit codes, errors in one sentence, `validate`."""

from __future__ import annotations

import contextlib
import errno
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import yaml

from finetune_cli import connections, files, watches
from finetune_cli.kinds import Kind
from finetune_operator.api import rules
from finetune_operator.api.base import GROUP, VERSION

INVALID = 1
NOT_FOUND = 2
TIMED_OUT = 124
INTERRUPTED = 130
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
"""What the system says where standard output is a file that takes no more."""


class Output(StrEnum):
    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


class WatchOutput(StrEnum):
    TEXT = "text"
    JSON = "json"
    YAML = "yaml"


def _namespace(text: str | None) -> str | None:
    """Another text would be another path of the API, where nothing is."""
    if text and not re.fullmatch(rules.NAMESPACE, text):
        raise typer.BadParameter(f"{text!r} is no name of a namespace")
    return text


NamespaceOption = Annotated[
    str | None,
    typer.Option(
        "--namespace",
        "-n",
        help="Namespace; default: the one of the kubeconfig's context.",
        callback=_namespace,
    ),
]
KubeconfigOption = Annotated[
    Path | None,
    typer.Option(help="Default: KUBECONFIG, ~/.kube/config, or else the laptop cluster's."),
]
ContextOption = Annotated[str | None, typer.Option(help="Context of the kubeconfig.")]
OutputOption = Annotated[Output, typer.Option("--output", "-o", help="table, json or yaml")]
WatchOutputOption = Annotated[
    WatchOutput, typer.Option("--output", "-o", help="text, or json or yaml: the final status.")
]
WatchTimeoutOption = Annotated[
    str | None,
    typer.Option("--timeout", help="Give up after this time, for example 90s, 10m or 2h; exit code 124."),
]
EverywhereOption = Annotated[bool, typer.Option("--all-namespaces", "-A", help="In all namespaces.")]
FilesOption = Annotated[
    list[str], typer.Option("--filename", "-f", help="YAML or JSON file; - reads from standard input.")
]


def parse_seconds(text: str, *, option: str = "--timeout") -> float:
    """90, 90s, 10m or 2h in seconds. Raises typer.BadParameter."""
    units = {"s": 1, "m": 60, "h": 3600}
    number, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1)
    try:
        seconds = float(number) * unit
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise typer.BadParameter(
            f"{text!r} is not a time; write for example 90s, 10m or 2h", param_hint=option
        )
    return seconds


def echo_data(value: Any, *, as_yaml: bool) -> None:
    """The value as YAML or as JSON on standard output."""
    typer.echo(
        yaml.safe_dump(value, sort_keys=False, allow_unicode=True).rstrip()
        if as_yaml
        else json.dumps(value, indent=2)
    )


def list_objects(
    connection: connections.Connection, kind: Kind, namespace: str | None
) -> list[dict[str, Any]]:
    """The objects of a namespace; None: of all. Without managedFields, which kubectl does not show either."""
    from kubernetes import client

    objects = client.CustomObjectsApi(connection.api)
    if namespace is None:
        found = objects.list_cluster_custom_object(
            GROUP, VERSION, kind.plural, _request_timeout=watches.REQUEST_TIMEOUT
        )
    else:
        found = objects.list_namespaced_custom_object(
            GROUP, VERSION, namespace, kind.plural, _request_timeout=watches.REQUEST_TIMEOUT
        )
    items: list[dict[str, Any]] = found["items"]
    for item in items:
        item["metadata"].pop("managedFields", None)
    return items


def list_events(connection: connections.Connection, one: dict[str, Any]) -> list[dict[str, Any]]:
    """The Event objects about an object, in any order."""
    from kubernetes import client

    meta = one["metadata"]
    found = client.CoreV1Api(connection.api).list_namespaced_event(
        meta["namespace"],
        field_selector=f"involvedObject.uid={meta['uid']}",
        _request_timeout=watches.REQUEST_TIMEOUT,
    )
    events: list[dict[str, Any]] = connection.api.sanitize_for_serialization(found)["items"]
    return events


def read_objects(file: str, kind: Kind) -> list[dict[str, Any]]:
    """The objects of the kind in a file, or in standard input for `-`; ends the command when it cannot be read."""
    try:
        text = sys.stdin.read() if file == "-" else Path(file).read_text(encoding="utf-8")
        return files.load_objects(text, kind)
    except (OSError, UnicodeDecodeError, files.UnreadableFileError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        fail(f"{file}: {reason}", NOT_FOUND)


def print_verdict(file: str, kind: Kind, one: Mapping[str, Any], problems: Sequence[str]) -> None:
    """Say whether an object of a file is valid, and what is wrong with it."""
    meta = one.get("metadata") or {}
    name = meta.get("name") or meta.get("generateName") or ""
    typer.echo(f"{file}: {kind.name} {name}: {'not valid' if problems else 'valid'}")
    for problem in problems:
        typer.echo(f"  {problem}")


@contextlib.contextmanager
def told(kubeconfig: Path | None, context: str | None, kind: Kind) -> Iterator[connections.Connection]:
    """A connection, and errors of it in one sentence with exit code 2."""
    from kubernetes import client
    from urllib3.exceptions import HTTPError, MaxRetryError, SSLError

    connection = None
    try:
        connection = connections.connect(kubeconfig, context)
        yield connection
    except BrokenPipeError:  # the reader of our output has gone, for example head
        raise
    except (connections.NoClusterError, watches.NotFoundError) as error:
        fail(str(error), NOT_FOUND)
    except client.ApiException as error:
        fail(_explain(error, kind), NOT_FOUND)
    except (HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise
        server = connection.server if connection else "the cluster"
        if isinstance(error, MaxRetryError) and isinstance(error.reason, SSLError):
            fail(f"no TLS with {server}: {error.reason}; check its certificates in the kubeconfig", NOT_FOUND)
        fail(f"{server} does not answer ({type(error).__name__}); is the cluster up?", NOT_FOUND)


def fail(message: str, code: int) -> NoReturn:
    """Print the error and end with the exit code."""
    typer.secho(f"error: {message}", fg="red", err=True)
    raise typer.Exit(code)


def _explain(error: Any, kind: Kind) -> str:
    if error.status == 404:
        return f"this cluster has no {kind.name} ({GROUP}/{VERSION}); install the operator's CRDs"
    if error.status == 401:
        return "the API server refuses the credentials (401): sign in anew, or have those in the kubeconfig renewed"
    try:
        message = json.loads(error.body)["message"]
    except (TypeError, ValueError, KeyError):
        message = error.reason
    return f"the API server refuses ({error.status}): {message}"

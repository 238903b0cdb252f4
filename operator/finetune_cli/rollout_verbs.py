"""The verbs of `finetune rollout`: promote, abort, pause, resume, retry, undo."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from finetune_cli import rollout_actions, rollout_views, shared, texts, watches
from finetune_cli.kinds import DEPLOYMENT
from finetune_cli.rollout_actions import Verb
from finetune_cli.shared import ContextOption, KubeconfigOption, NamespaceOption

REFUSED = 1
PATIENCE = "30s"

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Name of the AdapterDeployment.")]
TimeoutOption = Annotated[
    str, typer.Option(help="How long to wait for the operator's answer, for example 30s or 2m.")
]
CODES = "\n\nExit code 0: done. 1: not possible now. 2: no such deployment. 124: no answer from the operator in time."
VERBS = {
    "abort": (Verb.ABORT, "Roll the candidate back: all traffic to the stable revision, at once."),
    "pause": (Verb.PAUSE, "Hold the rollout at its weight. The guardrails stay armed."),
    "resume": (Verb.RESUME, "Go on after a pause or an alarm."),
    "retry": (Verb.RETRY, "Try the revision that was rolled back once more, from its first step."),
    "undo": (
        Verb.ROLLBACK,
        "Go back to the revision that served before. spec.adapter stays as it is until you change it.",
    ),
}


def register(app: typer.Typer) -> None:
    """Add the verbs to the group of commands."""
    app.command(help=f"{promote.__doc__}{CODES}")(promote)
    for name, (verb, text) in VERBS.items():
        _register(app, name, verb, text)


def promote(
    name: NameArgument,
    full: Annotated[bool, typer.Option("--full", help="Skip all steps: 100% at once.")] = False,
    namespace: NamespaceOption = None,
    timeout: TimeoutOption = PATIENCE,
    kubeconfig: KubeconfigOption = None,
    context: ContextOption = None,
) -> None:
    """End the step under way: a pause is over, an approval is given, an alarm is overruled."""
    verb = Verb.PROMOTE_FULL if full else Verb.PROMOTE
    _perform(verb, name, namespace=namespace, timeout=timeout, kubeconfig=kubeconfig, context=context)


def _register(app: typer.Typer, command: str, verb: Verb, text: str) -> None:
    @app.command(command, help=f"{text}{CODES}")
    def act(
        name: NameArgument,
        namespace: NamespaceOption = None,
        timeout: TimeoutOption = PATIENCE,
        kubeconfig: KubeconfigOption = None,
        context: ContextOption = None,
    ) -> None:
        _perform(verb, name, namespace=namespace, timeout=timeout, kubeconfig=kubeconfig, context=context)


def _perform(
    verb: Verb,
    name: str,
    *,
    namespace: str | None,
    timeout: str,
    kubeconfig: Path | None,
    context: str | None,
) -> None:
    """Ask the operator and tell its answer; the exit codes are CODES."""
    deadline = time.monotonic() + shared.parse_seconds(timeout)
    wish = rollout_actions.Wish(verb)
    with shared.told(kubeconfig, context, DEPLOYMENT) as connection:
        try:
            rollout = rollout_actions.perform(
                connection.api,
                namespace or connection.namespace,
                name,
                wish,
                deadline=deadline,
                on_trouble=_tell_trouble,
            )
        except KeyboardInterrupt:
            shared.fail(f"stopped waiting; {_fate(wish)}", shared.INTERRUPTED)
        except watches.WatchTimeoutError:
            shared.fail(
                f"the operator has not answered within {timeout}; {_fate(wish)}. "
                "Is the operator up (finetune local status, or its Deployment)?",
                shared.TIMED_OUT,
            )
    taken = texts.status_of(rollout)["lastAction"]
    if taken.get("refused"):
        shared.fail(f"{name}: {taken.get('message') or f'{verb} is not possible now'}", REFUSED)
    typer.echo(f"{name}: {taken.get('message') or f'{verb}: done'}")
    typer.echo(rollout_views.state_line(rollout))


def _fate(wish: rollout_actions.Wish) -> str:
    """What becomes of a wish that nobody waits for any more."""
    if wish.asked:
        return f"{wish.verb} stays asked for"
    return f"{wish.verb} was not asked for, because an earlier wish waits or the API server is away"


def _tell_trouble(text: str | None) -> None:
    if text:
        typer.echo(text, err=True)

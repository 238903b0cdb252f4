"""`finetune rollout plan`: what a file's rollout can find at the expected traffic, before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from finetune_cli import rollout_plans, screens, shared, specs
from finetune_cli.kinds import DEPLOYMENT
from finetune_cli.rollout_plans import Assumptions
from finetune_cli.shared import Output, OutputOption
from finetune_operator.api.adapterdeployment import AdapterDeploymentSpec
from finetune_operator.core.durations import format_duration

RatesOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[NAME=]SHARE",
        help="Share of the stable revision's answers that have the event of a guardrail, for example 0.02 or "
        "errors=0.001; several times for several. Default: 0.02.",
    ),
]
DeviationsOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[NAME=]NUMBER",
        help="Standard deviation of an objective's values. Default: 0.5, the largest of yes-or-no feedback.",
    ),
]


def plan(
    filename: Annotated[
        str, typer.Option("--filename", "-f", help="YAML or JSON file; - reads from standard input.")
    ],
    requests_per_second: Annotated[
        float, typer.Option(help="Requests that clients send for the alias.")
    ] = 10.0,
    base_rate: RatesOption = None,
    relative_risk: Annotated[
        float,
        typer.Option(help="How many times as often the candidate has the event, in a harm to be found."),
    ] = 2.0,
    feedback_share: Annotated[float, typer.Option(help="Share of the requests that get feedback.")] = 0.05,
    deviation: DeviationsOption = None,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show the steps of a file with the requests and the time that their evidence needs. Asks no cluster.

    Exit code 0: planned, perhaps with warnings. 1: the file is not valid. 2: it cannot be read.
    """
    assumptions = Assumptions(
        requests_per_second=requests_per_second,
        base_rates=_numbers(base_rate, "--base-rate"),
        relative_risk=relative_risk,
        answered=feedback_share,
        deviations=_numbers(deviation, "--deviation"),
    )
    results = []
    for one in shared.read_objects(filename, DEPLOYMENT):
        name = specs.name_of(one)
        spec: AdapterDeploymentSpec = specs.read_spec(filename, DEPLOYMENT, one)
        try:
            planned = rollout_plans.plan_rollout(spec, assumptions)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error
        results.append({"name": name, **rollout_plans.to_data(planned, assumptions)})
        if output is Output.TABLE:
            _print(name, planned, assumptions)
    if output is not Output.TABLE:
        shared.echo_data(results, as_yaml=output is Output.YAML)


def _print(name: str, planned: rollout_plans.RolloutPlan, assumptions: Assumptions) -> None:
    length = f"{format_duration(planned.seconds)} in all"
    if not any(one.span.weight for one in planned.spans):
        length += ", and no step gives the candidate requests to compare"
    elif planned.compared_seconds < planned.seconds:
        length += f", {format_duration(planned.compared_seconds)} of it with answers of both sides to compare"
    typer.echo(f"{name}: {length}")
    tables = [rollout_plans.span_rows(planned), rollout_plans.objective_rows(planned)]
    for rows in tables:
        if len(rows) > 1:
            typer.echo("")
            screens.print_table(rows, colours={})
    typer.echo("\nThis assumes")
    for line in rollout_plans.assumption_lines(assumptions):
        typer.echo(f"  {line}")
    if planned.warnings:
        typer.echo("")
    for warning in planned.warnings:
        typer.secho(f"warning: {warning}", fg="yellow")


def _numbers(texts: Sequence[str] | None, option: str) -> dict[str, float]:
    """NAME=NUMBER or NUMBER by name; "" where none is given. Raises typer.BadParameter."""
    found = {}
    for text in texts or ():
        name, _, number = text.rpartition("=")
        try:
            found[name] = float(number)
        except ValueError:
            raise typer.BadParameter(
                f"{text!r}: write a number, or name=number, for example errors=0.01", param_hint=option
            ) from None
    return found

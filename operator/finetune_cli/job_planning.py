"""`finetune plan`: what a job needs, before a cluster is asked for anything."""

from __future__ import annotations

import csv
import gzip
import json
import os
from pathlib import Path
from typing import Annotated

import typer
import yaml

from finetune_cli import job_plans, model_files, screens, shared, specs
from finetune_cli.job_plans import Assumptions, JobPlan
from finetune_cli.kinds import JOB
from finetune_fit import verdicts
from finetune_fit.architectures import UnknownArchitectureError
from finetune_fit.prices import PriceTable
from finetune_fit.verdicts import Fit
from finetune_operator.api.finetunejob import FineTuneJobSpec

TOO_LARGE = 3
NOT_KNOWN = 4
MAY_RUN_OUT = 5


def plan(
    filename: Annotated[
        str, typer.Option("--filename", "-f", help="YAML or JSON file; - reads from standard input.")
    ],
    prices: Annotated[
        Path | None,
        typer.Option(help="YAML file with prices: {currency: USD, gpuHour: {NVIDIA-L4: 0.8, default: 2.5}}."),
    ] = None,
    accelerator: Annotated[
        str | None, typer.Option(help="Kind of GPU, where the file names none, for example NVIDIA-L4.")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Folder with the model's config.json, where its URI cannot be read from here."),
    ] = None,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Rows of the data, where the files cannot be read from here.")
    ] = None,
    output: Annotated[
        shared.WatchOutput, typer.Option("--output", "-o", help="text, json or yaml")
    ] = shared.WatchOutput.TEXT,
) -> None:
    """Estimate what a FineTuneJob needs: GPU memory, disk, steps, time and cost. Asks no cluster.

    Exit code 0: it fits, perhaps narrowly, or no GPU is named. 1: the file is not valid. 2: it cannot be read.
    3: it does not fit. 4: the model's config.json cannot be read from here, or the GPU is not in the table.
    5: by the estimate it needs more memory than there is.
    """
    table = _read_prices(prices)
    code, results = 0, []
    for one in shared.read_objects(filename, JOB):
        name = specs.name_of(one)
        spec: FineTuneJobSpec = specs.read_spec(filename, JOB, one)
        known = Assumptions(rows or _count_rows(spec), prices=table, accelerator=accelerator)
        try:
            planned = _plan(spec, model, known)
        except (model_files.ModelNotReachableError, UnknownArchitectureError) as error:
            code = max(code, NOT_KNOWN)
            results.append({"name": name, "fit": str(Fit.UNKNOWN), "message": f"not estimated: {error}"})
            if output is shared.WatchOutput.TEXT:
                typer.secho(f"{name}: not estimated: {error}", fg="yellow")
            continue
        code = max(code, _exit_code(planned))
        results.append({"name": name, **job_plans.to_data(planned)})
        if output is shared.WatchOutput.TEXT:
            _print(name, planned)
    if output is not shared.WatchOutput.TEXT:
        shared.echo_data(results, as_yaml=output is shared.WatchOutput.YAML)
    raise typer.Exit(code)


def _plan(spec: FineTuneJobSpec, folder: Path | None, known: Assumptions) -> JobPlan:
    found = model_files.find(spec.model.uri, spec.model.revision, folder=folder, environ=os.environ)
    return job_plans.plan_job(spec, found.config, found.tensors, known)


def _exit_code(planned: JobPlan) -> int:
    verdict = planned.verdict
    if verdict.fit is Fit.TOO_LARGE:
        return TOO_LARGE
    if verdict.capacity is None:
        return NOT_KNOWN if planned.named else 0
    return MAY_RUN_OUT if verdict.estimate.total > verdict.capacity else 0


COLOURS = {Fit.TOO_LARGE: "red", Fit.TIGHT: "yellow"}
WORDS = {
    Fit.FITS: "fits",
    Fit.TIGHT: verdicts.MAY_RUN_OUT,
    Fit.TOO_LARGE: "does not fit",
    Fit.UNKNOWN: "memory",
}


def _print(name: str, planned: JobPlan) -> None:
    verdict = planned.verdict
    typer.secho(f"{name}: {WORDS[verdict.fit]}: {verdict.message}", fg=COLOURS.get(verdict.fit))
    for table in (job_plans.memory_rows(planned), job_plans.method_rows(planned)):
        typer.echo("")
        screens.print_table(table, colours={})
    typer.echo("")
    for line in job_plans.lines(planned):
        typer.echo(line)
    for note in planned.notes:
        typer.echo(f"note: {note}")


def _read_prices(file: Path | None) -> PriceTable | None:
    if file is None:
        return None
    try:
        return PriceTable.parse(yaml.safe_load(file.read_text(encoding="utf-8")))
    except OSError as error:
        shared.fail(f"{file}: {error.strerror}", shared.NOT_FOUND)
    except (ValueError, yaml.YAMLError) as error:
        shared.fail(f"{file}: {error}", shared.NOT_FOUND)


# ---------------------------------------------------------------- rows of local files


def _count_rows(spec: FineTuneJobSpec) -> int | None:
    """Rows of all sources, where each of them is a file that can be read here and counted; else None."""
    counts = []
    for source in spec.dataset.sources:
        if not source.uri.startswith("file://"):
            return None
        try:
            counts.append(_count(Path(source.uri.removeprefix("file://"))))
        except (OSError, ValueError, csv.Error):
            return None  # what is wrong with the data is the trainer's to say
    return sum(counts)


def _count(file: Path) -> int:
    """Raises ValueError for a format that is not counted here."""
    name = file.name.lower().removesuffix(".gz")
    opened = gzip.open if file.name.lower().endswith(".gz") else open
    with opened(file, "rt", encoding="utf-8") as stream:
        if name.endswith((".jsonl", ".ndjson")):
            return sum(1 for line in stream if line.strip())
        if name.endswith(".csv"):
            return max(0, sum(1 for _ in csv.reader(stream)) - 1)
        if name.endswith(".json"):
            return len(json.load(stream))
    raise ValueError(f"{file.name} is not counted")

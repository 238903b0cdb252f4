"""What a FineTuneJob costs beside a plain TRL script that does the same; writes docs/benchmarks.md.

Needs a running laptop cluster (`make up`) and an otherwise idle machine. Both ways take turns, so that a machine that
gets slower or warmer over time does so for both:

    python -m benchmarks.overhead --rounds 3
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kubernetes
import yaml

from benchmarks.observers import Observer
from benchmarks.pages import REPOSITORY, current_load, describe_machine, say, spread, write_section
from finetune_local import layouts, models

JOB_FILE = REPOSITORY / "examples" / "quickstart" / "finetunejob.yaml"
GROUP = {"group": "finetune.dev", "version": "v1alpha1", "namespace": "default", "plural": "finetunejobs"}
POLL = 0.1  # seconds; how exactly the end of a job is seen
PATIENCE = 1800.0  # seconds for one job
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "ray", "kubernetes")


class BenchmarkError(RuntimeError):
    """A run did not end well; numbers of it would mean nothing."""


@dataclass(frozen=True)
class Timings:
    """One run. Seconds count from the start of the script, or from `apply`; bytes are of the training process."""

    first_step_seconds: float  # to the end of the first optimizer step
    whole_seconds: float  # to the end of the script, or to condition Complete
    step_seconds: float  # mean over the optimizer steps, evaluations left out
    peak_rss_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often each way runs (default 3)")
    parser.add_argument("--max-steps", type=int, help="optimizer steps (default: those of the quickstart)")
    options = parser.parse_args()
    layout = layouts.Layout(layouts.default_state_folder())
    if not layout.kubeconfig.exists():
        raise SystemExit(f"error: no {layout.kubeconfig}; start the laptop cluster first: make up")
    job = yaml.safe_load(JOB_FILE.read_text())
    without_evaluation(job["spec"], max_steps=options.max_steps)
    model = models.prepare_smollm2(layouts.cache_folder(), say)
    load = current_load()
    plain: list[Timings] = []
    through: list[Timings] = []
    try:
        for number in range(1, options.rounds + 1):
            say(f"round {number} of {options.rounds}: plain TRL script")
            plain.append(run_plain(job["spec"], model))
            say(f"  {plain[-1]}")
            say(f"round {number} of {options.rounds}: FineTuneJob")
            through.append(run_job(job, layout.kubeconfig, name=f"bench-{int(time.time())}"))
            say(f"  {through[-1]}")
    except BenchmarkError as error:
        raise SystemExit(f"error: {error}") from None
    table = build_table(plain, through)
    print(table)
    steps = job["spec"]["hyperparameters"]["maxSteps"]
    write_section("Overhead", build_section(table, rounds=options.rounds, steps=steps, load=load))


def run_plain(spec: dict[str, Any], model: Path) -> Timings:
    """The script as a child process, in an empty folder, with the settings of the job."""
    with tempfile.TemporaryDirectory(prefix="plain-trl-") as folder:
        command = [sys.executable, str(REPOSITORY / "benchmarks" / "plain_trl.py"), *plain_flags(spec)]
        command += ["--model", str(model), "--output", folder]
        started = time.time()
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
        ended = time.time()
    if done.returncode != 0:
        raise BenchmarkError(f"the plain script ended with {done.returncode}:\n{done.stderr[-2000:]}")
    result = json.loads(done.stdout.strip().splitlines()[-1])
    return Timings(
        first_step_seconds=result["firstStepAt"] - started,
        whole_seconds=ended - started,
        step_seconds=statistics.fmean(result["stepSeconds"]),
        peak_rss_bytes=result["peakRssBytes"],
    )


def without_evaluation(spec: dict[str, Any], *, max_steps: int | None) -> None:
    """Nothing is held out, so that both ways draw from the same rows: each would split in its own way."""
    spec["dataset"]["split"]["eval"] = 0
    spec["hyperparameters"].pop("evalSteps", None)
    if max_steps is not None:
        spec["hyperparameters"]["maxSteps"] = max_steps


def plain_flags(spec: dict[str, Any]) -> list[str]:
    """The job's settings as flags of plain_trl.py; what the quickstart leaves to defaults is not translated."""
    hyper, lora = spec["hyperparameters"], spec["method"]["lora"]
    claim = "pvc://files/"
    uri = spec["dataset"]["sources"][0]["uri"]
    if not uri.startswith(claim):
        raise BenchmarkError(f"dataset.sources[0].uri is {uri}; the benchmark knows {claim}... only")
    flags = {
        "data": REPOSITORY / uri.removeprefix(claim),
        "max-steps": hyper["maxSteps"],
        "batch-size": hyper["globalBatchSize"],
        "micro-batch-size": hyper["microBatchSize"],
        "learning-rate": hyper["learningRate"],
        "warmup-ratio": hyper["warmupRatio"],
        "scheduler": hyper["scheduler"].lower(),
        "max-length": hyper["maxLength"],
        "seed": hyper["seed"],
        "rank": lora["r"],
        "alpha": lora["alpha"],
        "dropout": lora["dropout"],
    }
    pairs = [text for name, value in flags.items() for text in (f"--{name}", str(value))]
    return [*pairs, "--target-modules", *lora["targetModules"]]


def run_job(job: dict[str, Any], kubeconfig: Path, *, name: str) -> Timings:
    """The same through the operator: create the job under a fresh name, wait for it, delete it."""
    api = kubernetes.client.CustomObjectsApi(
        kubernetes.config.new_client_from_config(config_file=str(kubeconfig))
    )
    manifest = {**job, "metadata": {"name": name, "namespace": GROUP["namespace"]}}
    started = time.time()
    with Observer(started) as observer:
        api.create_namespaced_custom_object(**GROUP, body=manifest)
        status = await_end(lambda: api.get_namespaced_custom_object(**GROUP, name=name), name=name)
        ended = time.time()
    folder = local_folder(status["artifact"]["uri"])
    artifact = json.loads((folder / "manifest.json").read_text())
    if observer.first_step_at is None:
        raise BenchmarkError(f"{name} succeeded, but its training process was not seen on this machine")
    api.delete_namespaced_custom_object(**GROUP, name=name)
    return Timings(
        first_step_seconds=observer.first_step_at - started,
        whole_seconds=ended - started,
        step_seconds=artifact["metrics"]["trainSeconds"] / artifact["metrics"]["step"],
        peak_rss_bytes=observer.peak_rss_bytes,
    )


def await_end(read: Callable[[], Any], *, name: str) -> dict[str, Any]:
    """Returns the status once the job is Complete. Raises BenchmarkError when it failed or took too long."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        status: dict[str, Any] = read().get("status") or {}
        conditions = {item["type"]: item for item in status.get("conditions", []) if item["status"] == "True"}
        if "Complete" in conditions:
            return status
        if "Failed" in conditions:
            raise BenchmarkError(f"FineTuneJob {name} failed: {conditions['Failed'].get('message')}")
        time.sleep(POLL)
    raise BenchmarkError(
        f"FineTuneJob {name} did not end in {PATIENCE:.0f} s; see: finetune jobs describe {name}"
    )


def local_folder(uri: str) -> Path:
    if not uri.startswith("file://"):
        raise BenchmarkError(f"the artifact is at {uri}; the benchmark needs one on this machine (file://)")
    return Path(uri.removeprefix("file://"))


def build_table(plain: list[Timings], through: list[Timings]) -> str:
    """Medians of both ways with their spread, and how they compare, as a Markdown table."""
    rows = [
        ("start or apply → first step", "first_step_seconds", 1.0, "s", "+15 s at most"),
        ("whole time", "whole_seconds", 1.0, "s", ""),
        ("time per step", "step_seconds", 1.0, "s", "1.03× at most"),
        ("peak memory of the training process", "peak_rss_bytes", 2**-20, "MiB", ""),
    ]
    lines = ["| | plain TRL | FineTuneJob | difference | ratio | target |", "|---|---|---|---|---|---|"]
    for title, attribute, scale, unit, target in rows:
        ours = [getattr(timings, attribute) * scale for timings in through]
        theirs = [getattr(timings, attribute) * scale for timings in plain]
        difference = statistics.median(ours) - statistics.median(theirs)
        ratio = statistics.median(ours) / statistics.median(theirs)
        cells = [
            title,
            spread(theirs, unit),
            spread(ours, unit),
            f"{difference:+.2f} {unit}",
            f"{ratio:.3f}×",
            target,
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def build_section(table: str, *, rounds: int, steps: int, load: float) -> str:
    return f"""\
The quickstart's fine-tuning ({steps} steps) as a plain TRL script (`benchmarks/plain_trl.py`) and as a FineTuneJob on
the laptop cluster, in turns, {rounds} times each: median (smallest to largest). The script runs beside the idle
cluster. Both draw from the same rows, each in an order of its own. Steps are timed inside the training process in
both cases; memory is the peak resident set (VmHWM) of it.

{table}
Command: `python -m benchmarks.overhead --rounds {rounds} --max-steps {steps}`.
{describe_machine(PACKAGES, load=load)}"""


if __name__ == "__main__":
    main()

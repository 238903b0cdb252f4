"""Many FineTuneJobs at once on a real API server: what the operator costs, beside KubeRay as a Go operator.

    python -m benchmarks.fleet --jobs 1000 100 1000 5000 --peer 1000 --real 200

Three parts: jobs whose KubeRay and trainers are played, so that the operator alone is measured; as many objects at
once for the operator and for KubeRay, in turns; and jobs whose KubeRay is the real one. The control plane (etcd,
kube-apiserver, kube-controller-manager), the operator, and this program, which creates the jobs and plays what is not
there, share the machine: latencies are those of all of them together, CPU and memory one process's.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from benchmarks import fleet_peer, fleet_real, fleet_runs, pages
from benchmarks.fleet_peer import Race
from benchmarks.fleet_places import CREATORS
from benchmarks.fleet_real import RealFigures
from benchmarks.fleet_runs import Figures
from finetune_local.cluster import Cluster
from finetune_operator.reconcile.queue import CONCURRENCY
from tests.integration.operators import PARTS, apply_ray_crds

TITLE = "Fleet"
PLAYED = """\
FineTuneJobs created at once; each goes through one attempt with every status that KubeRay was seen to
write, one report of progress and one of the result. Latencies are from the answer to the creation of the
FineTuneJob to the watch event of its RayJob. Requests and CPU time are the operator's for a whole job,
memory its peak. Where a number of jobs comes twice, the first run is on an API server that has just started: each of
its watches holds ten changes then (later up to a hundred), so that on two busy cores its cache of FineTuneJobs lags
behind etcd, for everybody who watches, and it closes watches. The number of passes makes no difference to that.

| jobs at once | create → RayJob, p50 | p99 | API requests per job | CPU per job | peak RSS | all ended after \
| jobs | load before |
|---|---|---|---|---|---|---|---|---|
"""
PEER = """
KubeRay 1.6.2 in the same run, in turns: objects created at once, and their first children, which is a RayJob for
the operator and a RayCluster for KubeRay. Latencies are from the answer to the creation to the watch event,
jobs per second from the first creation to the last child. Nobody plays what would come next. KubeRay has as many passes
at once as the operator ({passes}) and 1,000 requests per second (by default one and 100). Of {rounds} the one
in the middle.
By `kubectl apply`: one of a file with all of them, which sends a request after the other, at most as many per second as
its own limit allows. Else {creators} clients create them.
The API server alone: a client without any logic sends the requests that the operator needs until a RayJob is there.

| jobs at once | | create → child, p50 | p99 | jobs | CPU per job | peak RSS |
|---|---|---|---|---|---|---|
"""
REAL = """
With the real KubeRay, kube-scheduler and KWOK; Ray's job API and the trainers are played. The columns are those of the
first table, and KubeRay's CPU time in the same run.

| jobs at once | create → RayJob, p50 | p99 | API requests per job | CPU per job | peak RSS | all ended after \
| jobs | load before | KubeRay's CPU per job | its peak RSS |
|---|---|---|---|---|---|---|---|---|---|---|
"""


def goals(runs: Sequence[Figures], races: Sequence[Race], real: RealFigures | None) -> str:
    """What was promised, and what it came to."""
    rows = []
    if runs:
        small, large = min(runs, key=_size), max(runs, key=_size)
        # Of two runs of a size the last one: on an API server that was in use already.
        middle = max((run for run in reversed(runs) if run.jobs <= 1000), key=_size, default=small)
        rows += [
            ("create → RayJob, p99, at most 2 s at 1,000 at once", f"{middle.p99:.2f} s at {middle.jobs:,}"),
            ("at most 12 API requests per job", _all(runs, lambda run: f"{run.requests_per_job:.1f}")),
            ("at most 25 ms CPU per job", _all(runs, lambda run: f"{run.cpu_ms_per_job:.1f} ms")),
            ("at most 150 MiB at 5,000 jobs", f"{large.mib:.0f} MiB at {large.jobs:,}"),
            ("the cost grows linearly", _growth(small, large)),
        ]
    for race in races:
        ours, theirs = race.rates
        text = f"{race.ratio:.2f} times at {race.jobs:,} at once ({ours:.1f}/s and {theirs:.1f}/s)"
        rows.append(("as many jobs per second as KubeRay", text))
        applied = f"{race.applied.p99:.2f} s at {race.jobs:,} ({race.applied.rate:.1f}/s)"
        rows.append(("create → RayJob, p99, at most 2 s where one `kubectl apply` creates them", applied))
        floor = f"{race.floor.p99:.2f} s at {race.jobs:,} ({race.floor.rate:.1f}/s)"
        rows.append(("the same p99 where nothing but the API server is waited for", floor))
    if real is not None:
        text = f"all {real.operator.jobs:,}, after {real.operator.drained:.0f} s"
        rows.append(("with the real KubeRay all end well, and no RayJob is created twice", text))
    return "\n| goal | measured |\n|---|---|\n" + "".join(f"| {goal} | {text} |\n" for goal, text in rows)


def _size(run: Figures) -> int:
    return run.jobs


def _all(runs: Sequence[Figures], value: Callable[[Figures], str]) -> str:
    return ", ".join(f"{value(run)} at {run.jobs:,}" for run in runs)


def _growth(small: Figures, large: Figures) -> str:
    """Cost of a job in the largest run, relative to the smallest."""
    cpu = large.cpu_ms_per_job / small.cpu_ms_per_job
    requests = large.requests_per_job / small.requests_per_job
    return (
        f"a job at {large.jobs:,} costs {cpu:.2f} times the CPU and {requests:.2f} times the requests of one at "
        f"{small.jobs:,}"
    )


def page(runs: Sequence[Figures], races: Sequence[Race], real: RealFigures | None) -> str:
    """The tables."""
    text = ""
    if runs:
        text += PLAYED + "".join(f"{run.row()}\n" for run in runs)
    if races:
        rounds = "1 lap" if len(races[0].operator) == 1 else f"{len(races[0].operator)} laps"
        text += PEER.format(rounds=rounds, passes=CONCURRENCY, creators=CREATORS)
        text += "".join(f"{row}\n" for race in races for row in race.rows())
    if real is not None:
        text += REAL + real.row() + "\n"
    return text.lstrip() + goals(runs, races, real) + "\n"


@contextlib.contextmanager
def running(folder: Path, parts: Sequence[str]) -> Iterator[Cluster]:
    cluster = Cluster(folder)
    try:
        cluster.up(tuple(parts))
        apply_ray_crds(cluster)
        yield cluster
    finally:
        cluster.down(purge=True)


def measure_played(arguments: argparse.Namespace, folder: Path) -> tuple[list[Figures], list[Race]]:
    runs, races = [], []
    with running(folder / "played", PARTS) as cluster:
        for jobs in arguments.jobs:
            run = fleet_runs.measure(
                cluster, jobs, folder / f"run-{jobs}", pace=arguments.pace, profile=arguments.profile
            )
            runs.append(asyncio.run(run))
            pages.say(runs[-1].row())
            pages.say(json.dumps(runs[-1].requests))
        for jobs in arguments.peer:
            races.append(asyncio.run(fleet_peer.race(cluster, jobs, folder, rounds=arguments.rounds)))
    return runs, races


def measure_real(jobs: int, folder: Path) -> RealFigures:
    """On another cluster: its scheduler and KWOK would run the pods that KubeRay has left in the first one."""
    with running(folder / "real", fleet_real.REAL_PARTS) as cluster:
        real = asyncio.run(fleet_real.measure(cluster, jobs, folder / "kuberay"))
    pages.say(real.row())
    return real


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--jobs", type=int, nargs="*", default=[1000, 100, 1000, 5000], help="jobs at once, played"
    )
    parser.add_argument("--peer", type=int, nargs="*", default=[], help="objects at once for both operators")
    parser.add_argument("--rounds", type=int, default=3, help="laps of each with --peer")
    parser.add_argument("--real", type=int, default=0, help="jobs at once with the real KubeRay")
    parser.add_argument("--pace", type=float, default=0.2, help="seconds between two statuses of a RayJob")
    parser.add_argument("--profile", type=Path, help="file for cProfile's figures of the operator")
    parser.add_argument("--write", action="store_true", help="put the tables into docs/benchmarks.md")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fleet-"))
    load = pages.current_load()
    try:
        runs, races = measure_played(arguments, folder) if arguments.jobs or arguments.peer else ([], [])
        body = page(runs, races, measure_real(arguments.real, folder) if arguments.real else None)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    body += f"Command: `python -m benchmarks.fleet {' '.join(sys.argv[1:])}`.\n"
    body += pages.describe_machine(["kopf", "kubernetes", "aiohttp"], load=load)
    print(body)
    if arguments.write:
        pages.write_section(TITLE, body)


if __name__ == "__main__":
    main()

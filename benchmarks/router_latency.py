"""What the router adds to a request's time at several loads, beside nginx; writes a section of docs/benchmarks.md.

Times are measured in turns of short runs. A virtual machine's host takes its cores away now and then; near its limit a
proxy needs long to work off what has queued up meanwhile, so the section says how much was taken (steal, proc_stat(5)).

    python -m benchmarks.router_latency --runs 8
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks import router_targets
from benchmarks.pages import current_load, describe_machine, write_section
from benchmarks.router import MANY, PACKAGES, Measurement, measure

RATES = (500, 750, 1500, 2250, 3000)  # a second; one worker has to take 1,500, and 750 is half of that
CONNECTIONS = 1000
ALIAS_PAIRS, ALIAS_SECONDS = 24, 1.5  # short and many: the machine's speed changes within seconds


@dataclass(frozen=True)
class Turn:
    """One run of each, right after one another."""

    runs: dict[str, Measurement]
    stolen: float
    """Seconds that the host took from both cores during the router's run."""

    def added_ms(self, name: str, value: str) -> float:
        return 1000 * (self.runs[name].answers[value] - self.runs["direct"].answers[value])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=8, help="of each proxy at each rate")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each run")
    parser.add_argument("--dry", action="store_true", help="print the section only")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the proxies would live on
    load = current_load()
    with tempfile.TemporaryDirectory(prefix="router-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        direct = stack.enter_context(router_targets.engine(folder, chunks=1, interval=1))
        router = stack.enter_context(router_targets.router(folder, direct.port))
        nginx = stack.enter_context(router_targets.nginx(folder, direct.port))
        nginx.pause()
        subjects = (direct, router, nginx)
        for subject in subjects:
            measure(subject, size=1024, connections=8, seconds=options.seconds)
        turns = {rate: [turn(subjects, rate, options.seconds) for _ in range(options.runs)] for rate in RATES}
        ratios = [compare_aliases(router) for _ in range(ALIAS_PAIRS)]
    section = build_section(turns) + build_aliases(ratios)
    section += f"\nCommand: `python -m benchmarks.router_latency --runs {options.runs}`.\n"
    section += describe_machine(PACKAGES, load=load)
    print(section)
    if not options.dry:
        write_section("Router: added latency", section)


def turn(subjects: tuple[router_targets.Subject, ...], rate: float, seconds: float) -> Turn:
    runs, stolen = {}, 0.0
    for subject in subjects:
        before = psutil.cpu_times().steal
        runs[subject.name] = measure(subject, size=1024, connections=CONNECTIONS, seconds=seconds, rate=rate)
        if subject.name == "router":
            stolen = psutil.cpu_times().steal - before
    return Turn(runs, stolen)


def compare_aliases(router: router_targets.Subject) -> float:
    """Requests per CPU second with 1,000 aliases in turn, as a share of those with one."""
    one, many = (
        measure(
            router, size=1024, connections=32, seconds=ALIAS_SECONDS, aliases=aliases, users=MANY
        ).per_cpu_second
        for aliases in (1, MANY)
    )
    return many / one


def build_aliases(ratios: list[float]) -> str:
    low, _, high = statistics.quantiles(ratios, n=4)
    return (
        f"\n1,000 aliases in turn: {statistics.median(ratios):.2f} times the requests per CPU second of one (median of "
        f"{len(ratios)} pairs of {ALIAS_SECONDS:g} s; the middle half from {low:.2f} to {high:.2f}).\n"
    )


def build_section(turns: dict[int, list[Turn]]) -> str:
    lines = [
        "Milliseconds that a request of 1 KB takes longer than without a proxy, open loop, one worker on one core;",
        f"medians of {len(turns[RATES[0]])} turns, and the least and the most.",
        "",
        "| requests/s | router, p50 | router, p99 | nginx, p50 | nginx, p99 | core in use | taken by the host |",
        "|---|---|---|---|---|---|---|",
    ]
    for rate, found in turns.items():
        shown = [
            _spread([one.added_ms(name, value) for one in found])
            for name in ("router", "nginx")
            for value in ("p50", "p99")
        ]
        busy = statistics.median(
            one.runs["router"].cpu_seconds / one.runs["router"].answers["requests"] * rate for one in found
        )
        stolen = sum(one.stolen for one in found)
        lines.append(f"| {' | '.join([f'{rate:,}', *shown])} | {100 * busy:.0f} % | {1000 * stolen:.0f} ms |")
    return "\n".join(lines) + "\n"


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()

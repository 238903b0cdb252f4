"""The router beside the engine itself, nginx and LiteLLM, on one machine; writes a section of docs/benchmarks.md.

Each proxy has one worker on one core; engine and load generator share another one; nginx and LiteLLM are stopped while
they are not measured. What is compared is therefore requests per second of the proxy's own CPU time, and the time that
a request takes longer than without a proxy. What differs little is measured in pairs of short runs, because a virtual
machine's speed changes within seconds:

    python -m benchmarks.router --rounds 3
    python -m benchmarks.router --rounds 1 --seconds 2 --no-litellm    # a quick look
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import router_targets
from benchmarks.pages import REPOSITORY, current_load, describe_machine, say, write_section
from benchmarks.router_targets import OTHER_CORE, Subject, pinned
from finetune_router import assignment
from finetune_router.assignment import KeyKind, KeySource

SIZES = {"1 KB": 1024, "100 KB": 100 * 1024}
CONNECTIONS = 32
COMMON_RATE = 50.0  # requests a second that every target can take
SETTLE_SECONDS = 0.5  # what was due while it was stopped is no part of the run
STREAM_CHUNKS, STREAM_INTERVAL = 20, 0.5  # a stream of ten seconds
MANY = router_targets.ALIASES - 1
PAIRS, PAIR_SECONDS = 4, 4.0  # of a round
PACKAGES = ("aiohttp", "uvloop", "httptools", "jsonschema-rs")


@dataclass(frozen=True)
class Measurement:
    """One run of the load generator against one target. Times in seconds."""

    answers: dict[str, float]
    cpu_seconds: float
    memory: tuple[int, ...]
    """Bytes, once a second."""

    @property
    def per_cpu_second(self) -> float:
        return self.answers["requests"] / self.cpu_seconds if self.cpu_seconds else float("nan")


@dataclass
class Results:
    """Measurements by what was measured, then by target."""

    found: dict[str, dict[str, list[Measurement]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )

    def median(self, what: str, name: str, value: str) -> float:
        runs = self.found[what][name]
        if value == "per_cpu_second":
            return statistics.median(run.per_cpu_second for run in runs)
        return statistics.median(run.answers[value] for run in runs)

    def added_ms(self, what: str, name: str, value: str) -> float:
        """How much longer than without a proxy, in the same rounds, in milliseconds."""
        pairs = zip(self.found[what][name], self.found[what]["direct"], strict=True)
        return 1000 * statistics.median(run.answers[value] - direct.answers[value] for run, direct in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each run")
    parser.add_argument("--streams", type=int, default=500, help="open at a time")
    parser.add_argument("--no-litellm", action="store_true")
    parser.add_argument("--no-nginx", action="store_true")
    parser.add_argument("--dry", action="store_true", help="print the section only")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the proxies would live on
    load = current_load()
    results = Results()
    with tempfile.TemporaryDirectory(prefix="router-bench-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        direct = stack.enter_context(
            router_targets.engine(folder, chunks=STREAM_CHUNKS, interval=STREAM_INTERVAL)
        )
        subjects = [stack.enter_context(router_targets.router(folder, direct.port))]
        if not options.no_nginx:
            subjects.append(stack.enter_context(router_targets.nginx(folder, direct.port)))
        if not options.no_litellm:
            subjects.append(stack.enter_context(router_targets.litellm(folder, direct.port)))
        for subject in subjects:
            if subject.is_peer:
                subject.pause()
        # What is loaded at the first requests is no part of the comparison.
        for subject in [direct, *subjects]:
            measure(subject, size=1024, connections=8, seconds=options.seconds)
            measure(subject, size=1024, connections=8, seconds=1, rate=4, stream=True)
        idle = {subject.name: subject.memory_bytes() for subject in subjects}
        for number in range(1, options.rounds + 1):
            say(f"round {number} of {options.rounds}")
            measure_plain(results, direct, subjects, seconds=options.seconds)
            measure_streams(results, direct, subjects, count=options.streams)
        flat = measure_memory(subjects[0])
    section = build_section(
        results, [subject.name for subject in subjects], idle=idle, flat=flat, options=options
    )
    section += f"\n{describe(options, load)}"
    print(section)
    if not options.dry:
        write_section("Router", section)


def measure_plain(results: Results, direct: Subject, subjects: list[Subject], *, seconds: float) -> None:
    for label, size in SIZES.items():
        for subject in [direct, *subjects]:
            run = measure(subject, size=size, connections=CONNECTIONS, seconds=seconds)
            results.found[f"closed {label}"][subject.name].append(run)
        for subject in [direct, *subjects]:
            run = measure(subject, size=size, connections=1000, seconds=seconds, rate=COMMON_RATE)
            results.found[f"common {label}"][subject.name].append(run)
    router = subjects[0]
    half = results.found["closed 1 KB"][router.name][-1].answers["per_second"] / 2
    for _ in range(PAIRS):
        for subject in [
            direct,
            *(one for one in subjects if one.name != "LiteLLM"),
        ]:  # that cannot do so many
            run = measure(subject, size=1024, connections=1000, seconds=PAIR_SECONDS, rate=half)
            results.found["half"][subject.name].append(run)
    for _ in range(PAIRS):
        for aliases in (1, MANY):
            run = measure(
                router, size=1024, connections=CONNECTIONS, seconds=PAIR_SECONDS, aliases=aliases, users=MANY
            )
            results.found[f"{aliases} aliases"][router.name].append(run)


def measure_streams(results: Results, direct: Subject, subjects: list[Subject], *, count: int) -> None:
    """So many streams are begun a second that `count` are open; the beginning and the end are in the run as well."""
    length = STREAM_CHUNKS * STREAM_INTERVAL
    for subject in [direct, *subjects]:
        run = measure(
            subject, size=1024, connections=4 * count, seconds=2 * length, rate=count / length, stream=True
        )
        results.found["streams"][subject.name].append(run)


def measure_memory(router: Subject) -> tuple[int, ...]:
    """Memory of the router during 40 s with 1,000 open streams, once a second."""
    length = STREAM_CHUNKS * STREAM_INTERVAL
    run = measure(router, size=1024, connections=4000, seconds=4 * length, rate=1000 / length, stream=True)
    return run.memory


def measure(
    subject: Subject, *, size: int, connections: int, seconds: float, rate: float = 0.0, stream: bool = False,
    aliases: int = 1, users: int = 1,
) -> Measurement:  # fmt: skip
    """Run the load generator, in a process of its own, while no other proxy runs.

    Raises RuntimeError when it ends badly.
    """
    command = pinned(
        OTHER_CORE, sys.executable, "-m", "benchmarks.router_load", "--port", str(subject.port), "--size", str(size),
        "--connections", str(connections), "--seconds", str(seconds), "--rate", str(rate), "--aliases", str(aliases),
        "--users", str(users),
    )  # fmt: skip
    memory: list[int] = []
    over = threading.Event()

    def sample() -> None:
        while not over.wait(1.0):
            memory.append(subject.memory_bytes())

    watcher = threading.Thread(target=sample)
    if subject.is_peer:
        subject.resume()
        time.sleep(SETTLE_SECONDS)
    before = subject.cpu_seconds()
    if stream:  # adding up the pages takes milliseconds on that core, which are the tail of a short request
        watcher.start()
    try:
        done = subprocess.run(
            [*command, "--stream"] if stream else command,
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=False,
        )
    finally:
        after = subject.cpu_seconds()
        over.set()
        if stream:
            watcher.join()
        if subject.is_peer:
            subject.pause()
    if done.returncode:
        raise RuntimeError(f"the load generator ended with {done.returncode}:\n{done.stderr[-2000:]}")
    run = Measurement(json.loads(done.stdout), after - before, tuple(memory))
    say(
        f"  {subject.name:8} {size // 1024:4} KB {'stream' if stream else 'plain':6} rate {rate:7.1f}"
        f" {run.answers['per_second']:8.0f}/s p50 {1000 * run.answers['p50']:8.2f} ms"
        f" p99 {1000 * run.answers['p99']:8.2f} ms errors {run.answers['errors']:.0f}"
        f" per CPU second {run.per_cpu_second:8.0f}"
    )
    return run


def measure_assignment() -> float:
    """Microseconds of finding a key and drawing an arm."""
    sources = (KeySource(KeyKind.HEADER, "x-adapter-key"), KeySource(KeyKind.BODY, "user"))
    rounds = 50_000
    started = time.process_time()
    for number in range(rounds):
        key = assignment.find_key(sources, {}, {"user": f"user-{number}"}, "") or ""
        assignment.is_candidate(assignment.draw(b"salt\0", key).place, 25)
    return (time.process_time() - started) / rounds * 1e6


def build_section(
    results: Results,
    names: list[str],
    *,
    idle: dict[str, int],
    flat: tuple[int, ...],
    options: argparse.Namespace,
) -> str:
    lines = [
        "One worker of each proxy on one core; engine (a trivial one) and load generator on another. Medians of",
        f"{options.rounds} rounds of {options.seconds:g} s, in turns. Closed loop: {CONNECTIONS} connections.",
        "Open loop: times count from when a request was due. `added` is against the engine without a proxy in the",
        "same round. nginx and LiteLLM are stopped (SIGSTOP) while they are not measured.",
        "The router has 1,000 aliases, each with a canary at 20 %, sticky users and four signals per answer.",
        "",
        "| " + " | ".join(["", "direct", *names, *(f"router : {name}" for name in names[1:])]) + " |",
        "|" + "---|" * (2 + len(names) + len(names) - 1),
    ]  # fmt: skip

    def row(label: str, values: list[float], form: str, *, ratios: bool = True, direct: str = "") -> None:
        shown = [form.format(value) for value in values]
        compared = [f"{values[0] / value:.2f}×" if ratios and value else "" for value in values[1:]]
        lines.append("| " + " | ".join([label, direct, *shown, *compared]) + " |")

    for label in SIZES:
        what = f"closed {label}"
        row(
            f"{label}, requests/s", [results.median(what, name, "per_second") for name in names], "{:,.0f}",
            direct=f"{results.median(what, 'direct', 'per_second'):,.0f}",
        )  # fmt: skip
        row(
            f"{label}, requests per CPU second",
            [results.median(what, name, "per_cpu_second") for name in names],
            "{:,.0f}",
        )
        for value in ("p50", "p99"):
            row(
                f"{label}, {COMMON_RATE:.0f}/s open loop, added {value}",
                [results.added_ms(f"common {label}", name, value) for name in names], "{:.2f} ms",
                direct=f"{1000 * results.median(f'common {label}', 'direct', value):.2f} ms", ratios=False,
            )  # fmt: skip
    for value in ("ttft_p50", "ttft_p99"):
        row(
            f"{options.streams} open streams, added TTFT {value[5:]}",
            [results.added_ms("streams", name, value) for name in names], "{:.2f} ms",
            direct=f"{1000 * results.median('streams', 'direct', value):.2f} ms", ratios=False,
        )  # fmt: skip
    row(
        f"{options.streams} open streams, events per CPU second",
        [
            statistics.median(
                run.answers["chunks"] / run.cpu_seconds for run in results.found["streams"][name]
            )
            for name in names
        ],
        "{:,.0f}",
    )
    row(
        f"{options.streams} open streams, memory",
        [
            statistics.median(max(run.memory) for run in results.found["streams"][name]) / 2**20
            for name in names
        ],
        "{:.0f} MiB",
    )
    row("memory without requests", [idle[name] / 2**20 for name in names], "{:.0f} MiB")
    row(
        "errors",
        [
            float(sum(run.answers["errors"] for runs in results.found.values() for run in runs[name]))
            for name in names
        ],
        "{:.0f}", ratios=False,
    )  # fmt: skip
    return "\n".join([*lines, "", *build_targets(results, names, flat)]) + "\n"


def build_targets(results: Results, names: list[str], flat: tuple[int, ...]) -> list[str]:
    """The goals, one line each."""
    pairs = zip(results.found[f"{MANY} aliases"]["router"], results.found["1 aliases"]["router"], strict=True)
    ratios = sorted(many.per_cpu_second / one.per_cpu_second for many, one in pairs)
    full = flat[len(flat) // 4 : len(flat) - 2]  # without the time in which streams only begin or only end
    middle = max(1, len(full) // 2)
    early, late = (statistics.fmean(part or full) / 2**20 for part in (full[:middle], full[middle:]))
    half = {value: results.added_ms("half", "router", value) for value in ("p50", "p99")}
    nginx = f"; nginx: {results.added_ms('half', 'nginx', 'p99'):.2f} ms" if "nginx" in names else ""
    lines = [
        "| goal, one worker | measured |",
        "|---|---|",
        f"| at least 1,500 requests/s | {results.median('closed 1 KB', 'router', 'per_second'):,.0f} |",
        f"| at most 3 ms added p99 at half load ({results.median('half', 'router', 'per_second'):,.0f}/s) | "
        f"{half['p99']:.2f} ms (p50: {half['p50']:.2f} ms), "
        f"median of {len(results.found['half']['router'])} pairs{nginx} |",
        f"| flat memory at 1,000 open streams | {early:.0f} MiB, then {late:.0f} MiB |",
        f"| an assignment in at most 20 µs | {measure_assignment():.1f} µs |",
        f"| 1,000 aliases no slower than one, 1,000 users | {statistics.median(ratios):.2f} times the requests per CPU "
        f"second of one ({ratios[0]:.2f} to {ratios[-1]:.2f} in {len(ratios)} pairs) |",
    ]
    if "LiteLLM" in names:
        ratio = results.median("closed 1 KB", "router", "per_cpu_second") / results.median(
            "closed 1 KB", "LiteLLM", "per_cpu_second"
        )
        lines.insert(4, f"| at least 8 times LiteLLM's requests per core | {ratio:.1f} times |")
    return lines


def describe(options: argparse.Namespace, load: float) -> str:
    versions = [] if options.no_nginx else [f"nginx {router_targets.nginx_version()}"]
    versions += [] if options.no_litellm else [f"LiteLLM {router_targets.litellm_version()}"]
    command = f"python -m benchmarks.router --rounds {options.rounds} --seconds {options.seconds:g}"
    return f"Command: `{command}`. {', '.join(versions)}.\n{describe_machine(PACKAGES, load=load)}"


if __name__ == "__main__":
    main()

"""docs/benchmarks.md: one section per benchmark, each with the machine that it was measured on."""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "docs" / "benchmarks.md"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def spread(values: Sequence[float], unit: str) -> str:
    """Median, and smallest to largest in brackets."""
    digits = 0 if unit == "MiB" else 2
    low, middle, high = min(values), statistics.median(values), max(values)
    return f"{middle:.{digits}f} {unit} ({low:.{digits}f} to {high:.{digits}f})"


def describe_machine(packages: Sequence[str], *, load: float) -> str:
    """The lines below a table: machine, load before the start, versions, date."""
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in packages)
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"Machine: {_processor()}, {psutil.cpu_count()} cores, {memory:.0f} GiB, load before the start {load:.2f}.\n"
        f"Versions: Python {sys.version.split()[0]}, {versions}. Date: {datetime.now(UTC):%Y-%m-%d}.\n"
    )


def current_load() -> float:
    return os.getloadavg()[0]


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown processor"


def write_section(title: str, body: str) -> None:
    """Replaces one section of the page; other sections stay."""
    text = PAGE.read_text() if PAGE.exists() else "# Benchmarks\n"
    PAGE.write_text(replace_section(text, title, body))
    say(f"written: {PAGE.relative_to(REPOSITORY)}")


def replace_section(text: str, title: str, body: str) -> str:
    """The Markdown text with the section `## title` holding `body`; added at the end when it was not there."""
    before, heading, rest = text.partition(f"## {title}\n")
    _, following, after = rest.partition("\n## ")
    section = f"## {title}\n\n{body}"
    if not heading:
        return f"{text.rstrip()}\n\n{section}"
    return before + section + (following + after if following else "")

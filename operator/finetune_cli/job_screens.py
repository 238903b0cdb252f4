"""Where `finetune jobs` draws: a live view on a terminal, one line per change elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Protocol, Self, TextIO

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from finetune_cli import job_views
from finetune_operator.core.durations import format_duration

COLOURS = {
    "Succeeded": "green",
    "Failed": "red",
    "Cancelled": "yellow",
    "Running": "cyan",
    "Evaluating": "cyan",
}
REFRESHES = 4  # a second
PIPE_WIDTH = 2000  # characters; a name and a URI of the greatest length fit


class Screen(Protocol):
    """Shows one job while it changes."""

    def show(self, job: dict[str, Any]) -> None: ...

    def trouble(self, text: str | None) -> None:
        """Something is wrong with the connection; None: no longer."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


def open_screen(stream: TextIO) -> Screen:
    """A live view if `stream` is a terminal that can be redrawn, else plain lines."""
    console = Console(file=stream, highlight=False)
    return (
        LiveScreen(console) if console.is_terminal and not console.is_dumb_terminal else PlainScreen(stream)
    )


class PlainScreen:
    """One line per change, with the time of day: for logs and pipes."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = ""

    def show(self, job: dict[str, Any]) -> None:
        self._print(job_views.progress_line(job, datetime.now(UTC)))

    def trouble(self, text: str | None) -> None:
        self._print(text or "the API server answers again")

    def _print(self, line: str) -> None:
        if line != self._last:
            self._last = line
            print(f"{datetime.now():%H:%M:%S}  {line}", file=self._stream, flush=True)  # noqa: DTZ005 - for people

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.flush()


class LiveScreen:
    """Redraws a few lines in place; time and ETA go on between reports."""

    def __init__(self, console: Console) -> None:
        self._job: dict[str, Any] | None = None
        self._trouble: str | None = None
        self._live = Live(
            console=console, get_renderable=self._render, refresh_per_second=REFRESHES, transient=True
        )

    def show(self, job: dict[str, Any]) -> None:
        self._job = job
        self._live.refresh()

    def trouble(self, text: str | None) -> None:
        self._trouble = text

    def _render(self) -> RenderableType:
        if self._job is None:
            return Text("connecting")
        return render_live(self._job, datetime.now(UTC), trouble=self._trouble)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()


def render_live(job: job_views.Job, now: datetime, *, trouble: str | None = None) -> RenderableType:
    """The view of one moment: title, phase with message, bar with steps, measures, trouble."""
    status, spec = job_views.status_of(job), job["spec"]
    phase = status.get("phase", "Pending")
    took = job_views.elapsed(job, now)
    title = Text.assemble(
        (job["metadata"]["name"], "bold"), f"  {spec['method']['type']} of {spec['model']['uri']}"
    )
    state = Text.assemble(
        (phase, COLOURS.get(phase, "bold")), "  ", status.get("message") or "waits for the operator"
    )
    if took is not None:
        state.append(f"  {format_duration(took)}", "dim")
    lines: list[RenderableType] = [title, state]
    progress = status.get("progress") or {}
    if progress.get("totalSteps"):
        row = Table.grid(padding=(0, 2))
        row.add_row(
            ProgressBar(total=progress["totalSteps"], completed=progress.get("step", 0), width=40),
            job_views.steps(job),
            f"epoch {job_views.number(progress['epoch'], digits=3)}"
            if progress.get("epoch") is not None
            else "",
        )
        lines.append(row)
    if parts := job_views.measures(job, now):
        lines.append(Text("   ".join(parts)))
    if trouble:
        lines.append(Text(trouble, "yellow"))
    return Group(*lines)


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """The first row is the header. A pipe gets whole values, a terminal gets what fits."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPE_WIDTH)
    table = Table(*rows[0], box=None, header_style="bold", pad_edge=False)
    phase = rows[0].index("PHASE")
    for row in rows[1:]:
        cells = [Text(cell) for cell in row]
        cells[phase].stylize(COLOURS.get(row[phase], ""))
        table.add_row(*cells)
    console.print(table)

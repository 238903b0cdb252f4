"""Where the commands draw: a live view on a terminal, one line per change elsewhere."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol, Self, TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

REFRESHES = 4  # a second
CALM_SECONDS = 30.0  # between two lines of a log that differ in their numbers only
PIPE_WIDTH = 2000  # characters; a name and a URI of the greatest length fit

Object = Mapping[str, Any]


@dataclass(frozen=True)
class View:
    """How an object is shown at a moment."""

    lines: Callable[[Object, datetime], Sequence[str]]
    """For a log."""
    picture: Callable[[Object, datetime, str | None], RenderableType]
    """To redraw, with what is wrong with the connection."""
    moving_lines: Callable[[Object, datetime], Sequence[str]] = lambda one, now: ()
    """For a log as well, but now and then is enough while only their numbers change."""


class Screen(Protocol):
    """Shows one object while it changes."""

    def show(self, one: Object) -> None: ...

    def trouble(self, text: str | None) -> None:
        """Something is wrong with the connection; None: no longer."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


def open_screen(stream: TextIO, view: View) -> Screen:
    """A live view if `stream` is a terminal that can be redrawn, else plain lines."""
    console = Console(file=stream, highlight=False)
    live = console.is_terminal and not console.is_dumb_terminal
    return LiveScreen(console, view) if live else PlainScreen(stream, view)


class PlainScreen:
    """One line per change, with the time of day: for logs and pipes."""

    def __init__(self, stream: TextIO, view: View) -> None:
        self._stream = stream
        self._view = view
        self._last: set[str] = set()
        self._moving: dict[str, float] = {}  # words without numbers -> when they were printed

    def show(self, one: Object) -> None:
        now = datetime.now(UTC)
        self._print(self._view.lines(one, now))
        self._print_moving(self._view.moving_lines(one, now))

    def trouble(self, text: str | None) -> None:
        self._print([text or "the API server answers again"])

    def _print(self, lines: Sequence[str]) -> None:
        """Those that were not in the last showing."""
        for line in lines:
            if line not in self._last:
                self._write(line)
        self._last = set(lines)

    def _print_moving(self, lines: Sequence[str]) -> None:
        """Those whose words are new, or were printed a while ago."""
        printed, self._moving = self._moving, {}
        for line in lines:
            words = re.sub(r"\d+", "0", line)
            self._moving[words] = printed.get(words, -CALM_SECONDS)
            if time.monotonic() - self._moving[words] >= CALM_SECONDS:
                self._moving[words] = time.monotonic()
                self._write(line)

    def _write(self, line: str) -> None:
        clock = f"{datetime.now():%H:%M:%S}"  # noqa: DTZ005 - for people
        print(f"{clock}  {line}", file=self._stream, flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.flush()


class LiveScreen:
    """Redraws a few lines in place; times go on between changes."""

    def __init__(self, console: Console, view: View) -> None:
        self._view = view
        self._object: Object | None = None
        self._trouble: str | None = None
        self._live = Live(
            console=console, get_renderable=self._render, refresh_per_second=REFRESHES, transient=True
        )

    def show(self, one: Object) -> None:
        self._object = one
        self._live.refresh()

    def trouble(self, text: str | None) -> None:
        self._trouble = text

    def _render(self) -> RenderableType:
        if self._object is None:
            return Text("connecting")
        return self._view.picture(self._object, datetime.now(UTC), self._trouble)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.stop()


def print_table(rows: Sequence[Sequence[str]], *, colours: Mapping[str, str]) -> None:
    """The first row is the header; `colours` are those of its column PHASE. A pipe gets whole values, a terminal gets
    what fits."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPE_WIDTH)
    table = Table(*rows[0], box=None, header_style="bold", pad_edge=False)
    for column, header in zip(table.columns, rows[0], strict=True):
        if header in ("NAMESPACE", "NAME"):  # what the next command is given
            column.min_width = max(len(row[rows[0].index(header)]) for row in rows)
    phase = rows[0].index("PHASE") if "PHASE" in rows[0] else None
    for row in rows[1:]:
        cells = [Text(cell) for cell in row]
        if phase is not None:
            cells[phase].stylize(colours.get(row[phase], ""))
        table.add_row(*cells)
    console.print(table)

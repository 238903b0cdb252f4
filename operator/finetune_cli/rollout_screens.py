"""What `finetune rollout watch` draws: one tree, from the traffic down to the events."""

from __future__ import annotations

from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from finetune_cli import pages, rollout_pages, rollout_views, screens
from finetune_cli.rollout_views import Rollout
from finetune_cli.texts import seconds_between, status_of
from finetune_operator.core.durations import format_duration

COLOURS = {
    "Pending": "yellow",
    "Progressing": "cyan",
    "Paused": "yellow",
    "Healthy": "green",
    "Degraded": "red",
}
VERDICTS = {"Successful": "green", "Failed": "red", "Inconclusive": "", "Error": "yellow"}
MARKS = {rollout_pages.DONE: "green", rollout_pages.UNDERWAY: "cyan", rollout_pages.TO_COME: "dim"}
BAR = 40  # characters


def render_live(rollout: Rollout, now: datetime, trouble: str | None = None) -> RenderableType:
    """The view of one moment."""
    status = status_of(rollout)
    tree = Tree(_title(rollout), guide_style="dim")
    tree.add(_state(rollout, now))
    for label, lines in (
        ("Traffic", _traffic(rollout)),
        ("Adapters", _adapters(rollout, now)),
        ("Steps", _steps(rollout, now)),
        ("Checks", _checks(rollout)),
        ("Evaluation", [Text(line) for line in rollout_pages.evaluation_lines(rollout)]),
        ("Do", _do(rollout, now)),
        ("Events", _events(rollout, now)),
    ):
        if lines:
            branch = tree.add(Text(label, "bold"))
            for line in lines:
                branch.add(line)
    parts: list[RenderableType] = [tree]
    if trouble:
        parts.append(Text(trouble, "yellow"))
    if not status.get("phase"):
        parts.append(Text("waits for the operator", "dim"))
    return Group(*parts)


def _title(rollout: Rollout) -> Text:
    alias, name = rollout_views.alias_of(rollout), rollout["metadata"]["name"]
    title = Text.assemble((name, "bold"), f"  on {rollout['spec']['baseModelRef']['name']}")
    return title if alias == name else title.append(f", clients ask for {alias}")


def _state(rollout: Rollout, now: datetime) -> Text:
    status = status_of(rollout)
    phase = status.get("phase", "Pending")
    line = Text.assemble((phase, COLOURS.get(phase, "bold")))
    for part in (status.get("stage"), status.get("step") and f"step {status['step']}"):
        line.append(f"  {part}" if part else "")
    line.append(f"  {status['message']}" if status.get("message") else "")
    since = seconds_between(status.get("stageStartTime"), now)
    return line if since is None else line.append(f"  {format_duration(since)}", "dim")


def _traffic(rollout: Rollout) -> list[Text]:
    parts = rollout_views.weight_parts(rollout)
    if not parts:
        return []
    candidate = (status_of(rollout).get("weights") or {}).get("candidate", 0)
    filled = round(BAR * candidate / 100)
    if 0 < candidate < 100:
        filled = min(max(filled, 1), BAR - 1)
    bar = Text.assemble(("█" * (BAR - filled), "blue"), ("░" * filled, "magenta"))
    return [bar, Text("   ".join(parts))]


def _adapters(rollout: Rollout, now: datetime) -> list[Text]:
    lines = []
    for line, one in zip(
        rollout_pages.aligned(rollout_views.adapter_rows(rollout, now)),
        status_of(rollout).get("adapters") or (),
        strict=True,
    ):
        whole = one.get("loadedReplicas", 0) >= one.get("desiredReplicas", 0) > 0
        lines.append(Text(line, "" if whole else "yellow"))
    return lines


def _steps(rollout: Rollout, now: datetime) -> list[Text]:
    line = Text()
    for step, mark in rollout_pages.marked_steps(rollout):
        style = MARKS[mark]
        line.append("   " if line else "").append(f"{mark} {step}", style)
        left = rollout_views.time_left(rollout, now) if mark == rollout_pages.UNDERWAY else None
        line.append(f" ({format_duration(left)} left)" if left is not None else "", style)
    return [line] if line else []


def _checks(rollout: Rollout) -> list[RenderableType]:
    rows = rollout_views.check_rows(rollout)
    if not rows:
        return []
    table = Table(*rollout_views.CHECK_HEADER, box=None, header_style="dim", pad_edge=False)
    verdict = rollout_views.CHECK_HEADER.index("VERDICT")
    for row in rows:
        cells = [Text(cell) for cell in row]
        cells[verdict].stylize(VERDICTS.get(row[verdict], ""))
        table.add_row(*cells)
    return [table, *(Text(line, "yellow") for line in rollout_pages.check_messages(rollout))]


def _do(rollout: Rollout, now: datetime) -> list[Text]:
    """Only where somebody is needed."""
    needed = rollout_pages.needed(rollout)
    if not needed:
        return []
    why = [Text(line, "yellow") for line in rollout_pages.why(rollout, now)[1:]]
    return [*why, *(Text(line, "bold") for line in needed)]


def _events(rollout: Rollout, now: datetime) -> list[Text]:
    return [Text(line, "dim") for line in pages.event_lines(rollout.get("events") or (), now)]


VIEW = screens.View(
    lines=rollout_views.progress_lines, picture=render_live, moving_lines=rollout_views.moving_lines
)

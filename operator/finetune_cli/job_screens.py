"""What `finetune jobs watch` draws."""

from __future__ import annotations

from datetime import datetime

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from finetune_cli import job_views, screens, texts
from finetune_operator.core.durations import format_duration

COLOURS = {
    "Succeeded": "green",
    "Failed": "red",
    "Cancelled": "yellow",
    "Retrying": "yellow",
    "Suspended": "yellow",
    "Running": "cyan",
    "Evaluating": "cyan",
}


def render_live(job: job_views.Job, now: datetime, trouble: str | None = None) -> RenderableType:
    """The view of one moment: title, phase with message, bar with steps, measures, trouble."""
    status, spec = texts.status_of(job), job["spec"]
    phase = status.get("phase", "Pending")
    took = job_views.elapsed(job, now)
    title = Text.assemble(
        (job["metadata"]["name"], "bold"), f"  {spec['method']['type']} of {job_views.model_of(job)}"
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
            f"epoch {texts.number(progress['epoch'], digits=3)}" if progress.get("epoch") is not None else "",
        )
        lines.append(row)
    if parts := job_views.measures(job, now):
        lines.append(Text("   ".join(parts)))
    if trouble:
        lines.append(Text(trouble, "yellow"))
    return Group(*lines)


VIEW = screens.View(lines=lambda job, now: [job_views.progress_line(job, now)], picture=render_live)

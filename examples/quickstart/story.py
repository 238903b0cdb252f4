"""The end of the demo in two tables: what the users saw of each revision, and what became of each rollout.

kubectl get adep support-triage -o json | python examples/quickstart/story.py SUMMARY.json...

The summaries are those of `users.py --summary`; later ones add up with the former ones.
"""

from __future__ import annotations

import json
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

Json = dict[str, Any]


def main() -> None:
    deployment: Json = json.load(sys.stdin)
    summaries = [json.loads(Path(name).read_text(encoding="utf-8")) for name in sys.argv[1:]]
    console = Console()
    console.print(answers_table(deployment, summaries))
    console.print(rollouts_table(deployment["status"]))
    for line in rollback_lines(deployment["status"], summaries):
        console.print(line, highlight=False)


def names_of(deployment: Json) -> dict[str, str]:
    """Revision -> the FineTuneJob that made it."""
    status = deployment["status"]
    entries = [*status.get("history", []), *status.get("adapters", [])]
    return {entry["revision"]: entry.get("fineTuneJob", "") for entry in entries}


def answers_table(deployment: Json, summaries: list[Json]) -> Table:
    total: dict[str, Json] = {}
    for summary in summaries:
        for revision, tally in summary["revisions"].items():
            known = total.setdefault(revision, dict.fromkeys(("answers", "valid", "right", "seconds"), 0))
            for key in known:
                known[key] += tally[key]
    failed = sum(summary["failed"] for summary in summaries)
    names = names_of(deployment)
    table = Table(title=f"What the users saw ({failed} of their requests failed)")
    table.add_column("model", no_wrap=True)
    table.add_column("revision", no_wrap=True)
    for heading in ("answers", "valid JSON", "right category", "seconds each"):
        table.add_column(heading, justify="right")
    for revision, tally in total.items():
        shares = (f"{100 * tally[key] / tally['answers']:.0f} %" for key in ("valid", "right"))
        table.add_row(
            names.get(revision, "base model"),
            revision if revision in names else "",
            str(tally["answers"]),
            *shares,
            f"{tally['seconds'] / tally['answers']:.1f}",
        )
    return table


def rollouts_table(status: Json) -> Table:
    table = Table(title="What became of the rollouts")
    for heading in ("adapter", "revision", "took", "ended"):
        table.add_column(heading, no_wrap=True)
    table.add_column("why")
    for entry in reversed(status.get("history", [])):
        took = (moment(entry["endTime"]) - moment(entry["startTime"])).total_seconds()
        table.add_row(
            entry.get("fineTuneJob", ""),
            entry["revision"],
            f"{took:.0f} s",
            entry["completionStatus"],
            (entry.get("message") or entry.get("reason", "")).split(";")[0],
        )
    return table


def rollback_lines(status: Json, summaries: list[Json]) -> list[str]:
    """How long users had to live with each adapter that was rolled back."""
    lines = []
    for entry in status.get("history", []):
        if entry["completionStatus"] != "Aborted":
            continue
        for tally in (summary["revisions"].get(entry["revision"]) for summary in summaries):
            if tally and tally["first_invalid"]:
                harm = moment(entry["endTime"]).timestamp() - tally["first_invalid"]
                lines.append(
                    f"{entry.get('fineTuneJob', entry['revision'])}: {tally['answers']} answers reached users; "
                    f"{max(harm, 0):.0f} s from the first bad one to the end of the rollback."
                )
    return lines


def moment(text: str) -> datetime:
    return datetime.fromisoformat(text)


if __name__ == "__main__":
    main()

"""The page about the commands is current and complete."""

from __future__ import annotations

from pathlib import Path

import yaml
from typer.testing import CliRunner

from finetune_cli import reference
from finetune_cli.__main__ import app

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "reference" / reference.FILE


def test_committed_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == reference.render_page(), "run `make crds`"


def test_every_group_and_verb_is_on_the_page() -> None:
    text = PAGE.read_text(encoding="utf-8")
    commands = {
        "jobs": ("list", "watch", "describe", "validate"),
        "rollout": (
            "list", "watch", "describe", "history", "validate", "plan",
            "promote", "abort", "pause", "resume", "retry", "undo",
        ),
        "local": ("up", "down", "status", "env", "build", "logs"),
    }  # fmt: skip
    for group, verbs in commands.items():
        for verb in verbs:
            assert f"### `finetune {group} {verb}`\n" in text
    assert "Exit code 0: the wanted adapter serves. 1: it was rolled back." in text


def test_the_version_is_that_of_the_package_and_of_the_chart() -> None:
    said = CliRunner().invoke(app, ["--version"])
    chart = yaml.safe_load((ROOT / "helm" / "finetune-operator" / "Chart.yaml").read_text(encoding="utf-8"))
    assert (said.exit_code, said.output) == (0, f"finetune {chart['appVersion']}\n")

"""The reference page is current and complete."""

from __future__ import annotations

from pathlib import Path

from finetune_operator.api import crds, reference

FOLDER = Path(__file__).parents[3] / "docs" / "reference"
PAGE = reference.render_references()["finetunejob.md"]


def test_committed_page_is_current() -> None:
    assert (FOLDER / "finetunejob.md").read_text(encoding="utf-8") == PAGE, "run `make crds`"


def test_every_field_and_rule_is_on_the_page() -> None:
    schema = crds.build_crds()[0]["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    pending, fields, rules = [schema["properties"]["spec"], schema["properties"]["status"]], 0, 0
    while pending:
        part = pending.pop()
        rules += len(part.get("x-kubernetes-validations", ()))
        for name, child in part.get("properties", {}).items():
            fields += 1
            assert f"| `{name}` |" in PAGE
            pending.append(child)
        if "items" in part:
            pending.append(part["items"])
    rules += len(schema["x-kubernetes-validations"])
    assert PAGE.count("\n| `") == fields
    page_rules = [line for line in PAGE.split("## Columns")[0].splitlines() if line.startswith("* `")]
    assert len(page_rules) == rules


def test_ranges_defaults_and_choices_are_readable() -> None:
    assert "| `dropout` | number from 0 below 1 | `0.05` |" in PAGE
    assert "| `seed` | integer from 0 to 2147483647 | `42` |" in PAGE
    assert "| `type` | `LoRA` or `QLoRA` or `Full` | `LoRA` |" in PAGE
    assert "| `sources` | list of object | **required** |" in PAGE

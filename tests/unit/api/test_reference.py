"""The reference page is current and complete."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_operator.api import crds, reference

FOLDER = Path(__file__).parents[3] / "docs" / "reference"
PAGES = reference.render_references()
PAGE = PAGES["finetunejob.md"]
SCHEMAS = {
    f"{crd['spec']['names']['singular']}.md": crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    for crd in crds.build_crds()
}
every_page = pytest.mark.parametrize("name", PAGES)


@every_page
def test_committed_page_is_current(name: str) -> None:
    assert (FOLDER / name).read_text(encoding="utf-8") == PAGES[name], "run `make crds`"


@every_page
def test_every_field_and_rule_is_on_the_page(name: str) -> None:
    schema, page = SCHEMAS[name], PAGES[name]
    pending, fields, rules = [schema["properties"]["spec"], schema["properties"]["status"]], 0, 0
    while pending:
        part = pending.pop()
        rules += len(part.get("x-kubernetes-validations", ()))
        for field, child in part.get("properties", {}).items():
            fields += 1
            assert f"| `{field}` |" in page
            pending.append(child)
        pending += [part[key] for key in ("items", "additionalProperties") if key in part]
    rules += len(schema["x-kubernetes-validations"])
    assert page.count("\n| `") == fields
    page_rules = [line for line in page.split("## Columns")[0].splitlines() if line.startswith("* `")]
    assert len(page_rules) == rules


def test_ranges_defaults_and_choices_are_readable() -> None:
    assert "| `dropout` | number from 0 below 1 | `0.05` |" in PAGE
    assert "| `seed` | integer from 0 to 2147483647 | `42` |" in PAGE
    assert "| `type` | `LoRA` or `QLoRA` or `Full` | `LoRA` |" in PAGE
    assert "| `sources` | list of object | **required** |" in PAGE

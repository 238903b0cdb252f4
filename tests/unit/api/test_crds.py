"""The committed CRDs are the models', and say what people and kubectl need."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.client import V1JSONSchemaProps

from finetune_operator.api import crds, finetunejob
from finetune_operator.api.adapterdeployment_strategy import STEP_KINDS

ROOT = Path(__file__).parents[3]
CRDS = crds.build_crds()
SCHEMAS = {
    crd["spec"]["names"]["kind"]: crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"] for crd in CRDS
}
every_kind = pytest.mark.parametrize("schema", SCHEMAS.values(), ids=SCHEMAS)


def walk(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from walk(child, f"{path}.{name}")
    for key, suffix in (("items", "[]"), ("additionalProperties", ".*")):
        if key in schema:
            yield from walk(schema[key], path + suffix)


def test_committed_files_are_current() -> None:
    committed = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "crds").glob("*.yaml")}
    assert committed == crds.render_crds(), "run `make crds`"


def test_rendered_text_is_the_document() -> None:
    assert [yaml.safe_load(text) for text in crds.render_crds().values()] == CRDS


def test_no_key_is_a_truth_value_for_kubernetes() -> None:
    """In YAML 1.1, which Kubernetes reads, a bare n is false."""
    for text in crds.render_crds().values():
        assert not re.search(r"^ *(y|n|on|off|yes|no):", text, re.IGNORECASE | re.MULTILINE)


@every_kind
def test_schema_has_only_keys_that_the_api_knows(schema: dict[str, Any]) -> None:
    V1JSONSchemaProps.model_validate(schema)


@every_kind
def test_every_field_is_documented(schema: dict[str, Any]) -> None:
    fields = dict(walk(schema))
    bare = [
        path
        for path, field in fields.items()
        if path.startswith((".spec", ".status"))
        and not path.endswith(("[]", ".*"))
        and "description" not in field
    ]
    assert bare == []


@every_kind
def test_every_default_is_documented(schema: dict[str, Any]) -> None:
    """kubectl explain does not show defaults by itself."""
    silent = [
        path
        for path, field in walk(schema)
        if "default" in field
        and "efault" not in field["description"]
        and not isinstance(field["default"], dict)
    ]
    assert silent == []


# One of several: the parent says that exactly one must be there.
CHOICES = {
    ".spec.adapter.fineTuneJobRef",
    ".spec.adapter.source",
    *(f".spec.strategy.canary.steps[].{kind}" for kind in STEP_KINDS),
}


@every_kind
def test_optional_fields_without_default_say_what_absence_means(schema: dict[str, Any]) -> None:
    spec = schema["properties"]["spec"]
    needed = {f"{path}.{name}" for path, field in walk(spec, ".spec") for name in field.get("required", ())}
    silent = [
        path
        for path, field in walk(spec, ".spec")
        if path not in needed | CHOICES
        and path != ".spec"
        and not path.endswith(("[]", ".*", "secretRef", "secretRef.name", "quantization"))
        and "default" not in field
        and "Absent" not in field["description"]
        and not (
            "[]" in path and "efault" in field["description"]
        )  # items of lists get theirs from the models
    ]
    assert silent == []


@every_kind
def test_rule_messages_are_single_lines_with_a_fallback(schema: dict[str, Any]) -> None:
    for path, field in walk(schema):
        for rule in field.get("x-kubernetes-validations", ()):
            assert rule["message"], path
            assert "\n" not in rule["message"] + rule["rule"], path


@every_kind
def test_rules_read_no_field_of_a_list_item_that_may_be_absent(schema: dict[str, Any]) -> None:
    """Items get no defaults, so such a rule ends in "no such key" instead of its message."""
    for path, field in walk(schema["properties"]["spec"], ".spec"):
        if "[]" not in path:
            continue
        optional = set(field.get("properties", ())) - set(field.get("required", ()))
        for rule in field.get("x-kubernetes-validations", ()):
            read = set(re.findall(r"self[.](\w+)", rule["rule"]))
            guarded = set(re.findall(r"has[(]self[.](\w+)[)]", rule["rule"]))
            assert not (read & optional) - guarded, (path, rule["rule"])


def test_defaults_in_the_schema_are_those_of_the_models() -> None:
    least: dict[str, Any] = {
        "model": {"uri": "file:///m"},
        "dataset": {"sources": [{"uri": "file:///d.csv"}]},
    }
    spec = finetunejob.FineTuneJobSpec.model_validate(least).model_dump(
        mode="json", by_alias=True, exclude_none=True
    )
    schema = SCHEMAS[finetunejob.KIND]["properties"]["spec"]
    for name in ("objective", "method", "hyperparameters", "resources", "output"):
        assert spec[name] == schema["properties"][name]["default"], name
    dataset = schema["properties"]["dataset"]["properties"]
    assert spec["dataset"]["split"] == dataset["split"]["default"]


@pytest.mark.parametrize(("given", "read"), [(2, "2"), ("500m", "500m")])
def test_quantities_may_be_written_as_numbers(given: object, read: str) -> None:
    assert finetunejob.ResourcesSpec.model_validate({"cpu": given}).cpu == read


def test_quantity_is_not_a_truth_value() -> None:
    with pytest.raises(ValueError, match="cpu"):
        finetunejob.ResourcesSpec.model_validate({"cpu": True})


def test_check_finds_a_file_that_is_not_current(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {"a.yaml": "one\n", "b.yaml": "two\n"}

    def run(*arguments: str) -> int:
        return crds.run(texts, folder=tmp_path / "default", description="", arguments=list(arguments))

    assert run("--write", str(tmp_path)) == 0
    assert run("--check", str(tmp_path)) == 0
    assert run("--check") == 1
    assert run("--write") == 0
    assert (tmp_path / "default" / "a.yaml").read_text(encoding="utf-8") == "one\n"
    (tmp_path / "b.yaml").write_text("other\n", encoding="utf-8")
    capsys.readouterr()
    assert run("--check", str(tmp_path)) == 1
    assert "not current: b.yaml" in capsys.readouterr().out

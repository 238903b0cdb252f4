"""The committed CRDs are the models', and say what people and kubectl need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes.client import V1JSONSchemaProps

from finetune_operator.api import crds, finetunejob

ROOT = Path(__file__).parents[3]
CRD = crds.build_crds()[0]
SCHEMA = CRD["spec"]["versions"][0]["schema"]["openAPIV3Schema"]


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
    (text,) = crds.render_crds().values()
    assert yaml.safe_load(text) == CRD


def test_schema_has_only_keys_that_the_api_knows() -> None:
    V1JSONSchemaProps.model_validate(SCHEMA)


def test_every_field_is_documented() -> None:
    fields = dict(walk(SCHEMA))
    bare = [
        path
        for path, schema in fields.items()
        if path.startswith((".spec", ".status"))
        and not path.endswith(("[]", ".*"))
        and "description" not in schema
    ]
    assert bare == []


def test_every_default_is_documented() -> None:
    silent = [
        path
        for path, schema in walk(SCHEMA)
        if "default" in schema
        and "efault" not in schema["description"]
        and not isinstance(schema["default"], dict)
    ]
    assert silent == []


def test_optional_fields_without_default_say_what_absence_means() -> None:
    needed = {
        f"{path}.{name}"
        for path, schema in walk(SCHEMA["properties"]["spec"], ".spec")
        for name in schema.get("required", ())
    }
    silent = [
        path
        for path, schema in walk(SCHEMA["properties"]["spec"], ".spec")
        if path not in needed
        and path != ".spec"
        and not path.endswith(("[]", ".*", "secretRef", "secretRef.name", "quantization"))
        and "default" not in schema
        and "Absent" not in schema["description"]
    ]
    assert silent == []


def test_rule_messages_are_single_lines_with_a_fallback() -> None:
    for path, schema in walk(SCHEMA):
        for rule in schema.get("x-kubernetes-validations", ()):
            assert rule["message"], path
            assert "\n" not in rule["message"] + rule["rule"], path


def test_defaults_in_the_schema_are_those_of_the_models() -> None:
    least: dict[str, Any] = {
        "model": {"uri": "file:///m"},
        "dataset": {"sources": [{"uri": "file:///d.csv"}]},
    }
    spec = finetunejob.FineTuneJobSpec.model_validate(least).model_dump(
        mode="json", by_alias=True, exclude_none=True
    )
    schema = SCHEMA["properties"]["spec"]
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

"""The chart's sources agree with one another and with the code, without Helm."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

import pytest
import yaml
from kubernetes.utils.quantity import parse_quantity
from prometheus_client import CollectorRegistry

from finetune_operator import config
from finetune_operator.adapters.telemetry import Telemetry
from finetune_operator.api.finetunejob import INFRASTRUCTURE
from finetune_operator.manifests.pods import PodDefaults
from finetune_router.config import ENVIRONMENT_PREFIX, RouterConfig
from tools import chart_pages
from tools.chart_pages import CHART, ROOT

VALUES_TEXT = (ROOT / CHART / "values.yaml").read_text(encoding="utf-8")
SCHEMA = json.loads((ROOT / CHART / "values.schema.json").read_text(encoding="utf-8"))


def leaves(node: Any, prefix: str = "") -> Iterator[str]:
    """Paths of a values tree down to what is no mapping with content."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def schema_paths(schema: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key, reference in schema["properties"].items():
        value = SCHEMA["definitions"].get(reference.get("$ref", "").rpartition("/")[2], reference)
        if "properties" in value:
            yield from schema_paths(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_generated_files_are_current() -> None:
    stale = [
        name
        for name, text in chart_pages.render_all().items()
        if not (ROOT / name).is_file() or (ROOT / name).read_text(encoding="utf-8") != text
    ]
    assert stale == [], "run `make crds`"


def test_every_value_is_documented_once() -> None:
    documented = [value.path for value in chart_pages.read_values(VALUES_TEXT)]
    assert len(documented) == len(set(documented))
    for path in leaves(yaml.safe_load(VALUES_TEXT)):
        assert any(path == known or path.startswith(f"{known}.") for known in documented), path


def test_schema_and_values_name_the_same_things() -> None:
    documented = {value.path for value in chart_pages.read_values(VALUES_TEXT)}
    schema = set(schema_paths(SCHEMA)) - {"global"}
    # What is documented as a whole may be divided further in the schema.
    for path in schema:
        assert any(path == known or path.startswith(f"{known}.") for known in documented), path
    for path in documented:
        assert any(path == known or known.startswith(f"{path}.") for known in schema), path


def test_pod_defaults_of_chart_and_operator_are_the_same() -> None:
    chart = SCHEMA["properties"]["trainer"]["properties"]["podDefaults"]["properties"]
    assert set(chart) == {field.alias for field in PodDefaults.model_fields.values()}


def test_every_variable_that_the_chart_sets_is_read_by_the_operator() -> None:
    deployment = (ROOT / CHART / "templates" / "operator-deployment.yaml").read_text(encoding="utf-8")
    set_by_chart = set(re.findall(r"FINETUNE_[A-Z_]+", _environment("operator") + deployment))
    read = _variables("config.py")
    assert set_by_chart <= read
    left_out = {"FINETUNE_STATUS_HOST", "FINETUNE_METRICS_HOST"}  # the defaults are those of a pod
    assert read - set_by_chart == left_out


def test_every_variable_that_the_chart_sets_is_read_by_the_router() -> None:
    set_by_chart = set(re.findall(r"FINETUNE_[A-Z_]+", _environment("router")))
    options = {option.name.upper() for option in fields(RouterConfig)}
    assert set_by_chart
    assert set_by_chart <= {ENVIRONMENT_PREFIX + option for option in options}


def _environment(part: str) -> str:
    """The template of its variables."""
    text = (ROOT / CHART / "templates" / "_environment.tpl").read_text(encoding="utf-8")
    return text.partition(f'define "finetune.{part}Environment"')[2].partition("define ")[0]


def _variables(file: str) -> set[str]:
    source = (ROOT / "operator" / "finetune_operator" / file).read_text(encoding="utf-8")
    return set(re.findall(r'"(FINETUNE_[A-Z_]+)"', source))


@pytest.mark.parametrize("file", ["alerts.yaml", "dashboard.json"])
def test_alerts_and_dashboard_ask_for_series_that_exist(file: str) -> None:
    registry = CollectorRegistry()
    Telemetry(registry)
    known = {metric.name for metric in registry.collect()}
    text = (ROOT / CHART / "files" / file).read_text(encoding="utf-8")
    asked = set(re.findall(r"\b(?:finetune|adapterdeployment)_[a-z_]+\b", text))
    assert asked
    for name in asked:
        assert re.sub(r"_(total|bucket|sum|count)$", "", name) in known, name


def test_the_alert_on_failures_names_the_classes_that_are_counted_from_zero() -> None:
    text = (ROOT / CHART / "files" / "alerts.yaml").read_text(encoding="utf-8")
    assert f'finetune_jobs_finished_total{{class=~"{"|".join(INFRASTRUCTURE)}"}}' in text


def test_the_laptop_has_the_identity_that_the_chart_gives() -> None:
    from finetune_local import certificates

    name, groups = certificates.USERS["operator"]
    assert name == f"system:serviceaccount:{chart_pages.NAMESPACE}:{chart_pages.NAME}"
    assert groups[-1] == f"system:serviceaccounts:{chart_pages.NAMESPACE}"


def test_the_operator_asks_for_no_secrets_and_no_wildcards() -> None:
    for rule in chart_pages.read_rules():
        for verb, group, resource in rule.requests():
            assert "*" not in (verb, group, resource), rule
            assert resource != "secrets", rule
        assert rule.why.endswith("."), rule


def test_the_chart_is_of_the_projects_version() -> None:
    chart = yaml.safe_load((ROOT / CHART / "Chart.yaml").read_text(encoding="utf-8"))
    project = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert project is not None
    assert chart["appVersion"] == project[1]
    assert config.load({}).trainer_image == f"finetune-trainer:{project[1]}"


def test_a_router_full_of_bodies_stays_within_its_memory() -> None:
    """Room for 512 MB of them took 1.29 GB in one worker, while they were passed on."""
    router = yaml.safe_load(VALUES_TEXT)["router"]
    limit = int(parse_quantity(router["resources"]["limits"]["memory"]))
    room = RouterConfig(state_dir="unused").max_buffered_bytes
    assert router["workers"] * (2.5 * room + 100 * 2**20) < limit

"""Specs from the CRD's schema against a real API server: valid ones are taken, others refused by the field's name."""

from __future__ import annotations

import json
from collections.abc import Iterator

import hypothesis
import pytest
from hypothesis import HealthCheck, given, settings

from finetune_local import kubeapi
from finetune_local.cluster import Cluster
from tests import specs
from tests.specs import Broken, Json
from tests.unit.operator.test_fuzz import SEED

pytestmark = pytest.mark.integration

PATH = "/apis/finetune.dev/v1alpha1/namespaces/default/finetunejobs?dryRun=All&fieldValidation=Strict"
SAMPLE = settings(
    max_examples=200,
    deadline=None,
    database=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.function_scoped_fixture,
    ],
)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kubeapi.ApiClient]:
    running = Cluster(tmp_path_factory.mktemp("fuzz"))
    try:
        running.up(("etcd", "kube-apiserver"))
        yield running.client()
    finally:
        running.down()


def refusal(client: kubeapi.ApiClient, spec: object) -> str | None:
    """What the API server says against it; None: it would take it."""
    body: Json = {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "fuzz", "namespace": "default"},
        "spec": spec,
    }
    try:
        client.call("POST", PATH, body)
    except kubeapi.ApiError as error:
        if error.status not in (400, 413, 422):
            raise  # no refusal, but trouble
        return str(error)
    return None


@hypothesis.seed(SEED)
@SAMPLE
@given(spec=specs.valid_specs())
def test_valid_specs_are_taken(client: kubeapi.ApiClient, spec: Json) -> None:
    assert refusal(client, spec) is None, json.dumps(spec)


@hypothesis.seed(SEED)
@SAMPLE
@given(broken=specs.broken_specs())
def test_broken_specs_are_refused_and_the_field_is_named(client: kubeapi.ApiClient, broken: Broken) -> None:
    message = refusal(client, broken.spec)
    assert message is not None, f"taken: {broken.how}"
    assert broken.field in message, f"{broken.how}: {message[:500]}"


def test_references_stay_within_the_namespace(client: kubeapi.ApiClient) -> None:
    reference = {"name": "other", "namespace": "kube-system"}
    data = {"sources": [{"uri": "s3://b/x.jsonl"}]}
    for spec in (
        {"model": {"fineTuneJobRef": reference}, "dataset": data},
        {"model": {"uri": "hf://a/b", "secretRef": reference}, "dataset": data},
        {"model": {"uri": "hf://a/b"}, "dataset": data | {"secretRef": reference}},
        {"model": {"uri": "hf://a/b"}, "dataset": data, "output": {"secretRef": reference}},
    ):
        assert "namespace" in (refusal(client, spec) or "")
    for path in ("team/other", "../other", "kube-system:other"):
        assert "name" in (
            refusal(client, {"model": {"fineTuneJobRef": {"name": path}}, "dataset": data}) or ""
        )


def test_a_spec_of_a_mebibyte_is_refused(client: kubeapi.ApiClient) -> None:
    template = "{{ messages }}" + "x" * 2**20
    data = {"sources": [{"uri": "s3://b/x.jsonl"}]}
    message = refusal(client, {"model": {"uri": "hf://a/b", "chatTemplate": template}, "dataset": data})
    assert "chatTemplate" in (message or "")

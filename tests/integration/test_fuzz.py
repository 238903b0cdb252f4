"""Specs from the CRD's schema against a real API server: valid ones are taken, others refused by the field's name."""

from __future__ import annotations

import json
from collections.abc import Iterator

import hypothesis
import pytest
from hypothesis import HealthCheck, given, settings

from finetune_cli.kinds import JOB
from finetune_cli.specs import find_problems
from finetune_local import kubeapi
from finetune_local.cluster import Cluster
from tests import specs
from tests.properties.test_job_specs import SEED
from tests.specs import Broken, Json

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


def job(spec: object) -> Json:
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": "fuzz", "namespace": "default"},
        "spec": spec,
    }


def without_a_cluster(spec: object) -> list[str]:
    """What `finetune jobs validate --offline` says against it."""
    return find_problems(JOB, job(spec))


def refusal(client: kubeapi.ApiClient, spec: object) -> str | None:
    """What the API server says against it; None: it would take it."""
    try:
        client.call("POST", PATH, job(spec))
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
    assert without_a_cluster(spec) == []


@hypothesis.seed(SEED)
@SAMPLE
@given(broken=specs.broken_specs())
def test_broken_specs_are_refused_and_the_field_is_named(client: kubeapi.ApiClient, broken: Broken) -> None:
    message = refusal(client, broken.spec)
    assert message is not None, f"taken: {broken.how}"
    assert broken.field in message, f"{broken.how}: {message[:500]}"
    assert without_a_cluster(broken.spec), f"taken without a cluster: {broken.how}"


ELSEWHERE: Json = {"name": "other", "namespace": "kube-system"}
DATA: Json = {"sources": [{"uri": "s3://b/x.jsonl"}]}
MODEL: Json = {"uri": "hf://a/b"}
FUNCTION: Json = {"configMapRef": {"name": "rewards", "key": "r.py"}, "entry": "f"}


def rewarded(**reward: object) -> Json:
    return {"objective": "GRPO", "model": MODEL, "dataset": DATA, "reward": reward}


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"model": {"fineTuneJobRef": ELSEWHERE}, "dataset": DATA}, "model.fineTuneJobRef"),
        ({"model": MODEL | {"secretRef": ELSEWHERE}, "dataset": DATA}, "model.secretRef"),
        ({"model": MODEL, "dataset": DATA | {"secretRef": ELSEWHERE}}, "dataset.secretRef"),
        ({"model": MODEL, "dataset": DATA, "output": {"secretRef": ELSEWHERE}}, "output.secretRef"),
        (rewarded(fineTuneJobRef=ELSEWHERE), "reward.fineTuneJobRef"),
        (rewarded(uri="s3://b/judge", secretRef=ELSEWHERE), "reward.secretRef"),
        (
            rewarded(functions=[FUNCTION | {"configMapRef": ELSEWHERE | {"key": "r.py"}}]),
            "reward.functions[0].configMapRef",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_references_stay_within_the_namespace(client: kubeapi.ApiClient, spec: Json, field: str) -> None:
    message = refusal(client, spec)
    assert f'unknown field "spec.{field}.namespace"' in (message or "")
    there = json.loads(json.dumps(spec).replace(', "namespace": "kube-system"', ""))
    assert refusal(client, there) is None, "refused for something else"


@pytest.mark.parametrize("path", ["team/other", "../other", "kube-system:other"])
def test_a_name_is_no_way_into_another_namespace(client: kubeapi.ApiClient, path: str) -> None:
    for spec in (
        {"model": {"fineTuneJobRef": {"name": path}}, "dataset": DATA},
        rewarded(fineTuneJobRef={"name": path}),
        rewarded(uri="s3://b/judge", secretRef={"name": path}),
        rewarded(functions=[FUNCTION | {"configMapRef": {"name": path, "key": "r.py"}}]),
    ):
        assert "name" in (refusal(client, spec) or "")


@pytest.mark.parametrize("key", ["../r.py", "a/r.py", "..data"])
def test_a_key_is_no_way_out_of_its_config_map(client: kubeapi.ApiClient, key: str) -> None:
    message = refusal(
        client, rewarded(functions=[FUNCTION | {"configMapRef": {"name": "rewards", "key": key}}])
    )
    assert "key" in (message or "")


def test_a_spec_of_a_mebibyte_is_refused(client: kubeapi.ApiClient) -> None:
    template = "{{ messages }}" + "x" * 2**20
    message = refusal(client, {"model": MODEL | {"chatTemplate": template}, "dataset": DATA})
    assert "chatTemplate" in (message or "")

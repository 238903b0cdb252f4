"""What a pod asks for, without any I/O."""

from __future__ import annotations

import os
from typing import Any

import pytest

from finetune_local import pods


def a_pod(**container: Any) -> dict[str, Any]:
    return {
        "metadata": {"name": "p", "namespace": "team", "uid": "u-1", "labels": {"app": "x"}},
        "spec": {"containers": [{"name": "ray-head", **container}], "nodeName": "local"},
        "status": {"podIP": "10.1.0.7"},
    }


def environment(references: pods.References | None = None, **container: Any) -> dict[str, str]:
    return pods.environment_of(a_pod(**container), references or pods.References({}, {}))


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("job-a1-x7-head-svc.team.svc.cluster.local:8265", ("team", "job-a1-x7-head-svc")),
        ("job-head-svc.default.svc:8265", ("default", "job-head-svc")),
        ("Job-head-svc.default.svc", ("default", "job-head-svc")),
        ("127.0.0.1:9000", None),
        ("example.com", None),
        ("a.b.svc.evil/../x", None),
        ("", None),
    ],
)
def test_hosts(host: str, expected: tuple[str, str] | None) -> None:
    address = pods.parse_host(host)
    assert (address and (address.namespace, address.service)) == expected


MOUNTS = [
    pods.Mount("/etc/finetune", "run", ""),
    pods.Mount("/mnt/finetune/files", "files", ""),
    pods.Mount("/mnt/finetune/models", "models", ""),
    pods.Mount("/dev/shm", "shm", ""),
]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/etc/finetune/run.json", "/R/etc/finetune/run.json"),
        ("/etc/finetune", "/R/etc/finetune"),
        ("/etc/finetune/", "/R/etc/finetune"),
        ("/mnt/finetune", "/R/mnt/finetune"),  # the folder in which the claims lie side by side
        ("/mnt/finetune/files/a/../b", "/R/mnt/finetune/files/b"),
        ("/etc/finetune-other/run.json", "/etc/finetune-other/run.json"),
        ("/mnt", "/mnt"),
        ("/dev", "/dev"),
        ("/etc", "/etc"),
        ("http://host/etc/finetune", "http://host/etc/finetune"),
        ("", ""),
    ],
)
def test_values_that_point_into_mounts_are_relocated(value: str, expected: str) -> None:
    assert pods.relocate(value, MOUNTS, "/R") == expected


def test_later_sources_win_and_prefixes_apply() -> None:
    references = pods.References(
        config_maps={"c": {"A": "config", "B": "config"}}, secrets={"s": {"A": "secret"}}
    )
    found = environment(
        references,
        envFrom=[{"configMapRef": {"name": "c"}}, {"secretRef": {"name": "s"}, "prefix": "P_"}],
        env=[{"name": "B", "value": "plain"}],
    )
    assert (found["A"], found["B"], found["P_A"]) == ("config", "plain", "secret")


def test_references_to_earlier_variables_are_expanded() -> None:
    found = environment(
        env=[
            {"name": "A", "value": "1"},
            {"name": "B", "value": "$(A)-$(LATER)-$$(A)"},
            {"name": "LATER", "value": "2"},
        ]
    )
    assert found["B"] == "1-$(LATER)-$(A)"


def test_fields_and_resources_of_the_pod() -> None:
    def field(name: str, path: str) -> dict[str, Any]:
        return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}

    cpus = {"name": "CPUS", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}}
    memory = {"resource": "limits.memory", "divisor": "1Mi"}
    found = environment(
        resources={"limits": {"cpu": "1500m", "memory": "2Gi"}},
        env=[
            field("NAME", "metadata.name"),
            field("APP", "metadata.labels['app']"),
            field("IP", "status.podIP"),
            cpus,
            {"name": "MIB", "valueFrom": {"resourceFieldRef": memory}},
        ],
    )
    assert (found["NAME"], found["APP"], found["IP"]) == ("p", "x", "10.1.0.7")
    assert (found["CPUS"], found["MIB"]) == ("2", "2048")


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("data", [None, {"other": "1"}])
def test_a_missing_key_is_an_error_unless_optional(data: dict[str, str] | None, optional: bool) -> None:
    reference = {"name": "s", "key": "PASSWORD", "optional": optional}
    env = [{"name": "X", "valueFrom": {"secretKeyRef": reference}}]
    references = pods.References({}, {"s": data})
    if optional:
        assert "X" not in environment(references, env=env)
    else:
        with pytest.raises(pods.PodError, match=r"Secret s (does not exist|has no key PASSWORD)"):
            environment(references, env=env)


def test_the_names_that_must_be_read_are_known_beforehand() -> None:
    pod = a_pod(
        envFrom=[{"configMapRef": {"name": "c1"}}, {"secretRef": {"name": "s1"}}],
        env=[
            {"name": "A", "valueFrom": {"configMapKeyRef": {"name": "c2", "key": "k"}}},
            {"name": "B", "valueFrom": {"secretKeyRef": {"name": "s2", "key": "k"}}},
            {"name": "C", "value": "x"},
        ],
    )
    assert pods.named_references(pod) == ({"c1", "c2"}, {"s1", "s2"})


def test_what_ray_sets_itself_is_not_overwritten() -> None:
    found = environment(env=[{"name": "RAY_ADDRESS", "value": "x"}, {"name": "RAY_TRAIN_X", "value": "y"}])
    assert "RAY_ADDRESS" not in found
    assert found["RAY_TRAIN_X"] == "y"


def test_a_pod_without_gpus_sees_none() -> None:
    assert environment()["CUDA_VISIBLE_DEVICES"] == ""
    assert "CUDA_VISIBLE_DEVICES" not in environment(resources={"limits": {"nvidia.com/gpu": "1"}})


@pytest.mark.parametrize(("limit", "threads"), [("200m", "1"), ("1", "1"), ("1024", "all"), (None, None)])
def test_a_cpu_limit_bounds_the_threads(limit: str | None, threads: str | None) -> None:
    found = environment(resources={"limits": {"cpu": limit}} if limit else {})
    expected = str(len(os.sched_getaffinity(0))) if threads == "all" else threads
    assert found.get("FINETUNE_CPUS") == expected


def test_the_pods_own_threads_win() -> None:
    own = [{"name": "FINETUNE_CPUS", "value": "7"}]
    assert environment(env=own, resources={"limits": {"cpu": "1"}})["FINETUNE_CPUS"] == "7"


@pytest.mark.parametrize("path", ["../x", "/x", "a/../../x"])
def test_paths_stay_in_their_volume(path: str) -> None:
    with pytest.raises(pods.PodError, match="leaves its volume"):
        pods.safe_path(path)


def test_items_pick_and_rename_keys() -> None:
    source = {"items": [{"key": "a", "path": "sub/b"}]}
    assert pods.pick_items({"a": "", "c": ""}, source, "ConfigMap m") == {"sub/b": "a"}
    with pytest.raises(pods.PodError, match="ConfigMap m has no key a; its keys are c"):
        pods.pick_items({"c": ""}, source, "ConfigMap m")

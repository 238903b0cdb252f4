"""The chart: what it renders is what a real API server takes, and bad values are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from finetune_local import certificates
from finetune_local.cluster import Cluster
from finetune_operator import config
from tests.clients import Json, Kubectl
from tests.integration.chart.helm import HelmError, helm, of_kind, one, render
from tools.chart_pages import CHART, LAPTOP_RBAC, NAME, NAMESPACE, ROOT

pytestmark = pytest.mark.integration

OTHERS = ("ServiceMonitor", "PrometheusRule", "Certificate", "Issuer")  # of operators that are not here
EVERYTHING: Json = {
    "watchNamespaces": ["team-a", "team-b"],
    "image": {"digest": "sha256:" + "a" * 64, "pullPolicy": "Always"},
    "imagePullSecrets": [{"name": "registry"}],
    "operator": {
        "extraEnv": [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}],
        "podLabels": {"team": "platform"},
        "podAnnotations": {"note": "yes"},
        "nodeSelector": {"kubernetes.io/os": "linux"},
        "tolerations": [{"key": "infra", "operator": "Exists"}],
        "affinity": {"podAntiAffinity": {}},
        "priorityClassName": "system-cluster-critical",
    },
    "trainer": {
        "outputUri": "s3://bucket/artifacts",
        "podDefaults": {
            "nodeSelector": {"accelerator": "h200"},
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
            "env": [{"name": "NCCL_DEBUG", "value": "WARN"}],
        },
    },
    "statusEndpoint": {"tls": {"mode": "ExistingSecret", "existingSecret": "endpoint"}},
    "metrics": {
        "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
        "prometheusRule": {"enabled": True},
        "dashboard": {"enabled": True},
    },
    "networkPolicy": {
        "enabled": True,
        "metricsFrom": [{"podSelector": {"matchLabels": {"app": "prometheus"}}}],
    },
    "router": {
        "serviceType": "LoadBalancer",
        "serviceAnnotations": {"internal": "true"},
        "existingSecret": "router",
        "apiKeysSecret": "keys",
        "upstreamKeySecret": "upstream",
        "extraEnv": [{"name": "FINETUNE_ROUTER_MAX_CONCURRENCY", "value": "64"}],
    },
    "prices": {"currency": "EUR", "gpuHour": {"NVIDIA-H200": 3.1, "default": 2}},
    "engine": {
        "url": "http://vllm:8000",
        "endpoints": ["*.svc", "pods/*"],
        "agentUrl": "http://vllm:8001",
        "agentTokenSecret": "agent",
    },
    "alerts": {"existingSecret": "alerts"},
}
SETS: dict[str, Json] = {
    "defaults": {},
    "everything": EVERYTHING,
    "jobs-only": {"router": {"enabled": False}, "statusEndpoint": {"tls": {"mode": "Disabled"}}},
    "single": {"operator": {"replicas": 1, "leaderElection": False}},
    "cert-manager": {"statusEndpoint": {"tls": {"mode": "CertManager"}}},
    "names like numbers": {"nameOverride": "1", "watchNamespaces": ["10042"]},  # a customer's, for example
    "openshift": {"podSecurityContext": {"runAsUser": None, "runAsGroup": None, "fsGroup": None}},
}


@pytest.mark.parametrize("values", SETS.values(), ids=SETS)
def test_lint_has_nothing_to_say(values: Json) -> None:
    assert "0 chart(s) failed" in helm("lint", "--strict", str(ROOT / CHART), values=values)


@pytest.mark.parametrize("values", SETS.values(), ids=SETS)
def test_the_api_server_takes_every_object(values: Json, cluster: Cluster) -> None:
    by_namespace: dict[str, list[Json]] = {}
    for document in render(values):
        if document["kind"] not in OTHERS:
            namespace = document["metadata"].get("namespace", NAMESPACE)
            by_namespace.setdefault(namespace, []).append(document)
    for namespace, items in by_namespace.items():
        kubectl = Kubectl(cluster.kubeconfig, namespace)
        kubectl.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})
        kubectl(
            *(
                "apply",
                "--server-side",
                "--dry-run=server",
                "--validate=strict",
                "--force-conflicts",
                "-f",
                "-",
            ),
            body={"apiVersion": "v1", "kind": "List", "items": items},
        )


@pytest.mark.parametrize("values", SETS.values(), ids=SETS)
def test_pods_of_the_chart_are_accepted_where_restricted_is_enforced(
    values: Json, kubectl: Kubectl, namespace: str
) -> None:
    kubectl("label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted")
    deployments = of_kind(render(values, namespace=namespace), "Deployment")
    assert deployments
    for deployment in deployments:
        spec = deployment["spec"]["template"]["spec"]
        kubectl.apply(
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": spec["serviceAccountName"]}}
        )
        body = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "probe"}, "spec": spec}
        kubectl("create", "--dry-run=server", "-f", "-", body=body)


def test_a_release_whose_name_no_service_can_have_is_told_the_way_out() -> None:
    """Helm takes dots in the name of a release; the API server refuses the Services when half of it is installed."""
    with pytest.raises(HelmError, match=r"team\.a-finetune-operator, which the objects"):
        render(release="team.a")
    services = of_kind(render({"fullnameOverride": "team-a"}, release="team.a"), "Service")
    assert {service["metadata"]["name"].partition("-router")[0] for service in services} == {"team-a"}


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ({"operatr": {}}, "operatr"),
        ({"operator": {"replicaCount": 2}}, "replicaCount"),
        ({"operator": {"replicas": "two"}}, "replicas"),
        ({"operator": {"replicas": 2, "leaderElection": False}}, "set operator.leaderElection=true"),
        ({"operator": {"lease": {"renewSeconds": 20}}}, "each must be less than the one before"),
        ({"operator": {"progressSeconds": 0}}, "progressSeconds"),
        ({"operator": {"logFormat": "xml"}}, "logFormat"),
        ({"operator": {"resources": {"limits": {"memory": "lots"}}}}, "memory"),
        ({"operator": {"extraEnv": [{"name": "NO-DASH"}]}}, "extraEnv"),
        ({"image": {"digest": "sha256:abc"}}, "digest"),
        ({"image": {"repository": ""}}, "repository"),
        ({"trainer": {"outputUri": "/artifacts"}}, "outputUri"),
        ({"trainer": {"outputUri": "file:///"}}, "outputUri"),
        ({"trainer": {"submissionMode": "InteractiveMode"}}, "submissionMode"),
        ({"trainer": {"podDefaults": {"hostNetwork": True}}}, "hostNetwork"),
        ({"trainer": {"podDefaults": {"labels": {"team": "a b"}}}}, "team"),
        ({"operator": {"nodeSelector": {"our nodes": "a"}}}, "our nodes"),
        ({"statusEndpoint": {"port": 70000}}, "port"),
        ({"statusEndpoint": {"tls": {"mode": "Off"}}}, "mode"),
        ({"statusEndpoint": {"tls": {"mode": "ExistingSecret"}}}, "name a Secret with tls.crt"),
        ({"prices": {"gpuHour": {"default": -1}}}, "default"),
        ({"engine": {"endpoints": ["http://x"]}}, "endpoints"),
        ({"engine": {"endpoints": ["x:70000"]}}, "endpoints"),
        ({"engine": {"url": "http://vllm:70000"}}, "url"),
        ({"engine": {"url": "http://vllm:http"}}, "url"),
        ({"engine": {"url": "http://:8000"}}, "url"),
        ({"statusEndpoint": {"port": 8090.5}}, "port"),
        ({"trainer": {"terminationGracePeriodSeconds": 0.9}}, "terminationGracePeriodSeconds"),
        ({"serviceAccount": {"name": "finetune-router"}}, "is the router's account"),
        (
            {"metrics": {"dashboard": {"enabled": True, "labels": {"helm.sh/chart": "x"}}}},
            "metrics.dashboard.labels: helm.sh/chart is set by the chart",
        ),
        ({"metrics": {"port": 8090}}, "choose another one"),
        ({"watchNamespaces": ["Team_A"]}, "watchNamespaces"),
        ({"serviceAccount": {"create": False}}, "name the ServiceAccount to use"),
        ({"engine": {"agentUrl": "http://x:1"}}, "set engine.url"),
        ({"statusEndpoint": {"tls": {"existingSecret": "mine"}}}, "existingSecret: mine is not used with"),
        (
            {"operator": {"extraEnv": [{"name": "FINETUNE_STATUS_PORT", "value": "1"}]}},
            "extraEnv: FINETUNE_STATUS_PORT is set by the chart",
        ),
        (
            {"operator": {"extraEnv": [{"name": "FINETUNE_POD_IP", "value": "10.0.0.1"}]}},
            "operator.extraEnv: FINETUNE_POD_IP is set by the chart",
        ),
        (
            {"router": {"extraEnv": [{"name": "FINETUNE_ROUTER_GRACE", "value": "60"}]}},
            "router.extraEnv: FINETUNE_ROUTER_GRACE is set by the chart",
        ),
        ({"operator": None}, "missing property 'operator'"),
        ({"operator": {"lease": None}}, "missing property 'lease'"),
        ({"statusEndpoint": {"tls": None}}, "missing property 'tls'"),
        (
            {"operator": {"podLabels": {"app.kubernetes.io/name": "x"}}},
            "podLabels: app.* is set by the chart",
        ),
        ({"router": {"podLabels": {"app.kubernetes.io/component": "x"}}}, "router.podLabels: app"),
        ({"trainer": {"podDefaults": {"env": [{"name": "FINETUNE_TOKEN"}]}}}, "FINETUNE_TOKEN is set by"),
        ({"statusEndpoint": {"tls": {"certManager": {"issuerRef": {"kind": "Issuer"}}}}}, "'name' required"),
        ({"operator": {"podDisruptionBudget": {"maxUnavailable": "101%"}}}, "maxUnavailable"),
        ({"nameOverride": "a" * 64}, "nameOverride"),
        ({"fullnameOverride": "1st"}, "fullnameOverride: 1st, which"),
        ({"fullnameOverride": "team.operator"}, "is no name for a Service"),
    ],
)
def test_bad_values_are_refused_by_name(values: Json, complaint: str) -> None:
    with pytest.raises(HelmError, match=complaint):
        render(values)


def test_what_looks_like_a_number_stays_a_name() -> None:
    """YAML reads 10042, and on, as something else than text, which the API server refuses."""
    values: Json = {
        "fullnameOverride": "on",
        "serviceAccount": {"name": "1"},
        "operator": {"priorityClassName": "2"},
        "trainer": {"image": "1000000"},
        "router": {"existingSecret": "3", "apiKeysSecret": "4", "upstreamKeySecret": "5"},
        "engine": {"url": "http://vllm", "agentTokenSecret": "6"},
        "alerts": {"existingSecret": "7"},
        "statusEndpoint": {"tls": {"mode": "ExistingSecret", "existingSecret": "8"}},
    }
    rendered = render(values, namespace="10042")
    operator, router = (
        one(rendered, "Deployment", name)["spec"]["template"]["spec"] for name in ("on", "on-router")
    )
    assert {document["metadata"].get("namespace", "10042") for document in rendered} == {"10042"}
    assert (operator["serviceAccountName"], operator["priorityClassName"]) == ("1", "2")
    environment = {entry["name"]: entry.get("value") for entry in operator["containers"][0]["env"]}
    assert environment["FINETUNE_TRAINER_IMAGE"] == "1000000"
    secrets = [
        v["secret"]["secretName"] for pod in (operator, router) for v in pod["volumes"] if "secret" in v
    ]
    assert sorted(secrets) == ["3", "3", "4", "5", "6", "7", "8"]


def test_the_laptop_runs_the_operator_under_the_charts_roles() -> None:
    """The generated file of the laptop cluster is what the chart renders, rule by rule."""
    everywhere, named = render(), render({"watchNamespaces": ["team-a"]})
    laptop = list(yaml.safe_load_all((ROOT / LAPTOP_RBAC).read_text(encoding="utf-8")))
    rules = [r["rules"] for r in (one(laptop, "ClusterRole", NAME), one(laptop, "Role", f"{NAME}-own"))]
    chart = one(everywhere, "ClusterRole", NAME)["rules"]
    listed = [rule for rule in rules[0] if rule["resources"] == ["namespaces"]]
    assert [rule for rule in rules[0] if rule not in listed] == chart
    assert rules[1] == one(everywhere, "Role", f"{NAME}-own")["rules"]
    # With named namespaces the same rights, but in these alone.
    in_cluster = one(named, "ClusterRole", NAME)["rules"]
    in_team = next(r for r in of_kind(named, "Role") if r["metadata"]["namespace"] == "team-a")["rules"]
    assert sorted(map(str, in_cluster + in_team)) == sorted(map(str, rules[0]))
    assert all(not set(rule["resources"]) & {"rayjobs", "configmaps", "pods"} for rule in in_cluster)
    subjects = [
        b["subjects"] for b in (*of_kind(everywhere, "ClusterRoleBinding"), *of_kind(laptop, "RoleBinding"))
    ]
    assert all(s == [{"kind": "ServiceAccount", "name": NAME, "namespace": NAMESPACE}] for s in subjects)


def test_the_operator_understands_its_environment(tmp_path: Path) -> None:
    """What the chart sets, read by the operator's own configuration."""
    rendered = render(EVERYTHING)
    container = one(rendered, "Deployment", NAME)["spec"]["template"]["spec"]["containers"][0]
    certificates.ensure(tmp_path)
    files = one(rendered, "ConfigMap", f"{NAME}-settings")["data"]
    files["ca.crt"] = (tmp_path / "ca.crt").read_text()
    environment = {e["name"]: e["value"] for e in container["env"] if "value" in e}
    for name, value in environment.items():
        if value.startswith("/etc/finetune-operator/"):
            file = tmp_path / value.removeprefix("/etc/finetune-operator/").replace("/", "-")
            file.write_text(files.get(Path(value).name, "{}"))
            environment[name] = str(file)
    settings = config.load(environment)
    assert settings.namespaces == ("team-a", "team-b")
    assert settings.status_url == f"https://{NAME}.{NAMESPACE}.svc:8090"
    assert settings.router_admin_urls == (f"http://finetune-router-admin.{NAMESPACE}.svc:8081",)
    assert settings.pod_defaults.node_selector == {"accelerator": "h200"}
    assert (settings.engine_url, settings.agent_url) == ("http://vllm:8000", "http://vllm:8001")


def test_crds_come_with_the_chart_and_stay_when_it_goes() -> None:
    documents = of_kind(render(), "CustomResourceDefinition")
    assert len(documents) == 2
    for document in documents:
        source = ROOT / "crds" / f"finetune.dev_{document['spec']['names']['plural']}.yaml"
        annotations = document["metadata"].pop("annotations")
        assert annotations == {"helm.sh/resource-policy": "keep"}
        assert document == yaml.safe_load(source.read_text(encoding="utf-8"))
    assert of_kind(render({"crds": {"install": False}}), "CustomResourceDefinition") == []
    gone = of_kind(render({"crds": {"keep": False}}), "CustomResourceDefinition")
    assert all("annotations" not in document["metadata"] for document in gone)

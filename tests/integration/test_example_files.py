"""Every file in examples/ is applied as it lies there, and every YAML in the documentation, to a real API server with
kubectl's strictest checks."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from finetune_local.cluster import Cluster
from finetune_operator.api.adapterdeployment import AdapterDeploymentSpec
from finetune_operator.api.base import API_VERSION
from finetune_operator.api.crds import build_crds
from finetune_operator.api.finetunejob import FineTuneJobSpec
from tests.clients import Kubectl
from tests.clusters import api_server

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NO_OBJECTS = {
    "quickstart/tickets.yaml",  # what tickets are made of
    "rollouts/gitops-promotion/kustomizeconfig.yaml",
}
GITOPS = EXAMPLES / "rollouts" / "gitops-promotion"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """An API server without the operator: nothing is started."""
    with api_server(tmp_path_factory.mktemp("api-server")) as running:
        Kubectl(running.kubeconfig, "default")("create", "namespace", "argocd")
        yield running


def example_files() -> list[Any]:
    paths = [path for path in sorted(EXAMPLES.rglob("*.yaml")) if path.name != "kustomization.yaml"]
    names = {str(path.relative_to(EXAMPLES)): path for path in paths}
    return [pytest.param(path, id=name) for name, path in names.items() if name not in NO_OBJECTS]


def minimal(kind: str, **spec: Any) -> dict[str, Any]:
    return {"apiVersion": API_VERSION, "kind": kind, "metadata": {"name": "snippet"}, "spec": spec}


LEAST: dict[type[BaseModel], dict[str, Any]] = {
    FineTuneJobSpec: minimal(
        "FineTuneJob", model={"uri": "hf://a/b"}, dataset={"sources": [{"uri": "hf://datasets/a/b/c.jsonl"}]}
    ),
    AdapterDeploymentSpec: minimal(
        "AdapterDeployment", baseModelRef={"name": "b"}, adapter={"fineTuneJobRef": {"name": "j"}}
    ),
}


def snippets() -> list[Any]:
    """Objects of ours in the documentation, and pieces of a spec as part of the least that there may be."""
    found = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted(EXAMPLES.rglob("*.md"))]:
        blocks = re.findall(
            r"^```yaml\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
        )
        for number, block in enumerate(map(yaml.safe_load, blocks)):
            name = f"{page.relative_to(ROOT)}-{number}"
            if block.get("apiVersion") == API_VERSION:
                found.append(pytest.param(block, id=name))
            for model, least in LEAST.items():
                if block.keys() <= {field.alias for field in model.model_fields.values()}:
                    found.append(pytest.param({**least, "spec": least["spec"] | block}, id=name))
    return found


def apply(kubectl: Kubectl, *arguments: str) -> list[dict[str, Any]]:
    done = json.loads(
        kubectl("apply", "--server-side", "--validate=strict", "--dry-run=server", "-o", "json", *arguments)
    )
    return list(done.get("items", [done]))


@pytest.mark.parametrize("path", example_files())
def test_every_example_is_taken(cluster: Cluster, path: Path) -> None:
    documents = [one for one in yaml.safe_load_all(path.read_text(encoding="utf-8")) if one is not None]
    namespace = documents[0]["metadata"].get("namespace", "default")
    taken = apply(Kubectl(cluster.kubeconfig, namespace), "-f", str(path))
    assert [(one["kind"], one["metadata"]["name"]) for one in taken] == [
        (one["kind"], one["metadata"]["name"]) for one in documents
    ]


def test_the_documentation_has_snippets() -> None:
    assert len(snippets()) >= 8


@pytest.mark.parametrize("snippet", snippets())
def test_every_snippet_of_the_documentation_is_taken(
    cluster: Cluster, snippet: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "snippet.json"
    file.write_text(json.dumps(snippet), encoding="utf-8")
    apply(Kubectl(cluster.kubeconfig, "default"), "-f", str(file))


def test_the_gitops_folder_is_taken_as_a_whole(cluster: Cluster) -> None:
    taken = apply(Kubectl(cluster.kubeconfig, "default"), "-k", str(GITOPS))
    assert sorted((one["kind"], one["metadata"]["name"]) for one in taken) == [
        ("AdapterDeployment", "support"),
        ("FineTuneJob", "support-2026-11-03"),
        ("FineTuneJob", "support-2026-11-17"),
    ]
    assert all(one["metadata"]["labels"] == {"app.kubernetes.io/part-of": "support"} for one in taken)


def test_a_promotion_is_one_changed_line(cluster: Cluster, tmp_path: Path) -> None:
    kubectl = Kubectl(cluster.kubeconfig, "default")
    kubectl("apply", "--server-side", "-k", str(GITOPS))
    before = json.loads(kubectl("get", "adep", "support", "-o", "json"))
    for path in GITOPS.rglob("*.yaml"):
        text = path.read_text(encoding="utf-8")
        target = tmp_path / path.relative_to(GITOPS)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text.replace("name: support-2026-11-03      #", "name: support-2026-11-17      #"))
    kubectl("apply", "--server-side", "-k", str(tmp_path))
    after = json.loads(kubectl("get", "adep", "support", "-o", "json"))
    assert after["spec"].pop("adapter") == {"fineTuneJobRef": {"name": "support-2026-11-17"}}
    assert before["spec"].pop("adapter") == {"fineTuneJobRef": {"name": "support-2026-11-03"}}
    assert after["spec"] == before["spec"]
    assert after["metadata"]["generation"] == before["metadata"]["generation"] + 1


def references(schema: dict[str, Any], path: str) -> Iterator[str]:
    """Where a spec names another object, as kustomize writes paths: it goes through lists by itself."""
    for name, child in schema.get("properties", {}).items():
        inner = child.get("items", child)
        if name in ("fineTuneJobRef", "secretRef", "configMapRef"):
            yield f"{path}/{name}/name"
        yield from references(inner, f"{path}/{name}")


def test_kustomize_is_told_every_reference() -> None:
    known = yaml.safe_load((GITOPS / "kustomizeconfig.yaml").read_text(encoding="utf-8"))["nameReference"]
    for crd in build_crds():
        kind = crd["spec"]["names"]["kind"]
        spec = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
        told = [field["path"] for one in known for field in one["fieldSpecs"] if field["kind"] == kind]
        assert sorted(told) == sorted(references(spec, "spec"))


def test_kustomize_follows_references(cluster: Cluster, tmp_path: Path) -> None:
    function = {"configMapRef": {"name": "rewards", "key": "reward.py"}, "entry": "reward"}
    documents = [
        minimal("FineTuneJob", model={"uri": "hf://a/b", "secretRef": {"name": "token"}}),
        minimal("FineTuneJob", model={"fineTuneJobRef": {"name": "first"}}, reward={"functions": [function]}),
        minimal("AdapterDeployment", adapter={"fineTuneJobRef": {"name": "second"}}),
    ]
    for name, document in zip(("first", "second", "bot"), documents, strict=True):
        document["metadata"]["name"] = name
    (tmp_path / "all.yaml").write_text(yaml.safe_dump_all(documents), encoding="utf-8")
    shutil.copy(GITOPS / "kustomizeconfig.yaml", tmp_path)
    kustomization = {
        "namePrefix": "team-",
        "resources": ["all.yaml"],
        "configurations": ["kustomizeconfig.yaml"],
        "secretGenerator": [{"name": "token", "literals": ["HF_TOKEN=hf_x"]}],
        "configMapGenerator": [{"name": "rewards", "literals": ["reward.py=pass"]}],
    }
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(kustomization), encoding="utf-8")
    made = list(yaml.safe_load_all(Kubectl(cluster.kubeconfig, "default")("kustomize", str(tmp_path))))
    names = {one["kind"]: one["metadata"]["name"] for one in made}
    specs = {one["metadata"]["name"]: one["spec"] for one in made if "spec" in one}
    assert names["Secret"].startswith("team-token-")
    assert specs["team-first"]["model"]["secretRef"]["name"] == names["Secret"]
    assert specs["team-second"]["model"]["fineTuneJobRef"]["name"] == "team-first"
    followed = specs["team-second"]["reward"]["functions"][0]["configMapRef"]
    assert followed == {"name": names["ConfigMap"], "key": "reward.py"}
    assert specs["team-bot"]["adapter"]["fineTuneJobRef"]["name"] == "team-second"


def test_a_patch_that_argo_cd_writes_is_one_that_the_operator_reads(cluster: Cluster) -> None:
    """The readme's command with kubectl alone; the annotation needs no change of the spec."""
    kubectl = Kubectl(cluster.kubeconfig, "default")
    kubectl("apply", "--server-side", "-f", str(EXAMPLES / "rollouts" / "approval-gated.yaml"))
    before = json.loads(kubectl("get", "adep", "triage-approved", "-o", "json"))["metadata"]
    kubectl("annotate", "adep", "triage-approved", "finetune.dev/action=promote")
    after = json.loads(kubectl("get", "adep", "triage-approved", "-o", "json"))["metadata"]
    assert after["annotations"]["finetune.dev/action"] == "promote"
    assert after["generation"] == before["generation"]

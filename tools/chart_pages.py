"""Write what follows from the chart's rules and values: RBAC of the laptop, CRDs, README, docs/install.md."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune_operator.api import crds

ROOT = Path(__file__).parents[1]
CHART = Path("helm/finetune-operator")
RULES = CHART / "files" / "operator-rules.yaml"
LAPTOP_RBAC = "operator/finetune_local/manifests/operator-rbac.yaml"
INSTALL_PAGE = "docs/install.md"
NAME, NAMESPACE = "finetune-operator", "finetune-system"
SCOPES = {
    "Watched": "in the namespaces that it serves",
    "Cluster": "in the cluster",
    "Listed": "in the cluster, with `watchNamespaces` only",
    "Own": "in its own namespace",
}


@dataclass(frozen=True)
class Rule:
    """One entry of operator-rules.yaml."""

    groups: tuple[str, ...]
    resources: tuple[str, ...]
    verbs: tuple[str, ...]
    scope: str
    why: str

    def requests(self) -> Iterator[tuple[str, str, str]]:
        """Every (verb, group, resource) that it allows; a subresource is part of the resource."""
        for group in self.groups:
            for resource in self.resources:
                for verb in self.verbs:
                    yield verb, group, resource


def read_rules(root: Path = ROOT) -> tuple[Rule, ...]:
    """The operator's rules. Raises ValueError for a scope that the chart does not know."""
    rules = tuple(
        Rule(
            groups=tuple(entry["apiGroups"]),
            resources=tuple(entry["resources"]),
            verbs=tuple(entry["verbs"]),
            scope=entry["scope"],
            why=entry["why"],
        )
        for entry in yaml.safe_load((root / RULES).read_text(encoding="utf-8"))
    )
    for rule in rules:
        if rule.scope not in SCOPES:
            raise ValueError(f"{RULES}: scope {rule.scope!r} is none of {', '.join(SCOPES)}")
    return rules


def render_all(root: Path = ROOT) -> dict[str, str]:
    """Path below the repository -> content, of every generated file."""
    rules = read_rules(root)
    page = (root / INSTALL_PAGE).read_text(encoding="utf-8")
    return {
        LAPTOP_RBAC: laptop_rbac(rules),
        **{str(CHART / "files" / "crds" / name): text for name, text in crds.render_crds().items()},
        str(CHART / "README.md"): chart_readme((root / CHART / "values.yaml").read_text(encoding="utf-8")),
        INSTALL_PAGE: fill(page, "rules", rules_table(rules)),
    }


# ---------------------------------------------------------------- RBAC


def laptop_rbac(rules: tuple[Rule, ...]) -> str:
    """What the chart renders, for the laptop cluster: its operator has the identity of the chart's ServiceAccount."""
    everywhere = [rule for rule in rules if rule.scope != "Own"]
    own = [rule for rule in rules if rule.scope == "Own"]
    return f"""\
# Generated from {RULES} by `make crds`; do not edit.
# What finetune-operator may do, and nothing more, under the identity that the chart gives it.
apiVersion: v1
kind: Namespace
metadata:
  name: {NAMESPACE}
---
apiVersion: v1
kind: ServiceAccount
metadata:
  name: {NAME}
  namespace: {NAMESPACE}
automountServiceAccountToken: false
---
{_role("ClusterRole", everywhere)}---
{_binding("ClusterRole")}---
{_role("Role", own)}---
{_binding("Role")}"""


def _role(kind: str, rules: list[Rule]) -> str:
    lines = ["apiVersion: rbac.authorization.k8s.io/v1", f"kind: {kind}", *_metadata(kind), "rules:"]
    for rule in rules:
        lines += [
            f"  # {rule.why}",
            f"  - apiGroups: [{_flow(rule.groups)}]",
            f"    resources: [{_flow(rule.resources)}]",
            f"    verbs: [{_flow(rule.verbs)}]",
        ]
    return "\n".join(lines) + "\n"


def _binding(role_kind: str) -> str:
    return "\n".join(
        [
            "apiVersion: rbac.authorization.k8s.io/v1",
            f"kind: {role_kind}Binding",
            *_metadata(role_kind),
            f"roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: {role_kind}, name: {_role_name(role_kind)}}}",
            "subjects:",
            f"  - {{kind: ServiceAccount, name: {NAME}, namespace: {NAMESPACE}}}",
            "",
        ]
    )


def _metadata(role_kind: str) -> list[str]:
    lines = ["metadata:", f"  name: {_role_name(role_kind)}"]
    return [*lines, f"  namespace: {NAMESPACE}"] if role_kind == "Role" else lines


def _role_name(role_kind: str) -> str:
    return f"{NAME}-own" if role_kind == "Role" else NAME


def _flow(items: tuple[str, ...]) -> str:
    return ", ".join(item or '""' for item in items)


def rules_table(rules: tuple[Rule, ...]) -> str:
    lines = ["| resource | verbs | where | why |", "|---|---|---|---|"]
    for rule in rules:
        names = ", ".join(
            f"`{resource}.{group}`" if group else f"`{resource}`"
            for group in rule.groups
            for resource in rule.resources
        )
        lines.append(f"| {names} | {', '.join(rule.verbs)} | {SCOPES[rule.scope]} | {rule.why} |")
    return "\n".join(lines)


def fill(page: str, name: str, content: str) -> str:
    """The page with `content` between the comments <!-- name --> and <!-- /name -->. Raises ValueError without them."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if begin not in page or end not in page:
        raise ValueError(f"{INSTALL_PAGE} has no {begin} … {end}")
    before, after = page.split(begin, 1)[0], page.split(end, 1)[1]
    return f"{before}{begin}\n{content}\n{end}{after}"


# ---------------------------------------------------------------- values


@dataclass(frozen=True)
class Value:
    """One documented value of values.yaml."""

    path: str
    text: str
    default: Any


def read_values(text: str) -> list[Value]:
    """Every value below a `# --` comment, in the order of the file."""
    lines = text.splitlines()
    found: list[Value] = []

    def walk(node: yaml.MappingNode, prefix: str) -> None:
        for key, value in node.value:
            path = f"{prefix}{key.value}"
            above = lines[key.start_mark.line - 1].strip() if key.start_mark.line else ""
            if above.startswith("# -- "):
                default = yaml.safe_load(yaml.serialize(value))
                found.append(Value(path, above.removeprefix("# -- "), default))
            elif isinstance(value, yaml.MappingNode):
                walk(value, f"{path}.")

    root = yaml.compose(text)
    if not isinstance(root, yaml.MappingNode):
        raise ValueError("values.yaml is no mapping")
    walk(root, "")
    return found


def chart_readme(values: str) -> str:
    rows = "\n".join(f"| `{v.path}` | {_shown(v.default)} | {v.text} |" for v in read_values(values))
    return f"""\
# Chart finetune-operator

Installs the operator (two replicas, one leads), the routers, the CRDs and the least rights that they need.
How to install, upgrade and uninstall, with Helm and with Argo CD: [docs/install.md](../../docs/install.md).

```
helm install finetune-operator helm/finetune-operator --namespace finetune-system --create-namespace \\
  --set image.repository=REGISTRY/finetune-operator --set trainer.image=REGISTRY/finetune-trainer:0.1.0 \\
  --set trainer.outputUri=s3://BUCKET/artifacts
```

## Values

Generated from `values.yaml`; `values.schema.json` refuses a value that is misspelt or out of range.

| value | default | |
|---|---|---|
{rows}
"""


def _shown(default: Any) -> str:
    if default in ("", {}, []):
        return ""
    text = yaml.safe_dump(default, default_flow_style=True, width=1000, sort_keys=False)
    return f"`{re.sub(r'[.]{3}', '', text).strip()}`"


if __name__ == "__main__":
    sys.exit(crds.run(render_all(), folder=Path(), description=__doc__ or ""))

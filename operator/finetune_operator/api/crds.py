"""CustomResourceDefinition documents from the models.

`python -m finetune_operator.api.crds --write [DIR]` (or --check [DIR]); DIR is crds below the current folder.
"""

from __future__ import annotations

import argparse
import functools
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from finetune_operator.api import adapterdeployment, finetunejob
from finetune_operator.api.base import CATEGORY, GROUP, VERSION, ApiModel
from finetune_operator.api.structural import Schema, structural_schema

Document = dict[str, Any]

HEADER = "# Generated from operator/finetune_operator/api by `make crds`; do not edit.\n"


class _Dumper(yaml.SafeDumper):
    """Quotes y and n as well: Kubernetes reads them as truth values (YAML 1.1), PyYAML does not."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("^[yYnN]$"), list("yYnN"))


def build_crds() -> list[Document]:
    """Every CustomResourceDefinition, ready to be applied. Raises NotStructuralError if a model cannot be one."""
    return [_build_finetunejob(), _build_adapterdeployment()]


@functools.cache
def schema_of(kind: str) -> Schema:
    """The schema of a kind's objects."""
    definition = next(crd for crd in build_crds() if crd["spec"]["names"]["kind"] == kind)
    schema: Schema = definition["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    return schema


def render_crds() -> dict[str, str]:
    """File name -> YAML text of each definition."""
    return {
        f"{crd['spec']['group']}_{crd['spec']['names']['plural']}.yaml": HEADER
        + yaml.dump(crd, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)
        for crd in build_crds()
    }


def _build_finetunejob() -> Document:
    return _build(
        finetunejob.FineTuneJob,
        finetunejob.FineTuneJobSpec,
        plural=finetunejob.PLURAL,
        short_name="ftj",
        description=finetunejob.DESCRIPTION,
        selectable=[".status.phase", ".spec.method.type"],
        columns=[
            _column("Phase", ".status.phase"),
            _column("Method", ".spec.method.type"),
            _column("Model", ".spec.model.uri"),
            _column("Progress", ".status.progress.summary"),
            _column("Loss", ".status.metrics.loss", kind="number"),
            _column("Age", ".metadata.creationTimestamp", kind="date"),
            _column("Step", ".status.progress.step", kind="integer", priority=1),
            _column("ETA", ".status.progress.eta", priority=1),
            _column("Reason", ".status.reason"),
            _column("Message", ".status.message", priority=1),
            _column("Artifact", ".status.artifact.uri", priority=1),
        ],
    )


def _build_adapterdeployment() -> Document:
    return _build(
        adapterdeployment.AdapterDeployment,
        adapterdeployment.AdapterDeploymentSpec,
        plural=adapterdeployment.PLURAL,
        short_name=adapterdeployment.SHORT_NAME,
        description=adapterdeployment.DESCRIPTION,
        selectable=[".status.phase"],
        columns=[
            _column("Phase", ".status.phase"),
            _column("Stage", ".status.stage"),
            _column("Step", ".status.step"),
            _column("Weight", ".status.weights.candidate", kind="number"),
            _column("Stable", ".status.stableRevision"),
            _column("Candidate", ".status.candidateRevision"),
            _column("Age", ".metadata.creationTimestamp", kind="date"),
            _column("Reason", ".status.reason", priority=1),
            _column("Message", ".status.message", priority=1),
        ],
    )


def _build(
    resource: type[ApiModel],
    spec: type[ApiModel],
    *,
    plural: str,
    short_name: str,
    description: str,
    selectable: list[str],
    columns: list[Document],
) -> Document:
    kind = resource.__name__
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": kind,
                "listKind": f"{kind}List",
                "plural": plural,
                "singular": kind.lower(),
                "shortNames": [short_name],
                "categories": [CATEGORY],
            },
            "scope": "Namespaced",
            "versions": [
                {
                    "name": VERSION,
                    "served": True,
                    "storage": True,
                    "schema": {"openAPIV3Schema": _root_schema(resource, spec, description)},
                    "subresources": {"status": {}},
                    "selectableFields": [{"jsonPath": path} for path in selectable],
                    "additionalPrinterColumns": columns,
                }
            ],
        },
    }


def _root_schema(resource: type[ApiModel], spec_model: type[ApiModel], description: str) -> Document:
    spec = structural_schema(spec_model)
    root = structural_schema(resource, defaults=False)
    meta = {
        "apiVersion": {"type": "string"},
        "kind": {"type": "string"},
        # `name` is declared so that rules can point at it
        "metadata": {"type": "object", "properties": {"name": {"type": "string"}}},
    }
    # Without it, tools that compare generations (Flux, Helm) take an object that nobody has seen for one that is ready.
    status = {**root["properties"]["status"], "default": {"observedGeneration": -1}}
    documented = {"description": root["properties"]["spec"]["description"]}
    return {
        **root,
        "description": description,
        "properties": {**meta, "spec": {**spec, **documented}, "status": status},
    }


def _column(name: str, path: str, *, kind: str = "string", priority: int = 0) -> Document:
    return {"name": name, "type": kind, "jsonPath": path, **({"priority": priority} if priority else {})}


def sync_files(folder: Path, texts: dict[str, str], *, write: bool) -> list[str]:
    """Writes `texts` into `folder`, or (write=False) only compares. Returns the names that differed."""
    stale = [
        name
        for name, text in texts.items()
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text
    ]
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        for name in stale:
            (folder / name).write_text(texts[name], encoding="utf-8")
    return stale


def run(texts: dict[str, str], *, folder: Path, description: str, arguments: list[str] | None = None) -> int:
    """Command line of a generator; `folder` is its default DIR.

    Returns 0 if the files are current (or were written), 1 if --check found old ones.
    """
    parser = argparse.ArgumentParser(description=description)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument(
        "--write", type=Path, metavar="DIR", nargs="?", const=folder, help="write the files that differ"
    )
    mode.add_argument(
        "--check",
        type=Path,
        metavar="DIR",
        nargs="?",
        const=folder,
        help="only say which files differ; exit code 1 if any",
    )
    options = parser.parse_args(arguments)
    write = options.write is not None
    stale = sync_files(options.write if write else options.check, texts, write=write)
    for name in stale:
        print(f"{'written' if write else 'not current'}: {name}")
    if stale and not write:
        print("run `make crds` to write them again", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(run(render_crds(), folder=Path("crds"), description=__doc__ or ""))

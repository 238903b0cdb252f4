"""The steps between the parts: what must be in the API server before the part that needs it starts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from finetune_local import errors, graphs, kubeapi, layouts, objects

RBAC_FILES = ("parts-rbac.yaml", "operator-rbac.yaml")
PATIENCE = 20.0  # seconds


def tasks(
    client: kubeapi.ApiClient,
    layout: layouts.Layout,
    *,
    volumes: dict[str, Path],
    crds: Path | None,
    ray_crds: Path | None,
) -> list[graphs.Task]:
    """The steps that parts.PARTS names in `needs`. `crds`: a folder, or None for those of this very version."""

    def step(name: str, run: Callable[[], object]) -> graphs.Task:
        return graphs.Task(name, ("kube-apiserver",), lambda stop: _patiently(name, run, stop))

    def apply_crds(name: str, files: Iterable[Path]) -> None:
        objects.apply_crds(client, files, memory=layout.run / f"applied-{name}.state")

    def apply_own_crds() -> None:
        apply_crds("crds", write_crds(layout.run / "crds") if crds is None else _files(crds))

    steps = [
        step("node", lambda: objects.apply_node(client)),
        step("identities", lambda: _apply_identities(client)),
        step("volumes", lambda: objects.apply_volumes(client, volumes)),
        step("crds", apply_own_crds),
    ]
    if ray_crds is not None:
        steps.append(step("ray-crds", lambda: apply_crds("ray-crds", _files(ray_crds))))
    return steps


def write_crds(folder: Path) -> list[Path]:
    """Our own CRDs as files, made from the models: an installed package has no other copy of them."""
    from finetune_operator.api import crds  # not at the top: `status` and `down` need no pydantic

    folder.mkdir(exist_ok=True)
    files = []
    for name, text in crds.render_crds().items():
        layouts.write_private(folder / name, text)
        files.append(folder / name)
    return files


def _files(folder: Path) -> Sequence[Path]:
    return sorted(folder.glob("*.yaml"))


def _apply_identities(client: kubeapi.ApiClient) -> None:
    for name in RBAC_FILES:
        objects.apply_file(client, objects.MANIFESTS / name)


def _patiently(name: str, run: Callable[[], object], stop: threading.Event) -> None:
    """A fresh API server is ready before all of its bootstrap objects are there: retry for a few seconds."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            run()
            return
        except kubeapi.ApiError as error:
            # 404: namespace default comes a moment later; 409: our own deletion is not through; 403: roles as well.
            if error.status not in (0, 403, 404, 409, 429, 500, 503) or time.monotonic() > deadline:
                raise errors.LocalClusterError(f"applying {name} failed: {error}") from error
        if stop.wait(0.3):
            return

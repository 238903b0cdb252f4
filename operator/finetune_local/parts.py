"""The parts of the laptop cluster: what each needs first, and when it is ready."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import urllib.request
from collections.abc import Callable
from pathlib import Path

from finetune_local import commands, kubeapi, objects, ports, serving
from finetune_local.commands import Setting

CONTROL_PLANE = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kwok")
TRAINING = (*CONTROL_PLANE, "ray", "ray-gateway", "kuberay", "operator")
SERVING = ("router", "engine")
ALL = (*TRAINING, *SERVING)
# Names of the ports; a part's own ports carry its name as prefix.
PORTS = (
    "etcd", "etcd-peer", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kwok",
    "ray", "ray-dashboard", "ray-agent", "ray-agent-grpc", "ray-runtime-env", "ray-node-manager",
    "ray-object-manager", "ray-client", "ray-metrics",
    "ray-gateway", "kuberay-metrics", "kuberay-health", "operator-status", "operator-metrics",
    "router", "router-admin", "engine", "engine-agent",
)  # fmt: skip
# The port to show where a part has several.
MAIN_PORTS = {"kuberay": "kuberay-metrics", "operator": "operator-status", "ray": "ray-dashboard"}


@dataclasses.dataclass(frozen=True)
class Part:
    """`needs` names parts and steps that must be ready before the start; `is_ready` raises nothing."""

    name: str
    needs: tuple[str, ...]
    command: Callable[[Setting], list[str]]
    is_ready: Callable[[Setting], bool]
    environment: Callable[[Setting], dict[str, str]] = lambda setting: {}
    package: str | None = None  # of ours, whose changed code is a reason to restart
    seconds: float = 60.0  # within which it must be ready
    grace: float = 10.0  # seconds from SIGTERM to SIGKILL
    nice: int = 0  # how far it stands back when the cores do not suffice, 0 to 19


def _answers(url: str) -> bool:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError):
        return False


def _ray_is_ready(setting: Setting) -> bool:
    """The job API answers, and the two processes without which no job runs are healthy."""
    agent = f"http://127.0.0.1:{setting.ports['ray-agent']}"
    pages = (
        f"{setting.dashboard}/api/gcs_healthz",
        f"{agent}/api/local_raylet_healthz",
        f"{setting.dashboard}/api/jobs/",
    )
    return all(_answers(page) for page in pages)


def _secure(port: str, path: str) -> Callable[[Setting], bool]:
    """A probe over TLS with a certificate of our authority."""

    def probe(setting: Setting) -> bool:
        user = "etcd-client" if port == "etcd" else "admin"
        client = kubeapi.ApiClient(
            f"https://127.0.0.1:{setting.ports[port]}", pki=setting.layout.pki, user=user
        )
        try:
            client.call("GET", path, timeout=2)
        except kubeapi.ApiError:
            return False
        return True

    return probe


def _plain(port: str, path: str) -> Callable[[Setting], bool]:
    return lambda setting: _answers(f"http://127.0.0.1:{setting.ports[port]}{path}")


def _listens(port: str) -> Callable[[Setting], bool]:
    """For components whose health page cannot be asked with our certificates (they make their own)."""

    return lambda setting: not ports.is_free(setting.ports[port])


def _node_is_ready(setting: Setting) -> bool:
    try:
        return objects.node_is_ready(setting.client())
    except kubeapi.ApiError:
        return False


PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        Part("etcd", (), commands.etcd, _secure("etcd", "/health")),
        Part("kube-apiserver", ("etcd",), commands.apiserver, _secure("kube-apiserver", "/readyz")),
        Part(
            "kube-controller-manager",
            ("kube-apiserver",),
            commands.controller_manager,
            _listens("kube-controller-manager"),
        ),
        Part("kube-scheduler", ("kube-apiserver",), commands.scheduler, _listens("kube-scheduler")),
        Part("kwok", ("node",), commands.kwok, _node_is_ready),
        Part(
            "ray",
            (),
            commands.ray,
            _ray_is_ready,
            commands.ray_environment,
            seconds=120,
            grace=15,
        ),
        Part(
            "ray-gateway",
            ("kube-apiserver", "identities"),
            commands.gateway,
            _plain("ray-gateway", "/healthz"),
            package="finetune_local",
        ),
        Part(
            "kuberay",
            ("ray-crds", "identities"),
            commands.kuberay,
            _plain("kuberay-health", "/readyz"),
            commands.kuberay_environment,
        ),
        Part(
            "operator",
            ("crds", "identities"),
            commands.operator,
            _plain("operator-metrics", "/healthz"),
            lambda setting: {
                **commands.operator_environment(setting),
                **serving.operator_environment(setting),
                **setting.operator_environment,
            },
            package="finetune_operator",
        ),
        Part("router", (), serving.router, _plain("router-admin", "/healthz"), package="finetune_router"),
        Part(
            "engine",
            ("engine-model",),
            serving.engine,
            _plain("engine", "/health"),
            serving.engine_environment,
            package="finetune_server",
            seconds=180,
            # A training is what a user waits for; a demo's requests come one at a time.
            nice=5,
        ),
    )
}


def programs_of(names: tuple[str, ...]) -> list[str]:
    """Names of the native programs that these parts need."""
    ours = {"ray", "ray-gateway", "operator", *SERVING}
    return [{"kuberay": "kuberay-operator"}.get(name, name) for name in names if name not in ours]


def fingerprint(part: Part, setting: Setting) -> str:
    """Changes when the part would be started differently, or runs code of ours that changed: `up` then restarts it."""
    command = [part.command(setting), sorted(part.environment(setting).items())]
    digest = hashlib.sha256(json.dumps(command).encode())
    spec = importlib.util.find_spec(part.package) if part.package else None
    if spec and spec.origin:
        for path in sorted(Path(spec.origin).parent.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]

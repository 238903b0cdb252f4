"""The parts of the laptop cluster: how each is started, what it needs first, and when it is ready."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import sys
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

from finetune_local import certificates, kubeapi, layouts, objects, ports

CONTROL_PLANE = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kwok")
ALL = (*CONTROL_PLANE, "ray", "ray-gateway", "kuberay", "operator")
# Names of the ports; a part's own ports carry its name as prefix.
PORTS = (
    "etcd", "etcd-peer", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kwok",
    "ray", "ray-dashboard", "ray-agent", "ray-agent-grpc", "ray-runtime-env", "ray-node-manager",
    "ray-object-manager", "ray-client", "ray-metrics",
    "ray-gateway", "kuberay-metrics", "kuberay-health", "operator-status", "operator-metrics",
)  # fmt: skip
# The port to show where a part has several.
MAIN_PORTS = {"kuberay": "kuberay-metrics", "operator": "operator-status", "ray": "ray-dashboard"}
# Programs get this much of the user's environment and no more: jobs must not see credentials of the shell by chance.
INHERITED = (
    "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH", "XDG_CACHE_HOME",
    "http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR",
    "REQUESTS_CA_BUNDLE", "HF_HOME", "HF_ENDPOINT", "HF_HUB_OFFLINE", "CUDA_VISIBLE_DEVICES", "FINETUNE_CACHE",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Setting:
    """Everything that a part's command line depends on."""

    layout: layouts.Layout
    identity: str
    ports: Mapping[str, int]
    programs: Mapping[str, Path]
    ray_parameters: Mapping[str, int]
    operator_environment: Mapping[str, str]

    @property
    def server(self) -> str:
        return f"https://127.0.0.1:{self.ports['kube-apiserver']}"

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.ports['ray-dashboard']}"

    def client(self) -> kubeapi.ApiClient:
        return kubeapi.ApiClient(self.server, pki=self.layout.pki)


@dataclasses.dataclass(frozen=True)
class Part:
    """`needs` names parts and steps that must be ready before the start; `is_ready` raises nothing."""

    name: str
    needs: tuple[str, ...]
    command: Callable[[Setting], list[str]]
    is_ready: Callable[[Setting], bool]
    environment: Callable[[Setting], dict[str, str]] = lambda setting: {}
    seconds: float = 60.0  # within which it must be ready
    grace: float = 10.0  # seconds from SIGTERM to SIGKILL


def base_environment() -> dict[str, str]:
    """The part of our environment that is handed on, with this Python's programs and packages in front."""
    kept = {name: os.environ[name] for name in INHERITED if name in os.environ}
    kept["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), kept.get("PATH", os.defpath)))
    roots: list[str] = []
    for package in ("finetune_local", "finetune_operator", "finetune_trainer"):
        spec = importlib.util.find_spec(package)
        root = str(Path(spec.origin).parents[1]) if spec and spec.origin else ""
        if root and root not in roots and "site-packages" not in root:
            roots.append(root)
    kept["PYTHONPATH"] = os.pathsep.join(roots)
    kept["PYTHONUNBUFFERED"] = "1"
    return kept


def _etcd(setting: Setting) -> list[str]:
    pki, numbers = setting.layout.pki, setting.ports
    files = certificates.pair(pki, "etcd")
    client, peer = f"https://127.0.0.1:{numbers['etcd']}", f"https://127.0.0.1:{numbers['etcd-peer']}"
    return [
        str(setting.programs["etcd"]), "--name=local", f"--data-dir={setting.layout.etcd}",
        f"--listen-client-urls={client}", f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}", f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=local={peer}",
        "--client-cert-auth", f"--trusted-ca-file={pki / 'ca.crt'}",
        f"--cert-file={files.certificate}", f"--key-file={files.key}",
        "--peer-client-cert-auth", f"--peer-trusted-ca-file={pki / 'ca.crt'}",
        f"--peer-cert-file={files.certificate}", f"--peer-key-file={files.key}",
        # Survives the death of the process, not of the machine: right for a laptop, several times faster.
        "--unsafe-no-fsync", "--log-level=warn",
    ]  # fmt: skip


def _apiserver(setting: Setting) -> list[str]:
    pki = setting.layout.pki
    files, client = certificates.pair(pki, "kube-apiserver"), certificates.pair(pki, "etcd-client")
    return [
        str(setting.programs["kube-apiserver"]), "--bind-address=127.0.0.1", "--advertise-address=127.0.0.1",
        f"--secure-port={setting.ports['kube-apiserver']}", "--endpoint-reconciler-type=none",
        f"--etcd-servers=https://127.0.0.1:{setting.ports['etcd']}", f"--etcd-cafile={pki / 'ca.crt'}",
        f"--etcd-certfile={client.certificate}", f"--etcd-keyfile={client.key}",
        f"--tls-cert-file={files.certificate}", f"--tls-private-key-file={files.key}",
        f"--client-ca-file={pki / 'ca.crt'}", "--authorization-mode=RBAC", "--anonymous-auth=false",
        f"--service-account-key-file={pki / 'service-accounts.pub'}",
        f"--service-account-signing-key-file={pki / 'service-accounts.key'}",
        "--service-account-issuer=https://kubernetes.default.svc", "--service-cluster-ip-range=10.0.0.0/24",
        "--profiling=false",
    ]  # fmt: skip


def _controller_manager(setting: Setting) -> list[str]:
    pki = setting.layout.pki
    return [
        str(setting.programs["kube-controller-manager"]), *_kube_flags(setting, "kube-controller-manager"),
        f"--service-account-private-key-file={pki / 'service-accounts.key'}", f"--root-ca-file={pki / 'ca.crt'}",
        "--use-service-account-credentials=true",
    ]  # fmt: skip


def _scheduler(setting: Setting) -> list[str]:
    return [str(setting.programs["kube-scheduler"]), *_kube_flags(setting, "kube-scheduler")]


def _kube_flags(setting: Setting, user: str) -> list[str]:
    kubeconfig = setting.layout.user_kubeconfig(user)
    return [
        f"--kubeconfig={kubeconfig}", f"--authentication-kubeconfig={kubeconfig}",
        f"--authorization-kubeconfig={kubeconfig}", "--bind-address=127.0.0.1",
        f"--secure-port={setting.ports[user]}", "--leader-elect=false", "--profiling=false",
    ]  # fmt: skip


def _kwok(setting: Setting) -> list[str]:
    return [
        str(setting.programs["kwok"]), f"--kubeconfig={setting.layout.user_kubeconfig('kwok')}",
        f"--config={objects.MANIFESTS / 'kwok-stages.yaml'}", f"--manage-single-node={objects.NODE}",
        "--cidr=10.1.0.0/16", "--node-ip=127.0.0.1", "--node-lease-duration-seconds=40",
        f"--server-address=127.0.0.1:{setting.ports['kwok']}",
    ]  # fmt: skip


def _ray(setting: Setting) -> list[str]:
    numbers, parameters = setting.ports, setting.ray_parameters
    start = "from ray.scripts.scripts import main; main()"
    return [
        sys.executable, "-c", start, "start", "--head", "--block", "--disable-usage-stats",
        "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--port={numbers['ray']}",
        f"--dashboard-port={numbers['ray-dashboard']}", f"--dashboard-agent-listen-port={numbers['ray-agent']}",
        f"--dashboard-agent-grpc-port={numbers['ray-agent-grpc']}",
        f"--runtime-env-agent-port={numbers['ray-runtime-env']}",
        f"--node-manager-port={numbers['ray-node-manager']}", f"--object-manager-port={numbers['ray-object-manager']}",
        f"--ray-client-server-port={numbers['ray-client']}", f"--metrics-export-port={numbers['ray-metrics']}",
        "--min-worker-port=0", "--max-worker-port=0",  # any free one: two laptop clusters must not fight
        f"--num-cpus={parameters['cpus']}", f"--num-gpus={parameters['gpus']}",
        f"--object-store-memory={parameters['object_store_bytes']}",
        f"--temp-dir={setting.layout.ray_folder(setting.identity)}",
    ]  # fmt: skip


def _gateway(setting: Setting) -> list[str]:
    return [
        sys.executable, "-m", "finetune_local.ray_gateway", f"--port={setting.ports['ray-gateway']}",
        f"--server={setting.server}", f"--pki={setting.layout.pki}", f"--dashboard={setting.dashboard}",
        f"--folder={setting.layout.pods}",
    ]  # fmt: skip


def _kuberay(setting: Setting) -> list[str]:
    numbers = setting.ports
    return [
        str(setting.programs["kuberay-operator"]),
        f"--kubeconfig={setting.layout.user_kubeconfig('kuberay')}", "--enable-leader-election=false",
        f"--metrics-addr=127.0.0.1:{numbers['kuberay-metrics']}",
        f"--health-probe-bind-address=127.0.0.1:{numbers['kuberay-health']}",
        "--reconcile-concurrency=4", "--log-stdout-encoder=console",
    ]  # fmt: skip


def _kuberay_environment(setting: Setting) -> dict[str, str]:
    # Go sends nothing for loopback through a proxy, so the API server is reached directly.
    proxy = f"http://127.0.0.1:{setting.ports['ray-gateway']}"
    return {"HTTP_PROXY": proxy, "http_proxy": proxy, "NO_PROXY": "", "no_proxy": "", "RAY_ENABLE_KUBERAY": "1"}


def _operator(setting: Setting) -> list[str]:
    return [sys.executable, "-m", "finetune_operator"]


def _operator_environment(setting: Setting) -> dict[str, str]:
    numbers = setting.ports
    return {
        "KUBECONFIG": str(setting.layout.user_kubeconfig("operator")),
        "FINETUNE_SUBMISSION_MODE": "HTTPMode",
        "FINETUNE_OUTPUT_URI": f"file://{setting.layout.artifacts}",
        "FINETUNE_STATUS_HOST": "127.0.0.1",
        "FINETUNE_STATUS_PORT": str(numbers["operator-status"]),
        "FINETUNE_STATUS_URL": f"http://127.0.0.1:{numbers['operator-status']}",
        "FINETUNE_METRICS_HOST": "127.0.0.1",
        "FINETUNE_METRICS_PORT": str(numbers["operator-metrics"]),
        "FINETUNE_TERMINATION_GRACE_SECONDS": "5",
        "FINETUNE_LOG_FORMAT": "plain",
        **setting.operator_environment,
    }


def _answers(url: str) -> bool:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError):
        return False


def _secure(port: str, path: str) -> Callable[[Setting], bool]:
    """A probe over TLS with a certificate of our authority."""

    def probe(setting: Setting) -> bool:
        user = "etcd-client" if port == "etcd" else "admin"
        client = kubeapi.ApiClient(
            f"https://127.0.0.1:{setting.ports[port]}", pki=setting.layout.pki, user=user
        )
        try:
            client.call("GET", path, timeout=5)
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


def ray_parameters() -> dict[str, int]:
    """CPUs and GPUs as the node has them; the object store is small because trainers hand over little through it."""
    resources = objects.capacity()
    memory = psutil.virtual_memory().total
    return {
        "cpus": int(resources["cpu"]),
        "gpus": int(resources.get("nvidia.com/gpu", "0")),
        "object_store_bytes": max(100 << 20, min(memory // 20, 1 << 30)),
    }


def _ray_environment(setting: Setting) -> dict[str, str]:
    return {
        "RAY_AUTH_MODE": "disabled",
        # Despite its name: everything of Ray, the programs that join it included, then stays on the loopback address,
        # which `ray start` would otherwise replace by the machine's own.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "RAY_PRESTART_WORKER_FIRST_DRIVER": "0",
        "RAY_enable_open_telemetry": "false",
    }


PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        Part("etcd", (), _etcd, _secure("etcd", "/health")),
        Part("kube-apiserver", ("etcd",), _apiserver, _secure("kube-apiserver", "/readyz")),
        Part(
            "kube-controller-manager",
            ("kube-apiserver",),
            _controller_manager,
            _listens("kube-controller-manager"),
        ),
        Part("kube-scheduler", ("kube-apiserver",), _scheduler, _listens("kube-scheduler")),
        Part("kwok", ("node",), _kwok, _node_is_ready),
        Part(
            "ray", (), _ray, _plain("ray-dashboard", "/api/jobs/"), _ray_environment, seconds=120, grace=15
        ),
        Part("ray-gateway", ("kube-apiserver", "identities"), _gateway, _plain("ray-gateway", "/healthz")),
        Part(
            "kuberay", ("ray-crds", "identities"), _kuberay, _plain("kuberay-health", "/readyz"), _kuberay_environment
        ),
        Part(
            "operator",
            ("crds", "identities"),
            _operator,
            _plain("operator-metrics", "/healthz"),
            _operator_environment,
        ),
    )
}


def programs_of(names: tuple[str, ...]) -> list[str]:
    """Names of the native programs that these parts need."""
    needed = {"kuberay": "kuberay-operator", "ray": "", "ray-gateway": "", "operator": ""}
    return [program for name in names if (program := needed.get(name, name))]


def fingerprint(argv: list[str], environment: Mapping[str, str]) -> str:
    """Changes when a part would be started differently: then a second `up` restarts it."""
    return hashlib.sha256(json.dumps([argv, sorted(environment.items())]).encode()).hexdigest()[:16]

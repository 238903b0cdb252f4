"""How each part of the laptop cluster is started: command lines and environments, and nothing else."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import psutil

from finetune_local import certificates, kubeapi, layouts, objects

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
    engine_model: str

    @property
    def server(self) -> str:
        return f"https://127.0.0.1:{self.ports['kube-apiserver']}"

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.ports['ray-dashboard']}"

    def client(self) -> kubeapi.ApiClient:
        return kubeapi.ApiClient(self.server, pki=self.layout.pki)


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


def etcd(setting: Setting) -> list[str]:
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


def apiserver(setting: Setting) -> list[str]:
    pki = setting.layout.pki
    files, client = certificates.pair(pki, "kube-apiserver"), certificates.pair(pki, "etcd-client")
    policy = setting.layout.audit_policy
    audit = [f"--audit-policy-file={policy}", f"--audit-log-path={setting.layout.log('audit')}"]
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
        "--profiling=false", *(audit if policy.is_file() else ()),
    ]  # fmt: skip


def controller_manager(setting: Setting) -> list[str]:
    pki = setting.layout.pki
    return [
        str(setting.programs["kube-controller-manager"]), *_kube_flags(setting, "kube-controller-manager"),
        f"--service-account-private-key-file={pki / 'service-accounts.key'}", f"--root-ca-file={pki / 'ca.crt'}",
        "--use-service-account-credentials=true",
    ]  # fmt: skip


def scheduler(setting: Setting) -> list[str]:
    return [str(setting.programs["kube-scheduler"]), *_kube_flags(setting, "kube-scheduler")]


def _kube_flags(setting: Setting, user: str) -> list[str]:
    kubeconfig = setting.layout.user_kubeconfig(user)
    return [
        f"--kubeconfig={kubeconfig}", f"--authentication-kubeconfig={kubeconfig}",
        f"--authorization-kubeconfig={kubeconfig}", "--bind-address=127.0.0.1",
        f"--secure-port={setting.ports[user]}", "--leader-elect=false", "--profiling=false",
    ]  # fmt: skip


def kwok(setting: Setting) -> list[str]:
    return [
        str(setting.programs["kwok"]), f"--kubeconfig={setting.layout.user_kubeconfig('kwok')}",
        f"--config={objects.MANIFESTS / 'kwok-stages.yaml'}", f"--manage-single-node={objects.NODE}",
        "--cidr=10.1.0.0/16", "--node-ip=127.0.0.1", "--node-lease-duration-seconds=40",
        f"--server-address=127.0.0.1:{setting.ports['kwok']}",
    ]  # fmt: skip


def ray(setting: Setting) -> list[str]:
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


def gateway(setting: Setting) -> list[str]:
    return [
        sys.executable, "-m", "finetune_local.ray_gateway", f"--port={setting.ports['ray-gateway']}",
        f"--server={setting.server}", f"--pki={setting.layout.pki}", f"--dashboard={setting.dashboard}",
        f"--folder={setting.layout.pods}",
    ]  # fmt: skip


def kuberay(setting: Setting) -> list[str]:
    numbers = setting.ports
    return [
        str(setting.programs["kuberay-operator"]),
        f"--kubeconfig={setting.layout.user_kubeconfig('kuberay')}", "--enable-leader-election=false",
        f"--metrics-addr=127.0.0.1:{numbers['kuberay-metrics']}",
        f"--health-probe-bind-address=127.0.0.1:{numbers['kuberay-health']}",
        "--reconcile-concurrency=4", "--log-stdout-encoder=console",
    ]  # fmt: skip


def kuberay_environment(setting: Setting) -> dict[str, str]:
    # Go sends nothing for loopback through a proxy, so the API server is reached directly.
    proxy = f"http://127.0.0.1:{setting.ports['ray-gateway']}"
    return {
        "HTTP_PROXY": proxy,
        "http_proxy": proxy,
        "NO_PROXY": "",
        "no_proxy": "",
        "RAY_ENABLE_KUBERAY": "1",
    }


def operator(setting: Setting) -> list[str]:
    return [sys.executable, "-m", "finetune_operator"]


def operator_environment(setting: Setting) -> dict[str, str]:
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
    }


def ray_parameters() -> dict[str, int]:
    """CPUs and GPUs as the node has them; the object store is small because trainers hand over little through it."""
    resources = objects.capacity()
    memory = psutil.virtual_memory().total
    return {
        "cpus": int(resources["cpu"]),
        "gpus": int(resources.get("nvidia.com/gpu", "0")),
        "object_store_bytes": max(100 << 20, min(memory // 20, 1 << 30)),
    }


def ray_environment(setting: Setting) -> dict[str, str]:
    return {
        "RAY_AUTH_MODE": "disabled",
        # Despite its name: everything of Ray, the programs that join it included, then stays on the loopback address,
        # which `ray start` would otherwise replace by the machine's own.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_DISABLE_IMPORT_WARNING": "1",
        "RAY_PRESTART_WORKER_FIRST_DRIVER": "0",
        "RAY_enable_open_telemetry": "false",
    }

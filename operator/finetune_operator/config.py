"""The operator's configuration: the only place that reads the environment."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from finetune_fit.prices import PriceTable

IN_CLUSTER_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
DEFAULT_NAMESPACE = "finetune-system"


class ConfigurationError(Exception):
    """A variable of the environment is missing or wrong; the message names it and says what it may be."""


@dataclass(frozen=True)
class OperatorConfig:
    namespaces: tuple[str, ...]
    """Namespaces to serve; empty means all."""
    submission_mode: str
    """How KubeRay submits: HTTPMode or K8sJobMode."""
    trainer_image: str
    """Training image of jobs that name none."""
    output_uri: str | None
    """Folder under which jobs without output.uri write; None means that output.uri is required."""
    status_host: str
    status_port: int
    """Where the endpoint that trainers report to listens."""
    status_url: str
    """Base URL of that endpoint as training pods see it."""
    status_certificate: Path | None
    status_key: Path | None
    status_authority: Path | None
    """PEM files; with them the endpoint speaks TLS, and pods get the authority to verify it."""
    metrics_host: str
    metrics_port: int
    """Where /metrics and /healthz are served."""
    termination_grace_seconds: int
    """Time that training pods have between SIGTERM and SIGKILL, in seconds."""
    progress_seconds: float
    """Least time between two status writes for progress of one job, in seconds."""
    json_logs: bool
    namespace: str
    """Namespace of the operator itself, where it keeps the route snapshot."""
    router_admin_urls: tuple[str, ...]
    """Admin URLs of the routers; a name with several addresses is several routers."""
    router_token_file: Path | None
    engine_url: str | None
    """Engine of deployments that name none."""
    agent_url: str | None
    """Its agent, where that is not on the engine's host at spec.serving.agentPort."""
    agent_token_file: Path | None
    prices: PriceTable | None
    """What an hour of each kind of GPU costs."""
    accelerator_label: str
    """Label of nodes that spec.resources.acceleratorType selects."""
    alert_providers_file: Path | None
    """JSON {name: URL}."""
    drain_seconds: float
    """Time between the withdrawal of a deleted deployment's route and the unloading of its adapters, in seconds."""

    def status_tls(self) -> ssl.SSLContext | None:
        """The server side of TLS, or None where no certificate is configured."""
        if self.status_certificate is None:
            return None
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.status_certificate, self.status_key)
        return context

    def authority_pem(self) -> str | None:
        return self.status_authority.read_text() if self.status_authority else None


def _number(environ: Mapping[str, str], name: str, default: float, *, low: float, high: float) -> float:
    text = environ.get(name, "").strip()
    try:
        value = float(text) if text else default
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise ConfigurationError(f"{name}={text!r}: must be a number from {low:g} to {high:g}")
    return value


def _choice(environ: Mapping[str, str], name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = environ.get(name) or default
    if value not in allowed:
        raise ConfigurationError(f"{name}={value!r}: must be one of {', '.join(allowed)}")
    return value


def _file(environ: Mapping[str, str], name: str) -> Path | None:
    text = environ.get(name)
    if not text:
        return None
    if not Path(text).is_file():
        raise ConfigurationError(f"{name}={text!r}: no such file")
    return Path(text)


def _prices(environ: Mapping[str, str], name: str) -> PriceTable | None:
    file = _file(environ, name)
    if file is None:
        return None
    try:
        return PriceTable.parse(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{name}={str(file)!r}: {error}") from error


def _urls(environ: Mapping[str, str], name: str) -> tuple[str, ...]:
    urls = [url.strip().rstrip("/") for url in environ.get(name, "").split(",") if url.strip()]
    for url in urls:
        try:
            parts = urlsplit(url)
            known = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            known = False
        if not known:
            raise ConfigurationError(f"{name}={url!r}: must be a URL such as http://finetune-router:8081")
    return tuple(urls)


def _url(environ: Mapping[str, str], name: str) -> str | None:
    urls = _urls(environ, name)
    if len(urls) > 1:
        raise ConfigurationError(f"{name}={environ[name]!r}: must be one URL")
    return urls[0] if urls else None


def _own_namespace(environ: Mapping[str, str]) -> str:
    if named := environ.get("FINETUNE_NAMESPACE"):
        return named
    try:
        return IN_CLUSTER_NAMESPACE.read_text().strip() or DEFAULT_NAMESPACE
    except OSError:
        return DEFAULT_NAMESPACE


def load(environ: Mapping[str, str]) -> OperatorConfig:
    """Read the configuration. Raises ConfigurationError."""
    port = int(_number(environ, "FINETUNE_STATUS_PORT", 8090, low=1, high=65535))
    certificate = _file(environ, "FINETUNE_STATUS_TLS_CERT")
    key = _file(environ, "FINETUNE_STATUS_TLS_KEY")
    if (certificate is None) != (key is None):
        raise ConfigurationError("FINETUNE_STATUS_TLS_CERT and FINETUNE_STATUS_TLS_KEY: set both or none")
    scheme = "https" if certificate else "http"
    return OperatorConfig(
        namespaces=tuple(n.strip() for n in environ.get("FINETUNE_NAMESPACES", "").split(",") if n.strip()),
        submission_mode=_choice(
            environ, "FINETUNE_SUBMISSION_MODE", "K8sJobMode", ("HTTPMode", "K8sJobMode")
        ),
        trainer_image=environ.get("FINETUNE_TRAINER_IMAGE") or "finetune-trainer:0.1.0",
        output_uri=(environ.get("FINETUNE_OUTPUT_URI") or "").rstrip("/") or None,
        status_host=environ.get("FINETUNE_STATUS_HOST") or "0.0.0.0",  # noqa: S104 - a pod is reached from outside
        status_port=port,
        status_url=(environ.get("FINETUNE_STATUS_URL") or f"{scheme}://finetune-operator:{port}").rstrip("/"),
        status_certificate=certificate,
        status_key=key,
        status_authority=_file(environ, "FINETUNE_STATUS_TLS_CA"),
        metrics_host=environ.get("FINETUNE_METRICS_HOST") or "0.0.0.0",  # noqa: S104
        metrics_port=int(_number(environ, "FINETUNE_METRICS_PORT", 8080, low=1, high=65535)),
        termination_grace_seconds=int(
            _number(environ, "FINETUNE_TERMINATION_GRACE_SECONDS", 30, low=0, high=3600)
        ),
        progress_seconds=_number(environ, "FINETUNE_PROGRESS_SECONDS", 10, low=0.1, high=3600),
        json_logs=_choice(environ, "FINETUNE_LOG_FORMAT", "json", ("json", "plain")) == "json",
        namespace=_own_namespace(environ),
        router_admin_urls=_urls(environ, "FINETUNE_ROUTER_ADMIN_URLS"),
        router_token_file=_file(environ, "FINETUNE_ROUTER_TOKEN_FILE"),
        engine_url=_url(environ, "FINETUNE_ENGINE_URL"),
        agent_url=_url(environ, "FINETUNE_AGENT_URL"),
        agent_token_file=_file(environ, "FINETUNE_AGENT_TOKEN_FILE"),
        prices=_prices(environ, "FINETUNE_PRICES_FILE"),
        accelerator_label=environ.get("FINETUNE_ACCELERATOR_LABEL") or "nvidia.com/gpu.product",
        alert_providers_file=_file(environ, "FINETUNE_ALERT_PROVIDERS_FILE"),
        drain_seconds=_number(environ, "FINETUNE_DRAIN_SECONDS", 30, low=0, high=86400),
    )

"""The operator's configuration: the only place that reads the environment."""

from __future__ import annotations

import json
import re
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from pydantic import ValidationError

from finetune_fit.prices import PriceTable
from finetune_operator.adapters.environment import ConfigurationError, Variables, is_url
from finetune_operator.api import rules, uris
from finetune_operator.core import endpoints
from finetune_operator.core.elections import Terms
from finetune_operator.core.endpoints import AllowList
from finetune_operator.manifests.pods import LABEL_NAME, PodDefaults

IN_CLUSTER_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
DEFAULT_NAMESPACE = "finetune-system"


@dataclass(frozen=True)
class OperatorConfig:
    namespaces: tuple[str, ...]
    """Namespaces to serve; empty means all."""
    submission_mode: str
    """How KubeRay submits: K8sJobMode, SidecarMode or HTTPMode."""
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
    """PEM files, which may be renewed; with them the endpoint speaks TLS, and pods get the authority to verify it."""
    metrics_host: str
    metrics_port: int
    """Where /metrics and /healthz are served."""
    termination_grace_seconds: int
    """Time that training pods have between SIGTERM and SIGKILL, in seconds."""
    pod_defaults: PodDefaults
    """What every training pod gets."""
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
    engine_endpoints: AllowList
    """Engines and agents that deployments may name: nobody else gets the agents' token."""
    prices: PriceTable | None
    """What an hour of each kind of GPU costs."""
    accelerator_label: str
    """Label of nodes that spec.resources.acceleratorType selects."""
    alert_providers_file: Path | None
    """JSON {name: URL}."""
    drain_seconds: float
    """Time between the withdrawal of a deleted deployment's route and the unloading of its adapters, in seconds."""
    leader_election: bool
    """Whether a Lease decides which of several replicas acts."""
    terms: Terms
    """Its times."""
    pod_ip: str | None
    """Address under which other replicas reach this one; None: what the host name means."""


def _authority(variables: Variables, name: str) -> Path | None:
    """Certificates that pods get: with others no trainer could report. An empty file stands for an authority that
    everybody knows."""
    file = variables.file(name)
    try:
        if file is not None and file.stat().st_size:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(file)
    except OSError as error:
        raise ConfigurationError(
            f"{name}={str(file)!r}: must hold the authority's certificate as PEM text: {error}"
        ) from error
    return file


def _pod_defaults(variables: Variables, name: str) -> PodDefaults:
    file = variables.file(name)
    if file is None:
        return PodDefaults()
    try:
        return PodDefaults.model_validate_json(file.read_text())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise ConfigurationError(f"{name}={str(file)!r}: {where}: {first['msg']}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{name}={str(file)!r}: {error}") from error


def _prices(variables: Variables, name: str) -> PriceTable | None:
    file = variables.file(name)
    if file is None:
        return None
    try:
        return PriceTable.parse(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{name}={str(file)!r}: {error}") from error


def _alert_providers(variables: Variables, name: str) -> Path | None:
    """The file itself: it is read at each alert. Its URLs are secrets, which no message holds."""
    file = variables.file(name)
    if file is None:
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{name}={str(file)!r}: {error}") from error
    if not isinstance(found, dict):
        raise ConfigurationError(f"{name}={str(file)!r}: must be a JSON object {{name: URL}}")
    for provider, url in found.items():
        if not is_url(url):
            raise ConfigurationError(
                f"{name}={str(file)!r}: {provider}: must be a URL that begins with https://"
            )
    return file


def _engine_endpoints(variables: Variables, name: str, *, configured: Sequence[str | None]) -> AllowList:
    try:
        return endpoints.parse(variables.raw(name), configured=[url for url in configured if url])
    except ValueError as error:
        raise ConfigurationError(f"{name}={variables.raw(name)!r}: {error}") from error


def _folder(variables: Variables, name: str) -> str | None:
    """A folder's URI without a slash at its end: the job's namespace and name follow."""
    text = variables.raw(name).strip()
    uri = text.rstrip("/")
    if text and not any(re.fullmatch(shape, f"{uri}/job") for shape, _ in uris.SHAPES.values()):
        choices = "; ".join(explanation for _, explanation in uris.SHAPES.values())
        raise ConfigurationError(f"{name}={variables.raw(name)!r}: must be one of: {choices}")
    return uri or None


def _namespaces(variables: Variables, name: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(n.strip() for n in variables.raw(name).split(",") if n.strip()))
    for one in names:
        if not re.fullmatch(rules.NAMESPACE, one):
            raise ConfigurationError(f"{name}={variables.raw(name)!r}: {one!r} is no name of a namespace")
    return names


def _own_namespace(variables: Variables) -> str:
    if named := _namespaces(variables, "FINETUNE_NAMESPACE"):
        if len(named) > 1:
            raise ConfigurationError(
                f"FINETUNE_NAMESPACE={variables.raw('FINETUNE_NAMESPACE')!r}: must be one"
            )
        return named[0]
    try:
        return IN_CLUSTER_NAMESPACE.read_text().strip() or DEFAULT_NAMESPACE
    except OSError:
        return DEFAULT_NAMESPACE


def _terms(variables: Variables) -> Terms:
    terms = Terms(
        lease_seconds=variables.number("FINETUNE_LEASE_SECONDS", Terms.lease_seconds, low=1, high=3600),
        renew_seconds=variables.number(
            "FINETUNE_LEASE_RENEW_SECONDS", Terms.renew_seconds, low=0.5, high=3600
        ),
        retry_seconds=variables.number(
            "FINETUNE_LEASE_RETRY_SECONDS", Terms.retry_seconds, low=0.1, high=600
        ),
    )
    if not terms.lease_seconds > terms.renew_seconds > terms.retry_seconds:
        raise ConfigurationError(
            "FINETUNE_LEASE_SECONDS, FINETUNE_LEASE_RENEW_SECONDS, FINETUNE_LEASE_RETRY_SECONDS"
            f" ({terms.lease_seconds:g}, {terms.renew_seconds:g}, {terms.retry_seconds:g}):"
            " each must be less than the one before"
        )
    return terms


def load(environ: Mapping[str, str]) -> OperatorConfig:
    """Read the configuration. Raises ConfigurationError."""
    variables = Variables(environ)
    port = variables.whole("FINETUNE_STATUS_PORT", 8090, low=1, high=65535)
    metrics_port = variables.whole("FINETUNE_METRICS_PORT", 8080, low=1, high=65535)
    if metrics_port == port:
        raise ConfigurationError(f"FINETUNE_STATUS_PORT and FINETUNE_METRICS_PORT: both are {port}")
    certificate = variables.file("FINETUNE_TLS_CERT_FILE")
    key = variables.file("FINETUNE_TLS_KEY_FILE")
    if (certificate is None) != (key is None):
        raise ConfigurationError("FINETUNE_TLS_CERT_FILE and FINETUNE_TLS_KEY_FILE: set both or none")
    scheme = "https" if certificate else "http"
    engine_url, agent_url = variables.url("FINETUNE_ENGINE_URL"), variables.url("FINETUNE_AGENT_URL")
    return OperatorConfig(
        namespaces=_namespaces(variables, "FINETUNE_NAMESPACES"),
        submission_mode=variables.choice(
            "FINETUNE_SUBMISSION_MODE", "K8sJobMode", ("K8sJobMode", "SidecarMode", "HTTPMode")
        ),
        trainer_image=variables.text(
            "FINETUNE_TRAINER_IMAGE",
            "finetune-trainer:0.1.0",
            pattern="[A-Za-z0-9][A-Za-z0-9._:/@-]*",
            what="the reference of a container image, for example registry.example.com/team/trainer:1.0",
        ),
        output_uri=_folder(variables, "FINETUNE_OUTPUT_URI"),
        status_host=variables.raw("FINETUNE_STATUS_HOST") or "0.0.0.0",  # noqa: S104 - a pod is reached from outside
        status_port=port,
        status_url=variables.url("FINETUNE_STATUS_URL") or f"{scheme}://finetune-operator:{port}",
        status_certificate=certificate,
        status_key=key,
        status_authority=_authority(variables, "FINETUNE_TLS_CA_FILE"),
        metrics_host=variables.raw("FINETUNE_METRICS_HOST") or "0.0.0.0",  # noqa: S104
        metrics_port=metrics_port,
        termination_grace_seconds=variables.whole("FINETUNE_TERMINATION_GRACE_SECONDS", 30, low=0, high=3600),
        pod_defaults=_pod_defaults(variables, "FINETUNE_POD_DEFAULTS_FILE"),
        progress_seconds=variables.number("FINETUNE_PROGRESS_SECONDS", 10, low=0.1, high=3600),
        json_logs=variables.choice("FINETUNE_LOG_FORMAT", "json", ("json", "plain")) == "json",
        namespace=_own_namespace(variables),
        router_admin_urls=variables.urls("FINETUNE_ROUTER_ADMIN_URLS"),
        router_token_file=variables.file("FINETUNE_ROUTER_TOKEN_FILE"),
        engine_url=engine_url,
        agent_url=agent_url,
        agent_token_file=variables.file("FINETUNE_AGENT_TOKEN_FILE"),
        engine_endpoints=_engine_endpoints(
            variables, "FINETUNE_ENGINE_ENDPOINTS", configured=(engine_url, agent_url)
        ),
        prices=_prices(variables, "FINETUNE_PRICES_FILE"),
        accelerator_label=variables.text(
            "FINETUNE_ACCELERATOR_LABEL",
            "nvidia.com/gpu.product",
            pattern=LABEL_NAME,
            what="the name of a label such as nvidia.com/gpu.product",
        ),
        alert_providers_file=_alert_providers(variables, "FINETUNE_ALERT_PROVIDERS_FILE"),
        drain_seconds=variables.number("FINETUNE_DRAIN_SECONDS", 30, low=0, high=86400),
        leader_election=variables.choice("FINETUNE_LEADER_ELECTION", "false", ("true", "false")) == "true",
        terms=_terms(variables),
        pod_ip=variables.address("FINETUNE_POD_IP"),
    )

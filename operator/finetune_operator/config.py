"""The operator's configuration: the only place that reads the environment."""

from __future__ import annotations

import ipaddress
import json
import re
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import yaml
from pydantic import ValidationError

from finetune_fit.prices import PriceTable
from finetune_operator.api import rules, uris
from finetune_operator.core import endpoints
from finetune_operator.core.elections import Terms
from finetune_operator.core.endpoints import AllowList
from finetune_operator.manifests.pods import LABEL_NAME, PodDefaults

IN_CLUSTER_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
DEFAULT_NAMESPACE = "finetune-system"


class ConfigurationError(Exception):
    """A variable of the environment is missing or wrong; the message names it and says what it may be."""


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


def _number(environ: Mapping[str, str], name: str, default: float, *, low: float, high: float) -> float:
    text = environ.get(name, "").strip()
    try:
        value = float(text) if text else default
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise ConfigurationError(f"{name}={text!r}: must be a number from {low:g} to {high:g}")
    return value


def _whole(environ: Mapping[str, str], name: str, default: int, *, low: int, high: int) -> int:
    value = _number(environ, name, default, low=low, high=high)
    if value != int(value):
        raise ConfigurationError(f"{name}={environ[name].strip()!r}: must be a whole number")
    return int(value)


def _choice(environ: Mapping[str, str], name: str, default: str, allowed: tuple[str, ...]) -> str:
    value = environ.get(name) or default
    if value not in allowed:
        raise ConfigurationError(f"{name}={value!r}: must be one of {', '.join(allowed)}")
    return value


def _text(environ: Mapping[str, str], name: str, default: str, *, pattern: str, what: str) -> str:
    text = environ.get(name) or default
    if not re.fullmatch(pattern, text, re.ASCII):
        raise ConfigurationError(f"{name}={text!r}: must be {what}")
    return text


def _address(environ: Mapping[str, str], name: str) -> str | None:
    text = environ.get(name) or None
    try:
        return text and str(ipaddress.ip_address(text))
    except ValueError:
        raise ConfigurationError(f"{name}={text!r}: must be an IP address such as 10.0.0.7") from None


def _file(environ: Mapping[str, str], name: str) -> Path | None:
    text = environ.get(name)
    if not text:
        return None
    if not Path(text).is_file():
        raise ConfigurationError(f"{name}={text!r}: no such file")
    return Path(text)


def _authority(environ: Mapping[str, str], name: str) -> Path | None:
    """Certificates that pods get: with others no trainer could report. An empty file stands for an authority that
    everybody knows."""
    file = _file(environ, name)
    try:
        if file is not None and file.stat().st_size:
            ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(file)
    except OSError as error:
        raise ConfigurationError(
            f"{name}={str(file)!r}: must hold the authority's certificate as PEM text: {error}"
        ) from error
    return file


def _pod_defaults(environ: Mapping[str, str], name: str) -> PodDefaults:
    file = _file(environ, name)
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


def _prices(environ: Mapping[str, str], name: str) -> PriceTable | None:
    file = _file(environ, name)
    if file is None:
        return None
    try:
        return PriceTable.parse(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigurationError(f"{name}={str(file)!r}: {error}") from error


def _alert_providers(environ: Mapping[str, str], name: str) -> Path | None:
    """The file itself: it is read at each alert. Its URLs are secrets, which no message holds."""
    file = _file(environ, name)
    if file is None:
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"{name}={str(file)!r}: {error}") from error
    if not isinstance(found, dict):
        raise ConfigurationError(f"{name}={str(file)!r}: must be a JSON object {{name: URL}}")
    for provider, url in found.items():
        if not _is_url(url):
            raise ConfigurationError(
                f"{name}={str(file)!r}: {provider}: must be a URL that begins with https://"
            )
    return file


def _is_url(url: object) -> bool:
    if not isinstance(url, str) or re.search(r"\s", url):
        return False
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _urls(environ: Mapping[str, str], name: str) -> tuple[str, ...]:
    urls = [url.strip().rstrip("/") for url in environ.get(name, "").split(",") if url.strip()]
    for url in urls:
        if not _is_url(url) or re.search("[?#]", url):  # a path is put behind it
            raise ConfigurationError(f"{name}={url!r}: must be a URL such as http://finetune-router:8081")
    return tuple(urls)


def _url(environ: Mapping[str, str], name: str) -> str | None:
    urls = _urls(environ, name)
    if len(urls) > 1:
        raise ConfigurationError(f"{name}={environ[name]!r}: must be one URL")
    return urls[0] if urls else None


def _engine_endpoints(
    environ: Mapping[str, str], name: str, *, configured: Sequence[str | None]
) -> AllowList:
    try:
        return endpoints.parse(environ.get(name, ""), configured=[url for url in configured if url])
    except ValueError as error:
        raise ConfigurationError(f"{name}={environ[name]!r}: {error}") from error


def _folder(environ: Mapping[str, str], name: str) -> str | None:
    """A folder's URI without a slash at its end: the job's namespace and name follow."""
    text = environ.get(name, "").strip()
    uri = text.rstrip("/")
    if text and not any(re.fullmatch(shape, f"{uri}/job") for shape, _ in uris.SHAPES.values()):
        choices = "; ".join(explanation for _, explanation in uris.SHAPES.values())
        raise ConfigurationError(f"{name}={environ[name]!r}: must be one of: {choices}")
    return uri or None


def _namespaces(environ: Mapping[str, str], name: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(n.strip() for n in environ.get(name, "").split(",") if n.strip()))
    for one in names:
        if not re.fullmatch(rules.NAMESPACE, one):
            raise ConfigurationError(f"{name}={environ[name]!r}: {one!r} is no name of a namespace")
    return names


def _own_namespace(environ: Mapping[str, str]) -> str:
    if named := _namespaces(environ, "FINETUNE_NAMESPACE"):
        if len(named) > 1:
            raise ConfigurationError(f"FINETUNE_NAMESPACE={environ['FINETUNE_NAMESPACE']!r}: must be one")
        return named[0]
    try:
        return IN_CLUSTER_NAMESPACE.read_text().strip() or DEFAULT_NAMESPACE
    except OSError:
        return DEFAULT_NAMESPACE


def _terms(environ: Mapping[str, str]) -> Terms:
    terms = Terms(
        lease_seconds=_number(environ, "FINETUNE_LEASE_SECONDS", Terms.lease_seconds, low=1, high=3600),
        renew_seconds=_number(
            environ, "FINETUNE_LEASE_RENEW_SECONDS", Terms.renew_seconds, low=0.5, high=3600
        ),
        retry_seconds=_number(
            environ, "FINETUNE_LEASE_RETRY_SECONDS", Terms.retry_seconds, low=0.1, high=600
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
    port = _whole(environ, "FINETUNE_STATUS_PORT", 8090, low=1, high=65535)
    metrics_port = _whole(environ, "FINETUNE_METRICS_PORT", 8080, low=1, high=65535)
    if metrics_port == port:
        raise ConfigurationError(f"FINETUNE_STATUS_PORT and FINETUNE_METRICS_PORT: both are {port}")
    certificate = _file(environ, "FINETUNE_TLS_CERT_FILE")
    key = _file(environ, "FINETUNE_TLS_KEY_FILE")
    if (certificate is None) != (key is None):
        raise ConfigurationError("FINETUNE_TLS_CERT_FILE and FINETUNE_TLS_KEY_FILE: set both or none")
    scheme = "https" if certificate else "http"
    engine_url, agent_url = _url(environ, "FINETUNE_ENGINE_URL"), _url(environ, "FINETUNE_AGENT_URL")
    return OperatorConfig(
        namespaces=_namespaces(environ, "FINETUNE_NAMESPACES"),
        submission_mode=_choice(
            environ, "FINETUNE_SUBMISSION_MODE", "K8sJobMode", ("K8sJobMode", "SidecarMode", "HTTPMode")
        ),
        trainer_image=_text(
            environ,
            "FINETUNE_TRAINER_IMAGE",
            "finetune-trainer:0.1.0",
            pattern="[A-Za-z0-9][A-Za-z0-9._:/@-]*",
            what="the reference of a container image, for example registry.example.com/team/trainer:1.0",
        ),
        output_uri=_folder(environ, "FINETUNE_OUTPUT_URI"),
        status_host=environ.get("FINETUNE_STATUS_HOST") or "0.0.0.0",  # noqa: S104 - a pod is reached from outside
        status_port=port,
        status_url=_url(environ, "FINETUNE_STATUS_URL") or f"{scheme}://finetune-operator:{port}",
        status_certificate=certificate,
        status_key=key,
        status_authority=_authority(environ, "FINETUNE_TLS_CA_FILE"),
        metrics_host=environ.get("FINETUNE_METRICS_HOST") or "0.0.0.0",  # noqa: S104
        metrics_port=metrics_port,
        termination_grace_seconds=_whole(environ, "FINETUNE_TERMINATION_GRACE_SECONDS", 30, low=0, high=3600),
        pod_defaults=_pod_defaults(environ, "FINETUNE_POD_DEFAULTS_FILE"),
        progress_seconds=_number(environ, "FINETUNE_PROGRESS_SECONDS", 10, low=0.1, high=3600),
        json_logs=_choice(environ, "FINETUNE_LOG_FORMAT", "json", ("json", "plain")) == "json",
        namespace=_own_namespace(environ),
        router_admin_urls=_urls(environ, "FINETUNE_ROUTER_ADMIN_URLS"),
        router_token_file=_file(environ, "FINETUNE_ROUTER_TOKEN_FILE"),
        engine_url=engine_url,
        agent_url=agent_url,
        agent_token_file=_file(environ, "FINETUNE_AGENT_TOKEN_FILE"),
        engine_endpoints=_engine_endpoints(
            environ, "FINETUNE_ENGINE_ENDPOINTS", configured=(engine_url, agent_url)
        ),
        prices=_prices(environ, "FINETUNE_PRICES_FILE"),
        accelerator_label=_text(
            environ,
            "FINETUNE_ACCELERATOR_LABEL",
            "nvidia.com/gpu.product",
            pattern=LABEL_NAME,
            what="the name of a label such as nvidia.com/gpu.product",
        ),
        alert_providers_file=_alert_providers(environ, "FINETUNE_ALERT_PROVIDERS_FILE"),
        drain_seconds=_number(environ, "FINETUNE_DRAIN_SECONDS", 30, low=0, high=86400),
        leader_election=_choice(environ, "FINETUNE_LEADER_ELECTION", "false", ("true", "false")) == "true",
        terms=_terms(environ),
        pod_ip=_address(environ, "FINETUNE_POD_IP"),
    )

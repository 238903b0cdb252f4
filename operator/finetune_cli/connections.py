"""The connection of the commands to a cluster: which one, which namespace, and what to say when it does not answer."""

from __future__ import annotations

import binascii
import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

import yaml

BUSY_TRIES = 4  # of a request that the server was too busy to begin with
BUSY_SECONDS = 5  # the longest that one is held back, whatever Retry-After says
DEFAULT_KUBECONFIG = Path("~/.kube/config")


class NoClusterError(Exception):
    """There is no cluster to talk to; the message says what was tried and what to do."""


@dataclass(frozen=True)
class Connection:
    """An API client (kubernetes.client.ApiClient) and the namespace that the kubeconfig names."""

    api: Any
    namespace: str
    server: str


def connect(kubeconfig: Path | None, context: str | None) -> Connection:
    """Reads the kubeconfig as kubectl does; without any, the laptop cluster's. Raises NoClusterError."""
    from kubernetes import client, config

    file = _find(kubeconfig)
    if file is None and "KUBERNETES_SERVICE_HOST" in os.environ:
        config.load_incluster_config()
        return _connection(client.Configuration.get_default_copy(), _pod_namespace())
    settings = client.Configuration()
    try:
        known, active = config.list_kube_config_contexts(config_file=file)
        if context is not None and context not in (names := [one["name"] for one in known]):
            raise NoClusterError(
                f"--context: {file or 'the kubeconfig'} has no context {context!r}; there are {', '.join(names)}"
            )
        with _complaints() as complaints:
            config.load_kube_config(config_file=file, context=context, client_configuration=settings)
    except config.ConfigException as error:
        named = f"{file}: " if file else ""
        raise NoClusterError(
            f"{named}{str(error).rstrip('.')}. Set KUBECONFIG or --kubeconfig, "
            "or start a cluster on this machine: finetune local up"
        ) from error
    except binascii.Error as error:
        raise NoClusterError(
            f"{file or 'the kubeconfig'}: a certificate or key in it is no base64: {error}; get the file anew"
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise NoClusterError(
            f"{file or 'the kubeconfig'} is no kubeconfig; set KUBECONFIG or --kubeconfig"
        ) from error
    except OSError as error:  # of the file itself, or of one that it names
        raise NoClusterError(
            f"{error.filename}: {error.strerror}; set KUBECONFIG or --kubeconfig to a file"
        ) from error
    if complaints:
        raise NoClusterError(f"the credentials of {file or 'the kubeconfig'} cannot be had: {complaints[0]}")
    chosen = next((one for one in known if one["name"] == context), active)
    return _connection(settings, chosen["context"].get("namespace") or "default")


class _Listener(logging.Handler):
    """Keeps what is logged instead of printing it."""

    def __init__(self, level: int) -> None:
        super().__init__(level)
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())


@contextlib.contextmanager
def _complaints() -> Iterator[list[str]]:
    """Where an exec plugin fails, the client writes a line into the root's log and goes on without credentials."""
    handler = _Listener(logging.ERROR)
    logging.getLogger().addHandler(handler)
    try:
        yield handler.told
    finally:
        logging.getLogger().removeHandler(handler)


def _connection(settings: Any, namespace: str) -> Connection:
    import urllib3
    from kubernetes import client

    # The commands decide themselves when to try again; the client's own retries only hide for how long. What the server
    # was too busy to begin with, as lists of a kind whose CRD is new, every client of Kubernetes sends again.
    settings.retries = urllib3.Retry(
        total=None,
        connect=0,
        read=0,
        redirect=0,
        other=0,
        status=BUSY_TRIES - 1,
        status_forcelist=[HTTPStatus.TOO_MANY_REQUESTS],
        allowed_methods=None,
        retry_after_max=BUSY_SECONDS,
        raise_on_status=False,
    )
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    return Connection(client.ApiClient(settings), namespace, settings.host)


def _find(kubeconfig: Path | None) -> str | None:
    if kubeconfig is not None:
        return str(kubeconfig.expanduser())
    if os.environ.get("KUBECONFIG"):
        return os.environ["KUBECONFIG"]
    if DEFAULT_KUBECONFIG.expanduser().is_file():
        return str(DEFAULT_KUBECONFIG.expanduser())
    from finetune_local import layouts

    laptop = layouts.Layout(layouts.default_state_folder()).kubeconfig
    return str(laptop) if laptop.is_file() else None


def _pod_namespace() -> str:
    return Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace").read_text(encoding="utf-8").strip()

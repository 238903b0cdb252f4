"""Where the API server is and who the operator is there: by the pod's service account, or by a kubeconfig."""

from __future__ import annotations

import urllib.parse
import urllib.request
from pathlib import Path

import yaml
from kubernetes import aio

IN_CLUSTER_TOKEN = Path("/var/run/secrets/kubernetes.io/serviceaccount/token")


class KubeconfigError(Exception):
    """There is no way to an API server; the message names the kubeconfig."""


async def find(*, connections: int) -> aio.client.Configuration:
    """For a client that has at most so many connections at once. Raises KubeconfigError."""
    configuration = aio.client.Configuration(connection_pool_maxsize=connections)
    if IN_CLUSTER_TOKEN.is_file():  # noqa: ASYNC240 - once, at the start
        aio.config.load_incluster_config(client_configuration=configuration)
    else:
        await _load_kubeconfig(configuration)
    _settle_proxy(configuration)
    return configuration


async def _load_kubeconfig(configuration: aio.client.Configuration) -> None:
    try:
        await aio.config.load_kube_config(client_configuration=configuration)
    # The client checks nothing: what is no YAML, no mapping or no base64 comes as what Python makes of it.
    except (
        aio.config.ConfigException,
        yaml.YAMLError,
        ValueError,
        TypeError,
        AttributeError,
        OSError,
    ) as error:
        file = aio.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION
        raise KubeconfigError(f"the kubeconfig {file} cannot be used: {error}") from error


def _settle_proxy(configuration: aio.client.Configuration) -> None:
    """The proxy that the environment names for the API server (HTTPS_PROXY, NO_PROXY), once for all requests: left to
    itself the client asks a thread for it, and one more for .netrc, before each of them."""
    server = urllib.parse.urlsplit(configuration.host)
    if configuration.proxy is None and not urllib.request.proxy_bypass(server.netloc):
        configuration.proxy = urllib.request.getproxies().get(server.scheme)

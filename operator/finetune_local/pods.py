"""What a pod asks for, worked out without any I/O: its environment, its mounts, and where both lie on a laptop.

There is no mount namespace, so a container's path `/etc/finetune` becomes `<root>/etc/finetune`, and every environment
value that points at or below a mount is rewritten to match.
"""

from __future__ import annotations

import dataclasses
import math
import posixpath
import re
from collections.abc import Iterable, Mapping
from typing import Any

from kubernetes.utils.quantity import parse_quantity

from finetune_local import objects

Object = Mapping[str, Any]

# Set by KubeRay for the Ray process of a real pod. Here Ray's own job supervisor has set what a job needs.
RAY_OWN = frozenset(
    (
        "RAY_ADDRESS", "RAY_IP", "RAY_PORT", "FQ_RAY_IP", "KUBERAY_GEN_RAY_START_CMD", "RAY_CLOUD_INSTANCE_ID",
        "RAY_NODE_TYPE_NAME", "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE", "REDIS_PASSWORD", "RAY_REDIS_ADDRESS",
    )
)  # fmt: skip
_HOST = re.compile(
    r"^(?P<service>[a-z0-9][a-z0-9-]*)\.(?P<namespace>[a-z0-9-]+)\.svc(\.[a-z0-9.-]+)?(:\d+)?$"
)
_REFERENCE = re.compile(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)")


class PodError(Exception):
    """The pod cannot be run as it is; the message tells a user what to change."""


@dataclasses.dataclass(frozen=True)
class Address:
    """A service in a cluster's DNS."""

    namespace: str
    service: str


def parse_host(host: str) -> Address | None:
    """`<service>.<namespace>.svc…[:port]`, or None for any other host."""
    match = _HOST.match(host.lower())
    return Address(namespace=match["namespace"], service=match["service"]) if match else None


@dataclasses.dataclass(frozen=True)
class Mount:
    """One volumeMount of the container; `path` without a trailing slash."""

    path: str
    volume: str
    sub_path: str


def container_of(pod: Object) -> Object:
    """Ray's container: KubeRay's convention is the first one."""
    container: Object = pod["spec"]["containers"][0]
    return container


def mounts_of(pod: Object) -> list[Mount]:
    """Outer paths before inner ones."""
    mounts = [
        Mount(
            path=posixpath.normpath(item["mountPath"]), volume=item["name"], sub_path=item.get("subPath", "")
        )
        for item in container_of(pod).get("volumeMounts", [])
    ]
    return sorted(mounts, key=lambda mount: mount.path)


def relocate(value: str, mounts: Iterable[Mount], root: str) -> str:
    """Rewrite a value that is a path at or below a mount, or the folder in which mounts lie side by side.

    Only a parent of at least two levels counts (`/mnt/finetune`), so that `/tmp` or `/home` stay what they are.
    """
    if not value.startswith("/"):
        return value
    path = posixpath.normpath(value)
    for mount in mounts:
        is_parent = path == posixpath.dirname(mount.path) and path.count("/") >= 2
        if path == mount.path or path.startswith(f"{mount.path}/") or is_parent:
            return f"{root}{path}"
    return value


@dataclasses.dataclass(frozen=True)
class References:
    """The ConfigMaps and Secrets (by name) that the environment is made of. None: it does not exist."""

    config_maps: Mapping[str, Mapping[str, str] | None]
    secrets: Mapping[str, Mapping[str, str] | None]


def named_references(pod: Object) -> tuple[set[str], set[str]]:
    """Names of the ConfigMaps and of the Secrets that the container's environment mentions."""
    container = container_of(pod)
    found: dict[str, set[str]] = {"configMap": set(), "secret": set()}
    for item in container.get("envFrom", []):
        for kind in found:
            if f"{kind}Ref" in item:
                found[kind].add(item[f"{kind}Ref"]["name"])
    for item in container.get("env", []):
        for kind in found:
            if f"{kind}KeyRef" in item.get("valueFrom", {}):
                found[kind].add(item["valueFrom"][f"{kind}KeyRef"]["name"])
    return found["configMap"], found["secret"]


def environment_of(pod: Object, references: References) -> dict[str, str]:
    """The container's environment as a kubelet computes it, without the variables in RAY_OWN.

    Raises PodError where a ConfigMap, a Secret or a key is missing and not optional.
    """
    container = container_of(pod)
    values: dict[str, str] = {}
    for item in container.get("envFrom", []):
        kind = "configMap" if "configMapRef" in item else "secret"
        data = _find(kind, item[f"{kind}Ref"], references)
        values.update({f"{item.get('prefix', '')}{key}": value for key, value in data.items()})
    for item in container.get("env", []):
        name = item["name"]
        if "valueFrom" in item:
            value = _value_from(pod, name, item["valueFrom"], references)
            if value is not None:
                values[name] = value
        else:
            values[name] = expand(item.get("value", ""), values)
    # A pod without GPUs sees none, as in a cluster; with GPUs Ray itself says which.
    if not gpus_of(pod):
        values.setdefault("CUDA_VISIBLE_DEVICES", "")
    # No cgroup holds a pod to its CPU limit here; as many threads as it allows come near it.
    if cores := cores_of(pod):
        values.setdefault("FINETUNE_CPUS", str(min(cores, objects.usable_cpus())))
    return {name: value for name, value in values.items() if name not in RAY_OWN}


def expand(text: str, values: Mapping[str, str]) -> str:
    """Kubernetes' `$(NAME)`: unknown names stay as they are, `$$` is a dollar."""
    return _REFERENCE.sub(
        lambda match: "$" if match[0] == "$$" else values.get(match[1], match[0]),
        text,
    )


def field_of(pod: Object, path: str) -> str:
    """The value of a `fieldRef`. Raises PodError for a field that a pod here does not have."""
    metadata, spec, status = pod["metadata"], pod["spec"], pod.get("status", {})
    keyed = re.match(r"^metadata\.(labels|annotations)\['(.+)'\]$", path)
    if keyed:
        return str(metadata.get(keyed[1], {}).get(keyed[2], ""))
    simple = {
        "metadata.name": metadata["name"],
        "metadata.namespace": metadata["namespace"],
        "metadata.uid": metadata["uid"],
        "spec.nodeName": spec.get("nodeName", ""),
        "spec.serviceAccountName": spec.get("serviceAccountName", "default"),
        "status.podIP": status.get("podIP", ""),
        "status.podIPs": status.get("podIP", ""),
        "status.hostIP": status.get("hostIP", ""),
    }
    if path not in simple:
        raise PodError(f"the field {path} of a pod is not supported by the laptop cluster")
    return str(simple[path])


def gpus_of(pod: Object) -> int:
    """NVIDIA GPUs that the container may use."""
    return int(container_of(pod).get("resources", {}).get("limits", {}).get("nvidia.com/gpu", 0))


def cores_of(pod: Object) -> int:
    """Whole cores of the container's CPU limit, at least 1; 0 without a limit."""
    limit = container_of(pod).get("resources", {}).get("limits", {}).get("cpu")
    return 0 if limit is None else max(1, int(parse_quantity(limit)))


def pick_items(data: Mapping[str, str], source: Object, what: str) -> dict[str, str]:
    """File name -> key, for a ConfigMap or Secret volume source with or without `items`."""
    if "items" not in source:
        return {key: key for key in data}
    picked = {}
    for item in source["items"]:
        if item["key"] in data:
            picked[safe_path(item["path"])] = item["key"]
        elif not source.get("optional"):
            raise PodError(
                f"{what} has no key {item['key']}; its keys are {', '.join(sorted(data)) or 'none'}"
            )
    return picked


def safe_path(path: str) -> str:
    """A relative path that stays below its folder."""
    normal = posixpath.normpath(path)
    if normal.startswith(("/", "..")):
        raise PodError(f"the path {path} leaves its volume")
    return normal


def _find(kind: str, reference: Object, references: References) -> Mapping[str, str]:
    known = references.config_maps if kind == "configMap" else references.secrets
    data = known.get(reference["name"])
    if data is None:
        if reference.get("optional"):
            return {}
        raise PodError(f"{_title(kind)} {reference['name']} does not exist in the pod's namespace; create it")
    return data


def _title(kind: str) -> str:
    return "ConfigMap" if kind == "configMap" else "Secret"


def _value_from(pod: Object, name: str, source: Object, references: References) -> str | None:
    if "fieldRef" in source:
        return field_of(pod, source["fieldRef"]["fieldPath"])
    if "resourceFieldRef" in source:
        return _resource(pod, source["resourceFieldRef"])
    for kind in ("configMap", "secret"):
        reference = source.get(f"{kind}KeyRef")
        if reference is None:
            continue
        data = _find(kind, reference, references)
        if reference["key"] in data:
            return data[reference["key"]]
        if reference.get("optional"):
            return None
        raise PodError(
            f"{_title(kind)} {reference['name']} has no key {reference['key']} (for the variable {name}); "
            f"its keys are {', '.join(sorted(data)) or 'none'}"
        )
    raise PodError(f"the variable {name} has a source that the laptop cluster does not support")


def _resource(pod: Object, reference: Object) -> str:
    section, _, resource = reference["resource"].partition(".")
    amount = container_of(pod).get("resources", {}).get(section, {}).get(resource)
    divisor = parse_quantity(reference.get("divisor") or 1) or 1
    return str(math.ceil(parse_quantity(amount or 0) / divisor))  # rounded up, as a kubelet does

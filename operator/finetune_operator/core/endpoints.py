"""Which engines the operator shows its token to: an allow-list of names, because a spec may name any address."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

PODS = "pods/"
DEFAULT = ("*.svc", "*.svc.cluster.local", "pods/*")
"""Services of the cluster, and pods that spec.serving.podSelector selects, in every namespace."""
_PATTERN = re.compile(r"(?P<host>\[[0-9A-Fa-f:.*]+\]|[A-Za-z0-9._*?-]+)(:(?P<port>[0-9]{1,5}|\*))?")
_HOST = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]*:[0-9a-f:.]*")
_PODS = re.compile(r"pods/[a-z0-9*?-]+")
_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Pattern:
    """Hosts by a shell pattern, on one port or on any."""

    host: str
    port: int | None = None


@dataclass(frozen=True)
class AllowList:
    """The engines and agents that may get the token."""

    patterns: tuple[Pattern, ...]
    namespaces: tuple[str, ...]
    """Patterns of the namespaces whose pods may be selected."""
    text: str
    """As it was configured."""

    def allows(self, url: str) -> bool:
        """Whether an engine or agent may have this URL. Raises ValueError where it is none."""
        host, port = _address(url)
        return any(
            fnmatchcase(host, pattern.host) and pattern.port in (None, port) for pattern in self.patterns
        )

    def is_known(self, url: str) -> bool:
        """Whether the address is one of those, so that what it answers may be told to who named it. What a strange
        address answers may be for the operator's eyes only: it can reach what users cannot."""
        try:
            return self.allows(url)
        except ValueError:
            return False

    def allows_pods_of(self, namespace: str) -> bool:
        return any(fnmatchcase(namespace, pattern) for pattern in self.namespaces)

    def refuse(self, field: str, value: str) -> str:
        """What to tell whoever wrote the spec."""
        return (
            f"{field}: {value} is not among the engines that this operator talks to ({self.text}): name a Service as "
            "http://<service>.<namespace>.svc:<port>, or have FINETUNE_ENGINE_ENDPOINTS of the operator extended"
        )


def parse(text: str, *, configured: Iterable[str] = ()) -> AllowList:
    """The list from `host`, `host:port` and `pods/<namespace>`, each with * and ? as in a shell, separated by commas;
    empty: the default. `configured` are URLs of the operator's own configuration, which are always allowed.

    Raises ValueError for an entry that is none of these.
    """
    entries = [entry.strip() for entry in text.split(",") if entry.strip()] or list(DEFAULT)
    patterns: list[Pattern] = []
    namespaces: list[str] = []
    for entry in entries:
        if entry.startswith(PODS) and _PODS.fullmatch(entry):
            namespaces.append(entry.removeprefix(PODS))
            continue
        found = _PATTERN.fullmatch(entry)
        if found is None:
            raise ValueError(
                f"{entry!r} is neither host, host:port nor pods/<namespace>, for example *.engines.svc:8000"
            )
        port = None if found["port"] in (None, "*") else int(found["port"])
        if port is not None and not 1 <= port <= 65535:  # it would allow nothing, and nobody would know why
            raise ValueError(f"{entry!r} names port {port}; ports are from 1 to 65535, and * is any")
        patterns.append(Pattern(_tidy(found["host"]), port))
    patterns += [Pattern(*_address(url)) for url in configured]
    return AllowList(tuple(patterns), tuple(namespaces), ", ".join(entries))


def _address(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    host = _tidy(parts.hostname or "")
    # Other characters are read differently by different libraries: what is compared must be what is asked.
    if not _HOST.fullmatch(host):
        raise ValueError(f"{url!r} has no host, or one with impossible characters")
    return host, parts.port or _PORTS.get(parts.scheme, 80)


def _tidy(host: str) -> str:
    """A name as it is compared: case and the dot of the root mean nothing."""
    return host.strip("[]").lower().rstrip(".")

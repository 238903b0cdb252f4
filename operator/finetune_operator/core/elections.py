"""Who may act when several operators run: the rules of a coordination.k8s.io Lease.

Clocks of machines differ, so no time that somebody else wrote is ever compared with ours. A candidate measures for how
long a Lease has not changed, and the leader measures since when its last renewal was under way, both on their own
monotonic clock. The leader gives up `renew_seconds` after that renewal began, a candidate takes over `lease_seconds`
after it saw it: since `renew_seconds` is the smaller one, the two never act at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

ADDRESS_ANNOTATION = "finetune.dev/status-url"
RELEASED_SECONDS = 1  # what a released Lease says of its duration, as client-go does


@dataclass(frozen=True)
class Terms:
    """Times in seconds; the defaults are client-go's."""

    lease_seconds: float = 15.0
    """After this time without a renewal another one may lead."""
    renew_seconds: float = 10.0
    """After this time without a renewal the leader has stopped acting."""
    retry_seconds: float = 2.0
    """Between two tries to take or to renew."""


@dataclass(frozen=True)
class LeaseFacts:
    """What a Lease says. `holder` is empty where nobody leads."""

    holder: str = ""
    version: str = ""
    """Its resourceVersion; empty where there is no Lease yet."""
    transitions: int = 0
    address: str | None = None
    """Base URL of the holder's endpoint for reports."""


def lease_facts(body: dict[str, Any] | None) -> LeaseFacts:
    if body is None:
        return LeaseFacts()
    metadata, spec = body["metadata"], body.get("spec") or {}
    return LeaseFacts(
        holder=spec.get("holderIdentity") or "",
        version=metadata["resourceVersion"],
        transitions=spec.get("leaseTransitions") or 0,
        address=(metadata.get("annotations") or {}).get(ADDRESS_ANNOTATION),
    )


def may_take(lease: LeaseFacts, *, identity: str, unchanged_seconds: float, terms: Terms) -> bool:
    """Whether a candidate that has watched the Lease stay the same for this long may write its own name into it."""
    return lease.holder in ("", identity) or unchanged_seconds >= terms.lease_seconds


def lease_body(
    lease: LeaseFacts,
    *,
    namespace: str,
    name: str,
    identity: str,
    address: str,
    terms: Terms,
    acquired: datetime,
    now: datetime,
) -> dict[str, Any]:
    """The Lease with us as its holder, to be written only where it still is at `lease.version`."""
    moved = bool(lease.holder) and lease.holder != identity
    metadata: dict[str, Any] = {
        "name": name,
        "namespace": namespace,
        "annotations": {ADDRESS_ANNOTATION: address},
    }
    if lease.version:
        metadata["resourceVersion"] = lease.version
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": metadata,
        "spec": {
            "holderIdentity": identity,
            "leaseDurationSeconds": max(1, round(terms.lease_seconds)),
            "acquireTime": micro_time(acquired),
            "renewTime": micro_time(now),
            "leaseTransitions": lease.transitions + moved,
        },
    }


def released_body(lease: LeaseFacts, *, namespace: str, name: str, now: datetime) -> dict[str, Any]:
    """The Lease without a holder: whoever sees it next may lead at once."""
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": name, "namespace": namespace, "resourceVersion": lease.version},
        "spec": {
            "holderIdentity": "",
            "leaseDurationSeconds": RELEASED_SECONDS,
            "renewTime": micro_time(now),
            "leaseTransitions": lease.transitions,
        },
    }


def micro_time(time: datetime) -> str:
    """metav1.MicroTime."""
    return time.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")

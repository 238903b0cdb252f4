"""Events about our objects, as `kubectl describe` shows them."""

from __future__ import annotations

import logging
from datetime import datetime

from finetune_operator.adapters.kube import ApiError, Json, Kube
from finetune_operator.api.base import API_VERSION
from finetune_operator.core.facts import Event
from finetune_operator.manifests import naming
from finetune_operator.reconcile.facts import timestamp

logger = logging.getLogger(__name__)

MESSAGE_BYTES = 1024  # the limit of the API


async def post(kube: Kube, subject: Json, event: Event, *, now: datetime) -> None:
    """Post an event; one that cannot be posted is lost, as the status already says the same."""
    try:
        await kube.create(build(subject, event, now=now))
    except ApiError as error:
        logger.warning("event %s could not be posted: %s", event.reason, error)


def build(subject: Json, event: Event, *, now: datetime) -> Json:
    """A core/v1 Event about one of our objects."""
    metadata = subject["metadata"]
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {"generateName": f"{metadata['name']}.", "namespace": metadata["namespace"]},
        "involvedObject": {
            "apiVersion": API_VERSION,
            "kind": subject["kind"],
            "namespace": metadata["namespace"],
            "name": metadata["name"],
            "uid": metadata["uid"],
        },
        "type": "Warning" if event.warning else "Normal",
        "reason": event.reason,
        "message": event.message.encode()[:MESSAGE_BYTES].decode(errors="ignore"),
        "source": {"component": naming.MANAGER},
        "reportingComponent": naming.MANAGER,
        "reportingInstance": naming.MANAGER,
        "firstTimestamp": timestamp(now),
        "lastTimestamp": timestamp(now),
        "count": 1,
    }

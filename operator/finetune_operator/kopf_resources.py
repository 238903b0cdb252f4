"""Watches for resources whose CRD is installed while the operator runs.

Kopf asks what the API server serves whenever a CRD changes. On a busy machine the API server serves a new resource only
some moments after its CRD's last change, and Kopf does not ask again; where it may not watch CRDs, it asks but once.
KubeRay and Kueue may well be installed after this operator.
"""

from __future__ import annotations

import asyncio
import logging

import kopf
from kopf._cogs.clients import scanning
from kopf._cogs.structs.references import Insights
from kopf._core.reactor.observation import revise_resources

logger = logging.getLogger(__name__)
LOOK_SECONDS = 10.0


async def look_for_missing(
    registry: kopf.OperatorRegistry, insights: Insights, settings: kopf.OperatorSettings
) -> None:
    """Have Kopf watch what it lacks as soon as that is served. Runs until it is cancelled, in a task that Kopf's
    credentials reach: one that a handler of Kopf began."""
    await insights.ready_resources.wait()
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        try:
            await _look(registry, insights, settings)
        except Exception as error:  # the border of a look: the next one comes in any case
            logger.warning("what the API server serves is not known: %s", error)


async def _look(registry: kopf.OperatorRegistry, insights: Insights, settings: kopf.OperatorSettings) -> None:
    wanted = registry._watching.get_all_selectors()
    missing = [one for one in wanted if not one.select(insights.watched_resources)]
    groups = {one.group for one in missing if one.group}
    if not groups:
        return
    served = await scanning.scan_resources(groups=groups, settings=settings, logger=logger)
    # Only where there is something new: Kopf warns each time of what it still lacks.
    if not any(one.select(served) for one in missing):
        return
    async with insights.revised:
        for group in groups:
            resources = [one for one in served if one.group == group]
            revise_resources(resources=resources, insights=insights, registry=registry, group=group)
        insights.revised.notify_all()

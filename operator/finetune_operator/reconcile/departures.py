"""Jobs that were deleted while no watch was listening: a list that begins anew tells what is there, not what is gone.

Nothing else comes back to a job that had ended, so its series would stay in the metrics for good.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Sequence

from finetune_operator.adapters.api_errors import ApiError
from finetune_operator.adapters.kube import Kube
from finetune_operator.api.base import API_VERSION
from finetune_operator.api.finetunejob import KIND
from finetune_operator.reconcile.queue import Key

logger = logging.getLogger(__name__)

LOOK_SECONDS = 600.0  # one list of names, 500 per request


class Departures:
    """Compares the jobs that are `shown` with those that the API server lists, and asks for a pass over the others."""

    def __init__(
        self,
        *,
        kube: Kube,
        namespaces: Sequence[str],
        shown: Callable[[], set[Key]],
        wake: Callable[[Key], None],
    ) -> None:
        self._kube = kube
        self._namespaces = namespaces
        self._shown = shown
        self._wake = wake

    async def run(self) -> None:
        """Look again and again until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS * random.uniform(0.8, 1.2))  # noqa: S311 - spreads load
            try:
                await self.look()
            except ApiError as error:
                logger.warning("which jobs are gone is looked up later: %s", error)
            except Exception:  # a fault of ours here costs some stale series, never the operator
                logger.exception("which jobs are gone could not be looked up; again later")

    async def look(self) -> None:
        """Raises ApiError."""
        shown = self._shown()  # before the list: a job that is created meanwhile is not gone
        for key in shown - await self._kube.list_names(API_VERSION, KIND, self._namespaces):
            self._wake(key)

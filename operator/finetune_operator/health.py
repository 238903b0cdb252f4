"""Whether the operator does its work: /healthz for the kubelet, /readyz for the Service, /metrics for Prometheus.

Four ways to be stuck are told apart. A blocked event loop answers no probe, and leaves a traceback of all threads in
the log; a pass that hangs and a queue in which nothing moves are found by their age; a loop of every replica that has
ended is named. When one of the leader's own loops ends (queues, watches, routers, orphans), so does the process, see
leader.py. They do not hang: every request in them has a time limit, and Kopf opens a silent watch anew after 70 s.
"""

from __future__ import annotations

import asyncio
import faulthandler
import sys
from collections.abc import Coroutine, Sequence
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from finetune_operator.adapters.telemetry import Telemetry
from finetune_operator.reconcile.queue import KeyedQueue

STUCK_SECONDS = 300.0  # a pass takes milliseconds, and some minutes where every request of it times out
BEAT_SECONDS = 1.0
BLOCKED_SECONDS = 15.0  # kubelets give up a probe after seconds; the log should tell why before they act


class Health:
    """What is looked at; `queues` is set when this process leads."""

    def __init__(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        self.queues: Sequence[KeyedQueue] = ()
        self._loops: list[asyncio.Task[None]] = []

    def look_after(self, loop: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Run something that is to go on for as long as the process lives; where it ends, that is a problem."""
        task = asyncio.create_task(loop, name=name)
        self._loops.append(task)
        return task

    async def beat(self) -> None:
        """Measure, until cancelled, how late the event loop is; say where it hangs when it hangs."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                faulthandler.dump_traceback_later(BLOCKED_SECONDS, file=sys.stderr)
                due = loop.time() + BEAT_SECONDS
                await asyncio.sleep(BEAT_SECONDS)
                self._telemetry.loop_lag.set(max(0.0, loop.time() - due))
        finally:
            faulthandler.cancel_dump_traceback_later()

    def problem(self) -> str | None:
        """Why the process should be replaced, or None."""
        for task in self._loops:
            if task.done():
                return f"the loop {task.get_name()} has ended{_reason(task)}"
        for queue in self.queues:
            running, still = queue.longest_running(), queue.standing_still()
            if running > STUCK_SECONDS:
                return f"a reconcile pass has been running for {running:.0f} s"
            if still > STUCK_SECONDS:
                return f"keys have been due for {still:.0f} s and no pass has begun or ended"
        return None

    def application(self) -> web.Application:
        application = web.Application()
        application.router.add_get("/metrics", self._metrics)
        application.router.add_get("/healthz", self._healthz)
        application.router.add_get("/readyz", self._readyz)
        return application

    async def _metrics(self, _: web.Request) -> web.Response:
        text = await asyncio.to_thread(generate_latest)  # of thousands of jobs it takes a while
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def _healthz(self, _: web.Request) -> web.Response:
        problem = self.problem()
        return web.Response(text="ok\n") if problem is None else web.Response(status=500, text=f"{problem}\n")

    async def _readyz(self, _: web.Request) -> web.Response:
        """Every replica is ready, whoever leads: the others hand reports to the leader."""
        return web.Response(text="ok\n")


def _reason(task: asyncio.Task[None]) -> str:
    error = None if task.cancelled() else task.exception()
    return f": {type(error).__name__}: {error}" if error else ""

"""The data path of one worker: a client's request in, an engine's answer out, byte for byte; and copies for mirrors."""

from __future__ import annotations

import asyncio
import functools
import random
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field

from aiohttp import web

from finetune_operator.api.routes import Arm
from finetune_router import errors, flights, verdicts
from finetune_router.choices import Choice
from finetune_router.connections import UpstreamError
from finetune_router.errors import ApiError
from finetune_router.flights import CLIENT_GONE, Arrival, Flight, Tools
from finetune_router.forwarding import Attempt
from finetune_router.observations import End, Observation
from finetune_router.tables import Leg


@dataclass
class Proxy:
    """Forwards requests and notes what came of them."""

    tools: Tools
    max_mirrors: int
    max_mirror_bytes: int
    """Of bodies that are mirrored; their requests may be long over, and hold no room any more."""
    mirrored_bytes: int = 0
    mirrors: set[asyncio.Task[None]] = field(default_factory=set)

    async def serve(self, arrival: Arrival, choice: Choice) -> web.StreamResponse:
        """Answer a request. Raises ApiError where there is no engine's answer to give."""
        route = arrival.route
        flight = Flight(self.tools, arrival, choice)
        verdict: asyncio.Future[bool] | None = None
        if (
            route.mirror > 0
            and route.candidate is not None
            and choice.arm is Arm.STABLE
            and choice.draw is not None
            and random.random() * 100 < route.mirror  # noqa: S311 - a coin, not a secret
        ):
            verdict = self._start_mirror(arrival, route.candidate, flight)
        is_taken = False
        try:
            response = await flight.run()
            is_taken = response.status < 400
            if flight.doubter is not None:
                self._start_second_opinion(arrival, flight.doubter, flight, response.status)
            return response
        except ApiError as error:
            is_missing = error.code == errors.NOT_READY  # no more a revision's fault than the candidate's
            self.tools.recorder.finish(flight.seen, End.CLIENT if is_missing else End.ERROR, error.status)
            raise
        except (asyncio.CancelledError, ConnectionError):
            self.tools.recorder.finish(flight.seen, End.GONE, CLIENT_GONE)
            raise
        finally:
            self.tools.recorder.forget(flight.seen)
            if verdict is not None and not verdict.done():
                verdict.set_result(is_taken)

    def _start_mirror(self, arrival: Arrival, leg: Leg, flight: Flight) -> asyncio.Future[bool] | None:
        """Send a copy to the candidate, unless too many or too large copies are under way; nobody waits for it.

        Returns where it wants to hear whether stable took the request.
        """
        metrics = leg.shadow_metrics
        if metrics is None:
            return None
        if not self._has_room(arrival):
            metrics.mirrors["dropped"] = metrics.mirrors.get("dropped", 0) + 1
            self.tools.book.changed_metrics.add(metrics)
            return None
        verdict: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._start(arrival, self._mirror(arrival, leg, flight.headers, verdict))
        return verdict

    def _has_room(self, arrival: Arrival) -> bool:
        size = len(arrival.body.data)
        return len(self.mirrors) < self.max_mirrors and self.mirrored_bytes + size <= self.max_mirror_bytes

    def _start(self, arrival: Arrival, work: Coroutine[None, None, None]) -> None:
        size = len(arrival.body.data)
        task = asyncio.get_running_loop().create_task(work)
        self.mirrors.add(task)
        self.mirrored_bytes += size
        task.add_done_callback(functools.partial(self._end_mirror, size))

    def _end_mirror(self, size: int, task: asyncio.Task[None]) -> None:
        self.mirrors.discard(task)
        self.mirrored_bytes -= size

    def _start_second_opinion(self, arrival: Arrival, leg: Leg, flight: Flight, status: int) -> None:
        """Ask the candidate about stable's refusal, as stable is asked about the candidate's, but beside the answer."""
        if self._has_room(arrival):
            self._start(arrival, self._second_opinion(arrival, leg, flight, status))
        else:
            self.tools.recorder.finish(flight.seen, End.CLIENT, status, at=flight.seen.answered_at)

    async def _second_opinion(self, arrival: Arrival, leg: Leg, flight: Flight, status: int) -> None:
        """What the candidate takes, stable should not have refused. The answer ends as soon as that is known."""
        tools = self.tools
        deadline = arrival.at + tools.forwarder.limits.total
        ticket = tools.tickets.mint(arrival.route.alias_bytes, Arm.SHADOW, leg.revision_bytes, counted=False)
        request = flights.outgoing(arrival, leg, flight.headers, ticket, deadline=deadline, patience=deadline)
        attempt, end = Attempt(), End.CLIENT
        try:
            await tools.forwarder.ask(leg, request, attempt)
            if verdicts.is_taken(attempt):
                end = End.ERROR
        finally:
            attempt.discard()
            tools.recorder.finish(flight.seen, end, status, at=flight.seen.answered_at)

    async def _mirror(
        self, arrival: Arrival, leg: Leg, headers: bytes, verdict: asyncio.Future[bool]
    ) -> None:
        metrics = leg.shadow_metrics or leg.metrics
        seen = Observation(
            route=arrival.route,
            state=leg.shadow,
            metrics=metrics,
            path=arrival.path,
            body=arrival.body,
            started_at=time.perf_counter(),
        )
        try:
            outcome = await self._copy(arrival, leg, headers, seen, verdict)
        finally:
            self.tools.recorder.forget(seen)
        metrics.mirrors[outcome] = metrics.mirrors.get(outcome, 0) + 1
        self.tools.book.changed_metrics.add(metrics)

    async def _copy(
        self,
        arrival: Arrival,
        leg: Leg,
        headers: bytes,
        seen: Observation,
        verdict: asyncio.Future[bool],
    ) -> str:
        """Send a copy and read the answer; what became of it, for the metrics."""
        tools = self.tools
        ticket = tools.tickets.mint(arrival.route.alias_bytes, Arm.SHADOW, leg.revision_bytes, counted=False)
        deadline = seen.started_at + tools.forwarder.limits.total
        patience = flights.patience_with_candidate(arrival.route, deadline)
        request = flights.outgoing(arrival, leg, headers, ticket, deadline=deadline, patience=patience)
        seen.attempt = attempt = Attempt()
        tools.recorder.begin(seen)
        await tools.forwarder.ask(leg, request, attempt)
        outcome = "answered" if attempt.failure is None else "failed"
        end, code = verdicts.judge_end(attempt)
        try:
            await self._read(seen, attempt)
        except UpstreamError:
            end, code, outcome = End.ERROR, 502, "failed"
        ended_at = time.perf_counter()
        tools.recorder.forget(seen)
        seen.attempt = None
        if verdicts.is_refusal(attempt) and await verdict:
            end = End.ERROR
        tools.recorder.finish(seen, end, code, at=ended_at)
        return outcome

    async def _read(self, seen: Observation, attempt: Attempt) -> None:
        """Keep the whole answer. Raises UpstreamError when it breaks off."""
        reply = attempt.reply
        if reply is None:
            return
        try:
            flights.note_beginning(self.tools.recorder, seen, reply)
            while reply.body is None and (data := await reply.connection.read()):
                self.tools.recorder.keep(seen, data)
        finally:
            reply.close()

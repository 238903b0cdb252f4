"""The data path of one worker: a client's request in, an engine's answer out, byte for byte."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field

from aiohttp import web

from finetune_operator.api.routes import ARM_HEADER, FALLBACK_HEADER, REVISION_HEADER, Arm
from finetune_router import errors
from finetune_router.bodies import Body
from finetune_router.choices import Choice
from finetune_router.counters import Book
from finetune_router.errors import ApiError
from finetune_router.forwarding import Attempt, Failure, Forwarder, Outgoing, Reply
from finetune_router.headers import HeaderPolicy, answer_headers
from finetune_router.recording import End, Observation, Recorder
from finetune_router.tables import Leg, Route
from finetune_router.tickets import TicketOffice
from finetune_router.upstreams import UpstreamError, UpstreamTimeoutError

REQUEST_ID_HEADER = "x-request-id"
SERVER = "finetune-router"
CLIENT_GONE = 499  # as nginx calls a client that went away
_SLACK_SECONDS = 5.0  # after the deadline, for a client that is still reading


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request whose model is known."""

    request: web.BaseRequest
    route: Route
    body: Body
    path: str
    """With the query."""
    at: float
    """On the clock of time.perf_counter."""


@dataclass
class Proxy:
    """Forwards requests and notes what came of them."""

    forwarder: Forwarder
    recorder: Recorder
    book: Book
    tickets: TicketOffice
    policy: HeaderPolicy
    max_mirrors: int
    mirrors: set[asyncio.Task[None]] = field(default_factory=set)

    async def serve(self, arrival: Arrival, choice: Choice) -> web.StreamResponse:
        """Answer a request. Raises ApiError where there is no engine's answer to give."""
        route = arrival.route
        flight = Flight(self, arrival, choice)
        if (
            route.mirror > 0
            and route.candidate is not None
            and choice.arm is Arm.STABLE
            and choice.draw is not None
            and random.random() * 100 < route.mirror  # noqa: S311 - a coin, not a secret
        ):
            self._start_mirror(arrival, route.candidate, flight)
        try:
            return await flight.run()
        except ApiError as error:
            self.recorder.finish(flight.seen, End.ERROR, error.status)
            raise
        except (asyncio.CancelledError, ConnectionError):
            self.recorder.finish(flight.seen, End.GONE, CLIENT_GONE)
            raise

    def _start_mirror(self, arrival: Arrival, leg: Leg, flight: Flight) -> None:
        """Send a copy to the candidate, unless too many copies are under way; nobody waits for it."""
        metrics = leg.shadow_metrics
        if metrics is None:
            return
        if len(self.mirrors) >= self.max_mirrors:
            metrics.mirrors["dropped"] = metrics.mirrors.get("dropped", 0) + 1
            self.book.changed_metrics.add(metrics)
            return
        task = asyncio.get_running_loop().create_task(self._mirror(arrival, leg, flight.headers))
        self.mirrors.add(task)
        task.add_done_callback(self.mirrors.discard)

    async def _mirror(self, arrival: Arrival, leg: Leg, headers: bytes) -> None:
        metrics = leg.shadow_metrics or leg.metrics
        started = time.perf_counter()
        seen = Observation(
            route=arrival.route, state=leg.shadow, metrics=metrics, body=arrival.body, started_at=started
        )
        ticket = self.tickets.mint(arrival.route.alias_bytes, Arm.SHADOW, leg.revision_bytes, counted=False)
        deadline = started + self.forwarder.limits.total
        attempt = await self.forwarder.ask(leg, outgoing(arrival, leg, headers, ticket, deadline))
        outcome = "answered" if attempt.failure is None else "failed"
        end, code = judge_end(attempt)
        reply = attempt.reply
        if reply is not None:
            try:
                self._note_beginning(seen, reply)
                while reply.body is None and (data := await reply.connection.read()):
                    self.recorder.keep(seen, data)
            except UpstreamError:
                end, code, outcome = End.ERROR, 502, "failed"
            finally:
                reply.close()
        metrics.mirrors[outcome] = metrics.mirrors.get(outcome, 0) + 1
        self.recorder.finish(seen, end, code)

    def _note_beginning(self, seen: Observation, reply: Reply) -> None:
        seen.first_byte_at = reply.connection.first_body_at
        seen.is_stream = reply.is_events
        seen.encoding = reply.encoding
        seen.is_readable = reply.is_events or reply.is_json
        if reply.status < 400:
            self.recorder.keep(seen, reply.first if reply.body is None else reply.body)


class Flight:
    """One request under way."""

    __slots__ = ("_arrival", "_choice", "_deadline", "_proxy", "headers", "seen")

    def __init__(self, proxy: Proxy, arrival: Arrival, choice: Choice) -> None:
        self._proxy = proxy
        self._arrival = arrival
        self._choice = choice
        self._deadline = arrival.at + proxy.forwarder.limits.total
        self.headers = proxy.policy.build(arrival.request.headers)
        self.seen = self._observe(choice.leg)
        if choice.draw is None:
            self.seen.counted = False
        else:
            self.seen.set_unit(choice.draw.sample_hash, choice.arm)

    async def run(self) -> web.StreamResponse:
        arm, leg = self._choice.arm, self._choice.leg
        ticket, attempt = await self._ask(arm, leg)
        fell_back = self._choice.pin_missed
        stable = self._arrival.route.stable
        if attempt.failure is not None and arm is Arm.CANDIDATE and stable is not None:
            missing = attempt.failure is Failure.MISSING
            if (missing or self._arrival.route.retry_stable) and time.perf_counter() < self._deadline:
                self._leave_candidate(attempt)
                attempt.discard()
                arm, leg, fell_back = Arm.STABLE, stable, True
                self.seen = self._observe(leg)
                self.seen.counted = False
                ticket, attempt = await self._ask(arm, leg)
        own = {REQUEST_ID_HEADER: ticket}
        if not self._arrival.route.is_base:
            own[ARM_HEADER] = arm.value
            own[REVISION_HEADER] = leg.revision
        if fell_back:
            own[FALLBACK_HEADER] = "true"
        reply = attempt.reply
        if reply is None or attempt.failure is Failure.MISSING:
            attempt.discard()
            error = no_answer(self._arrival.route, attempt.failure)
            error.request_id = ticket
            raise error
        try:
            if reply.body is not None:
                return self._whole(reply, own, attempt)
            return await self._stream(reply, own, attempt)
        finally:
            reply.close()

    def _observe(self, leg: Leg) -> Observation:
        return Observation(
            route=self._arrival.route,
            state=leg.state,
            metrics=leg.metrics,
            body=self._arrival.body,
            started_at=self._arrival.at,
        )

    async def _ask(self, arm: Arm, leg: Leg) -> tuple[str, Attempt]:
        """Send the request to a revision under an id that names it."""
        ticket = self._proxy.tickets.mint(
            self._arrival.route.alias_bytes, arm, leg.revision_bytes, counted=self.seen.counted
        )
        request = outgoing(self._arrival, leg, self.headers, ticket, self._deadline)
        return ticket, await self._proxy.forwarder.ask(leg, request)

    def _leave_candidate(self, attempt: Attempt) -> None:
        """Record the candidate's failure; what stable answers instead is counted for neither arm.

        A candidate that an engine does not have (any more) did not fail: it was taken away while the request was on
        its way.
        """
        seen, book = self.seen, self._proxy.book
        seen.metrics.fallbacks += 1
        book.changed_metrics.add(seen.metrics)
        if seen.state is not None and seen.counted:
            seen.state.fallbacks += 1
            book.changed_states.add(seen.state)
        end, code = judge_end(attempt)
        self._proxy.recorder.finish(seen, end, code)

    def _whole(self, reply: Reply, own: dict[str, str], attempt: Attempt) -> web.StreamResponse:
        """An answer that is complete: one write."""
        seen, recorder = self.seen, self._proxy.recorder
        connection = reply.connection
        self._proxy._note_beginning(seen, reply)
        headers = answer_headers(reply.headers)
        headers.update(own)
        response = web.Response(status=reply.status, headers=headers, body=reply.body)
        now = time.perf_counter()
        seen.overhead = attempt.sent_at - self._arrival.at + now - connection.last_body_at
        end, code = judge_end(attempt)
        recorder.finish(seen, end, code)
        return response

    async def _stream(self, reply: Reply, own: dict[str, str], attempt: Attempt) -> web.StreamResponse:
        """An answer that is still coming. A break in it is a break for the client too: no clean end is faked."""
        seen, recorder, request = self.seen, self._proxy.recorder, self._arrival.request
        connection = reply.connection
        self._proxy._note_beginning(seen, reply)
        headers = answer_headers(reply.headers)
        headers.update(own)
        headers["Server"] = SERVER
        response = web.StreamResponse(status=reply.status, headers=headers)
        response.content_length = reply.length
        end, code = judge_end(attempt)
        try:
            async with asyncio.timeout(self._deadline + _SLACK_SECONDS - time.perf_counter()):
                await response.prepare(request)
                await response.write(reply.first)
                seen.overhead = (
                    attempt.sent_at - self._arrival.at + time.perf_counter() - connection.first_body_at
                )
                while data := await connection.read():
                    recorder.keep(seen, data)
                    await response.write(data)
                await response.write_eof()
        except TimeoutError:  # the client reads too slowly to ever come to the end
            end, code = End.GONE, CLIENT_GONE
            _cut(request)
        except UpstreamError as error:
            slow_client = isinstance(error, UpstreamTimeoutError) and connection.paused
            end, code = (End.GONE, CLIENT_GONE) if slow_client else (End.ERROR, 502)
            _cut(request)
        recorder.finish(seen, end, code)
        return response


def outgoing(arrival: Arrival, leg: Leg, headers: bytes, ticket: str, deadline: float) -> Outgoing:
    """The request as the engines of a revision get it."""
    return Outgoing(
        path=arrival.path,
        headers=b"%bx-request-id: %b\r\n" % (headers, ticket.encode()),
        body=arrival.body.for_model(leg.quoted_name),
        stream=arrival.body.stream,
        deadline=deadline,
    )


def judge_end(attempt: Attempt) -> tuple[End, int]:
    """How an attempt counts, and the status that stands for it."""
    reply = attempt.reply
    match attempt.failure:
        case None if reply is not None:
            return (End.ANSWERED if reply.status < 400 else End.CLIENT), reply.status
        case Failure.MISSING:
            return End.CLIENT, 404
        case Failure.BUSY if reply is not None:
            return (End.ERROR if reply.status >= 500 else End.CLIENT), reply.status
        case Failure.ERROR if reply is not None:
            return End.ERROR, max(reply.status, 500)
        case Failure.TIMEOUT:
            return End.ERROR, 504
    return End.ERROR, 502


def no_answer(route: Route, failure: Failure | None) -> ApiError:
    """What the client is told when no engine answered."""
    match failure:
        case Failure.MISSING:
            return errors.not_ready(route.alias)
        case Failure.TIMEOUT:
            return errors.engine_too_slow()
    return errors.engine_unreachable()


def _cut(request: web.BaseRequest) -> None:
    """Close the client's connection without the end of the body, so that it sees that something is missing."""
    if request.transport is not None:
        request.transport.close()

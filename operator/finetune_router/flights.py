"""One request under way: asks the revision that it belongs to, stable in its place, and passes the answer on."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import dataclass
from typing import NamedTuple

from aiohttp import HttpVersion11, web

from finetune_operator.api.routes import ARM_HEADER, FALLBACK_HEADER, REVISION_HEADER, Arm
from finetune_router import paths, verdicts
from finetune_router.assignment import group_of
from finetune_router.bodies import Body
from finetune_router.choices import Choice
from finetune_router.connections import UpstreamError, UpstreamTimeoutError
from finetune_router.counters import Book
from finetune_router.forwarding import Attempt, Failure, Forwarder, Outgoing, Reply
from finetune_router.headers import HeaderPolicy, answer_headers
from finetune_router.observations import End, Observation
from finetune_router.recording import Recorder
from finetune_router.tables import Leg, Route
from finetune_router.tickets import TicketOffice

REQUEST_ID_HEADER = "x-request-id"
SERVER = "finetune-router"
CLIENT_GONE = 499  # as nginx calls a client that went away
_CANDIDATE_SHARE = 0.5  # of the time that is left; the rest is for stable
_SLACK_SECONDS = 5.0  # after the deadline, or after a cut, for a client that is still reading


class Arrival(NamedTuple):
    """A request whose model is known."""

    request: web.BaseRequest
    route: Route
    body: Body
    path: str
    """With the query."""
    at: float
    """On the clock of time.perf_counter."""


@dataclass(frozen=True, slots=True)
class Tools:
    """What all requests of a worker share."""

    forwarder: Forwarder
    recorder: Recorder
    book: Book
    tickets: TicketOffice
    policy: HeaderPolicy


@dataclass(slots=True)
class Answer:
    """What came of asking a revision, and where that is counted."""

    arm: Arm
    leg: Leg
    ticket: str
    """The id under which it was asked."""
    attempt: Attempt
    seen: Observation
    fell_back: bool


class Flight:
    """One request under way."""

    __slots__ = ("_arrival", "_choice", "_deadline", "_tools", "doubter", "headers", "seen")

    def __init__(self, tools: Tools, arrival: Arrival, choice: Choice) -> None:
        self._tools = tools
        self._arrival = arrival
        self._choice = choice
        self._deadline = arrival.at + tools.forwarder.limits.total
        self.headers = tools.policy.build(arrival.request.headers)
        self.doubter: Leg | None = None
        """The candidate, where it is to be asked about stable's refusal; then `seen` is still to be finished."""
        self.seen = self._observe(choice.leg)
        if choice.draw is None:
            self.seen.counted = False
        else:
            self.seen.set_unit(choice.draw.sample_hash, choice.arm)

    async def run(self) -> web.StreamResponse:
        """Raises ApiError where there is no engine's answer to give; then `seen` is still to be finished."""
        choice, route = self._choice, self._arrival.route
        answer = await self._ask(choice.arm, choice.leg, self.seen, fell_back=choice.pin_missed)
        if choice.arm is Arm.CANDIDATE and route.stable is not None:
            answer = await self._or_stables(answer, route.stable)
        self.seen = answer.seen
        own = {REQUEST_ID_HEADER: answer.ticket}
        if not route.is_base:
            own[ARM_HEADER] = answer.arm.value
            own[REVISION_HEADER] = answer.leg.revision
        if answer.fell_back:
            own[FALLBACK_HEADER] = "true"
        attempt = answer.attempt
        reply = attempt.reply
        if reply is None or attempt.failure is Failure.MISSING:
            attempt.discard()
            error = verdicts.no_answer(route, attempt.failure)
            error.request_id = answer.ticket
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
            path=self._arrival.path,
            body=self._arrival.body,
            started_at=self._arrival.at,
        )

    async def _ask(self, arm: Arm, leg: Leg, seen: Observation, *, fell_back: bool) -> Answer:
        """Send the request to a revision under an id that names it."""
        tools, arrival = self._tools, self._arrival
        ticket = tools.tickets.mint(
            arrival.route.alias_bytes,
            arm,
            leg.revision_bytes,
            group=0 if seen.sample_hash is None else group_of(seen.sample_hash),
            counted=seen.counted,
        )
        patience = patience_with_candidate(arrival.route, self._deadline)
        if arm is Arm.STABLE:
            if seen.counted and patience < self._deadline:
                seen.given_up_at = patience
            patience = self._deadline
        request = outgoing(arrival, leg, self.headers, ticket, deadline=self._deadline, patience=patience)
        seen.attempt = attempt = Attempt()
        tools.recorder.begin(seen)
        await tools.forwarder.ask(leg, request, attempt)
        if time.perf_counter() < seen.given_up_at:
            seen.given_up_at = math.inf
        return Answer(arm, leg, ticket, attempt, seen, fell_back)

    async def _or_stables(self, answer: Answer, stable: Leg) -> Answer:
        """The candidate's answer, or stable's where that is better for the user.

        A candidate that an engine does not have (any more) did not fail: it was taken away while the request was on
        its way.
        """
        attempt, retry = answer.attempt, self._arrival.route.retry_stable
        if time.perf_counter() >= self._deadline:
            return answer
        if attempt.failure is None:
            return (
                await self._second_opinion(answer, stable)
                if retry and verdicts.is_refusal(attempt)
                else answer
            )
        if not retry and attempt.failure is not Failure.MISSING:
            return answer
        self._leave(answer, *verdicts.judge_end(attempt))
        attempt.discard()
        self.seen = self._in_place(stable)
        return await self._ask(Arm.STABLE, stable, self.seen, fell_back=True)

    async def _second_opinion(self, answer: Answer, stable: Leg) -> Answer:
        """Whose fault a 4xx is: what stable takes, the candidate should not have refused."""
        refused_at = time.perf_counter()
        self._tools.recorder.forget(answer.seen)
        self.seen = self._in_place(stable)
        try:
            second = await self._ask(Arm.STABLE, stable, self.seen, fell_back=True)
        except BaseException:  # the client left
            self._tools.recorder.finish(answer.seen, *verdicts.judge_end(answer.attempt), at=refused_at)
            answer.attempt.discard()
            raise
        if verdicts.is_taken(second.attempt):
            self._leave(answer, End.ERROR, verdicts.judge_end(answer.attempt)[1], at=refused_at)
            answer.attempt.discard()
            return second
        self._tools.recorder.finish(second.seen, *verdicts.judge_end(second.attempt))
        second.attempt.discard()
        return answer

    def _in_place(self, stable: Leg) -> Observation:
        """What stable answers in place of the candidate is counted for neither arm."""
        seen = self._observe(stable)
        seen.counted = False
        return seen

    def _leave(self, answer: Answer, end: End, code: int, *, at: float | None = None) -> None:
        """Record that stable answers instead."""
        seen, book = answer.seen, self._tools.book
        seen.metrics.fallbacks += 1
        book.changed_metrics.add(seen.metrics)
        if seen.state is not None and seen.counted:
            seen.state.fallbacks += 1
            book.changed_states.add(seen.state)
        self._tools.recorder.finish(seen, end, code, at=at)

    def _whole(self, reply: Reply, own: dict[str, str], attempt: Attempt) -> web.StreamResponse:
        """An answer that is complete: one write."""
        seen, recorder = self.seen, self._tools.recorder
        connection = reply.connection
        note_beginning(recorder, seen, reply)
        headers = answer_headers(reply.headers)
        headers.update(own)
        response = web.Response(status=reply.status, headers=headers, body=reply.body)
        now = time.perf_counter()
        seen.overhead = attempt.sent_at - self._arrival.at + now - connection.last_body_at
        if verdicts.is_refusal(attempt) and self._is_doubtful():
            self.doubter = self._arrival.route.candidate
        if self.doubter is not None:
            seen.answered_at = now
            seen.attempt = None  # its connection soon belongs to another request
            return response
        end, code = verdicts.judge_end(attempt)
        recorder.finish(seen, end, code)
        return response

    def _is_doubtful(self) -> bool:
        """Whether it is stable's answer, in a comparison in which a refusal of the candidate's may count."""
        route = self._arrival.route
        is_compared = route.mirror > 0 or (route.weight > 0 and route.retry_stable)
        return is_compared and self._choice.arm is Arm.STABLE and self.seen.counted

    async def _stream(self, reply: Reply, own: dict[str, str], attempt: Attempt) -> web.StreamResponse:
        """An answer that is still coming. A break in it is a break for the client too: no clean end is faked."""
        seen, recorder, request = self.seen, self._tools.recorder, self._arrival.request
        connection = reply.connection
        note_beginning(recorder, seen, reply)
        headers = answer_headers(reply.headers)
        headers.update(own)
        headers["Server"] = SERVER
        response = web.StreamResponse(status=reply.status, headers=headers)
        response.content_length = reply.length
        if reply.length is None and request.version < HttpVersion11:
            response.force_close()  # there are no chunks: only the connection's end can tell the answer's
        end, code = verdicts.judge_end(attempt)
        try:
            async with asyncio.timeout(self._deadline + _SLACK_SECONDS - time.perf_counter()):
                await response.prepare(request)
                await response.write(reply.first)
                if connection.started:
                    seen.overhead = (
                        attempt.sent_at - self._arrival.at + time.perf_counter() - connection.first_body_at
                    )
                while data := await connection.read():
                    recorder.keep(seen, data)
                    await response.write(data)
                await response.write_eof()
        except TimeoutError:  # the client reads too slowly to ever come to the end
            end, code = End.GONE, CLIENT_GONE
            seen.held_up = True
            cut(request, patience=0.0)
        except UpstreamError as error:
            slow_client = isinstance(error, UpstreamTimeoutError) and connection.paused
            end, code = (End.GONE, CLIENT_GONE) if slow_client else (End.ERROR, 502)
            cut(request, patience=_SLACK_SECONDS)
        recorder.finish(seen, end, code)
        return response


def note_beginning(recorder: Recorder, seen: Observation, reply: Reply) -> None:
    """What the head of an answer and its first bytes tell."""
    seen.first_byte_at = reply.connection.first_body_at
    seen.is_stream = reply.is_events
    seen.encoding = reply.encoding
    seen.is_readable = reply.is_events or reply.is_json or paths.always_in_json(seen.path)
    if reply.status < 400:
        recorder.keep(seen, reply.first if reply.body is None else reply.body)


def patience_with_candidate(route: Route, deadline: float) -> float:
    """Until when a candidate's answer must begin: stable needs the rest of the time."""
    if route.stable is None or route.candidate is None or not route.retry_stable:
        return deadline
    now = time.perf_counter()
    return now + _CANDIDATE_SHARE * (deadline - now)


def outgoing(
    arrival: Arrival, leg: Leg, headers: bytes, ticket: str, *, deadline: float, patience: float
) -> Outgoing:
    """The request as the engines of a revision get it."""
    return Outgoing(
        path=arrival.path,
        headers=b"%bx-request-id: %b\r\n" % (headers, ticket.encode()),
        body=arrival.body.for_model(leg.quoted_name),
        stream=arrival.body.stream,
        deadline=deadline,
        patience=patience,
    )


def cut(request: web.BaseRequest, *, patience: float) -> None:
    """Close the client's connection without the end of the body, so that it sees that something is missing.

    It has so many seconds to read what came before: one that reads nothing must not keep the connection for ever.
    """
    transport = request.transport
    if transport is not None:
        transport.close()
        asyncio.get_running_loop().call_later(patience, transport.abort)

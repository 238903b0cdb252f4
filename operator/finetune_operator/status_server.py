"""What becomes of a report at the leader; wire-compatible with Kubeflow Trainer's status server.

A trainer proves who it is with a projected service-account token whose audience names one job (TokenReview). Progress
is kept and written later, a result is answered only when it is in the stored status: a trainer that got 200 for its
result may forget it.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from aiohttp import web
from pydantic import ValidationError

from finetune_operator import endpoint
from finetune_operator.adapters.kube import Json, Kube
from finetune_operator.api.base import API_VERSION
from finetune_operator.api.finetunejob import KIND
from finetune_operator.core import failures, policies, statuses
from finetune_operator.core.rates import Limiter, Rate
from finetune_operator.core.reports import Report
from finetune_operator.manifests import naming
from finetune_operator.reconcile.mailbox import Mailbox
from finetune_operator.reconcile.queue import Key

logger = logging.getLogger(__name__)

PERSIST_SECONDS = 8.0  # below the 10 s after which the trainer gives up one post
CACHE_SECONDS = 300.0  # a revoked token is noticed after this time
CACHE_ENTRIES = 10_000
REVIEWS = 16  # TokenReviews under way at once
JOB_RATE = Rate(burst=20, per_second=2.0)  # our trainer posts every 2 s, Kubeflow's callback every 5 s
TOKEN_BYTES = 8192


class StatusServer:
    """Takes reports, checks who sends them, and hands them to the queue."""

    def __init__(
        self,
        *,
        kube: Kube,
        mailbox: Mailbox,
        enqueue: Callable[[Key, float, bool], None],
        progress_seconds: float,
    ) -> None:
        """`enqueue` asks for a pass over a key after some seconds; the last argument: whether somebody waits for it."""
        self._kube = kube
        self._mailbox = mailbox
        self._enqueue = enqueue
        self._progress_seconds = progress_seconds
        self._verified: OrderedDict[tuple[Key, str], tuple[str, float]] = OrderedDict()
        self._reviews = asyncio.Semaphore(REVIEWS)
        self._limiter = Limiter(JOB_RATE)

    async def answer(self, request: web.Request) -> web.Response:
        """Take one report. Raises HTTPException with what the sender can do about it."""
        key = (request.match_info["namespace"], request.match_info["name"])
        attempt = int(request.match_info["attempt"][:9])
        uid = await self._authenticate(key, request.headers.get("Authorization", ""))
        # After the token: nobody else can use up what a job may send.
        if wait := self._limiter.take((key, uid), now=asyncio.get_running_loop().time()):
            raise web.HTTPTooManyRequests(
                text=f"more than {JOB_RATE.per_second:g} reports per second: send the latest one again later",
                headers=endpoint.retry_after(wait),
            )
        report = _parse(await endpoint.read_body(request), attempt=attempt)
        if not await self._is_expected(key, uid=uid, attempt=attempt):
            return web.json_response({"accepted": False})
        urgent = self._mailbox.is_news(key, report, uid=uid)
        if not self._mailbox.put(key, uid=uid, attempt=attempt, report=report):
            raise web.HTTPConflict(text=f"attempt {attempt} has reported its result already, or is over")
        wait = 0.0 if urgent else self._progress_seconds - self._mailbox.seconds_since_write(key)
        self._enqueue(key, wait, report.result is not None)
        if report.result and not await self._mailbox.wait_written(
            key, report, uid=uid, seconds=PERSIST_SECONDS
        ):
            raise web.HTTPServiceUnavailable(
                text="the result is not stored yet: send it again", headers=endpoint.retry_after(1.0)
            )
        return web.json_response({"accepted": True})

    async def _authenticate(self, key: Key, authorization: str) -> str:
        """The UID of the job that the sender may report for. Raises HTTPUnauthorized or HTTPNotFound."""
        scheme, _, token = authorization.partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token or not token.isascii():
            raise web.HTTPUnauthorized(text="send the projected token as Authorization: Bearer")
        now = asyncio.get_running_loop().time()
        entry = (key, hashlib.sha256(token.encode()).hexdigest())
        uid, until = self._verified.get(entry, ("", 0.0))
        if until > now:
            return uid
        uid = await self._review(key, token)
        self._verified[entry] = (uid, now + CACHE_SECONDS)
        self._verified.move_to_end(entry)
        # The oldest first: a job that is gone must not be kept for the sake of its token.
        while len(self._verified) > CACHE_ENTRIES or next(iter(self._verified.values()))[1] <= now:
            self._verified.popitem(last=False)
        return uid

    async def _review(self, key: Key, token: str) -> str:
        audiences = _claimed_audiences(token)
        if not any(audience.startswith(naming.audience("")) for audience in audiences):
            raise web.HTTPUnauthorized(
                text="the token is not one for this job"
            )  # without asking the API server
        async with self._reviews:
            uid = (await self._body(key))["metadata"]["uid"]
            audience = naming.audience(uid)
            owner = await self._kube.review_token(token, audience=audience) if audience in audiences else None
        if owner is None or not owner.username.startswith(f"system:serviceaccount:{key[0]}:"):
            raise web.HTTPUnauthorized(text="the token is not one for this job")
        return str(uid)

    async def _body(self, key: Key) -> Json:
        body = await self._kube.get(API_VERSION, KIND, *key)
        if body is None:
            raise web.HTTPNotFound(text=f"no FineTuneJob {key[1]} in namespace {key[0]}")
        return body

    async def _is_expected(self, key: Key, *, uid: str, attempt: int) -> bool:
        """Whether such an attempt is under way, by what the watches tell, which costs no request. Not so for one that
        is not recorded yet: nothing of it would be believed. Raises HTTPConflict for one that is over."""
        body = await self._body(key)
        status = body.get("status", {})
        current = max((one["number"] for one in status.get("attempts", [])), default=0)
        over = attempt < current or status.get("phase") in statuses.FINAL_PHASES
        if body["metadata"]["uid"] != uid or over:
            raise web.HTTPConflict(text=f"attempt {attempt} is over")
        return attempt == current


def _parse(body: bytes, *, attempt: int) -> Report:
    """Raises HTTPBadRequest that names the field."""
    try:
        report = Report.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        path = ".".join(str(part) for part in first["loc"])
        raise web.HTTPBadRequest(text=f"{path or 'body'}: {first['msg']}") from error
    result = report.result
    if result and not failures.is_a_trainers(result.error_class, checks=attempt == policies.CHECK):
        problem = f"{result.error_class} is not for the trainer of attempt {attempt} to say"
        raise web.HTTPBadRequest(text=f"finetune.result.class: {problem}; send the class of its exit code")
    return report


def _claimed_audiences(token: str) -> list[str]:
    """The audiences that a token claims to be for, unproven; none where it is no JWT."""
    parts = token.split(".")
    if len(parts) != 3 or len(token) > TOKEN_BYTES:
        return []
    try:
        claims: Any = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (ValueError, RecursionError):
        return []
    found = claims.get("aud") if isinstance(claims, dict) else None
    listed = found if isinstance(found, list) else [found]
    return [audience for audience in listed if isinstance(audience, str)]

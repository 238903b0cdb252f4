"""The endpoint that trainers report to, wire-compatible with Kubeflow Trainer's status server.

A trainer proves who it is with a projected service-account token whose audience names one job (TokenReview). Progress
is kept and written later, a result is answered only when it is in the stored status: a trainer that got 200 for its
result may forget it.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from aiohttp import web
from pydantic import ValidationError

from finetune_operator.adapters.kube import ApiError, Kube
from finetune_operator.adapters.telemetry import Telemetry
from finetune_operator.api.base import API_VERSION
from finetune_operator.api.finetunejob import KIND
from finetune_operator.core import jobs
from finetune_operator.core.facts import JobFacts
from finetune_operator.core.reports import Report
from finetune_operator.manifests import naming
from finetune_operator.reconcile import facts
from finetune_operator.reconcile.mailbox import Mailbox
from finetune_operator.reconcile.queue import Key

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 64 * 1024
PERSIST_SECONDS = 8.0  # below the 10 s after which the trainer gives up one post
CACHE_SECONDS = 60.0  # a revoked token is noticed after this time
CACHE_ENTRIES = 10_000


class StatusServer:
    """Takes reports, checks who sends them, and hands them to the queue."""

    def __init__(
        self,
        *,
        kube: Kube,
        mailbox: Mailbox,
        telemetry: Telemetry,
        enqueue: Callable[[Key, float], None],
        progress_seconds: float,
    ) -> None:
        self._kube = kube
        self._mailbox = mailbox
        self._telemetry = telemetry
        self._enqueue = enqueue
        self._progress_seconds = progress_seconds
        self._verified: OrderedDict[tuple[Key, str], float] = OrderedDict()

    def application(self) -> web.Application:
        application = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[self._count])
        route = naming.status_path("{namespace}", "{name}", r"{attempt:\d+}")
        application.router.add_post(route, self._post)
        return application

    @web.middleware
    async def _count(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        try:
            response = await handler(request)
        except web.HTTPException as error:
            response = web.json_response({"error": error.text or error.reason}, status=error.status)
        except ApiError as error:
            logger.warning("a report has to wait: %s", error)
            response = web.json_response({"error": "the Kubernetes API does not answer"}, status=503)
        self._telemetry.reports.labels(str(response.status)).inc()
        return response

    async def _post(self, request: web.Request) -> web.Response:
        key = (request.match_info["namespace"], request.match_info["name"])
        attempt = int(request.match_info["attempt"])
        await self._authenticate(key, request.headers.get("Authorization", ""))
        try:
            report = Report.model_validate_json(await request.read())
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            path = ".".join(str(part) for part in first["loc"])
            raise web.HTTPBadRequest(text=f"{path}: {first['msg']}") from error
        if report.result:
            self._refuse_when_over(await self._job(key), attempt)
        urgent = self._mailbox.is_news(key, report)
        if not self._mailbox.put(key, attempt=attempt, report=report):
            raise web.HTTPConflict(text=f"attempt {attempt} has reported its result already, or is over")
        wait = 0.0 if urgent else self._progress_seconds - self._mailbox.seconds_since_write(key)
        self._enqueue(key, wait)
        if report.result and not await self._mailbox.wait_written(key, report, seconds=PERSIST_SECONDS):
            raise web.HTTPServiceUnavailable(text="the result is not stored yet: send it again")
        return web.json_response({"accepted": True})

    async def _authenticate(self, key: Key, authorization: str) -> None:
        """Whether the sender may report for the job. Raises HTTPUnauthorized or HTTPNotFound."""
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise web.HTTPUnauthorized(text="send the projected token as Authorization: Bearer")
        entry = (key, hashlib.sha256(token.encode()).hexdigest())
        if self._verified.get(entry, 0.0) > time.monotonic():
            return
        job = await self._job(key)
        owner = await self._kube.review_token(token.strip(), audience=naming.audience(job.uid))
        if owner is None or not owner.username.startswith(f"system:serviceaccount:{key[0]}:"):
            raise web.HTTPUnauthorized(text="the token is not one for this job")
        self._verified[entry] = time.monotonic() + CACHE_SECONDS
        while len(self._verified) > CACHE_ENTRIES:
            self._verified.popitem(last=False)

    async def _job(self, key: Key) -> JobFacts:
        body = await self._kube.get(API_VERSION, KIND, *key)
        if body is None:
            raise web.HTTPNotFound(text=f"no FineTuneJob {key[1]} in namespace {key[0]}")
        return facts.job_facts(body)

    @staticmethod
    def _refuse_when_over(job: JobFacts, attempt: int) -> None:
        current = job.status.attempts[-1].number if job.status.attempts else None
        if attempt != current or jobs.is_finished(job.status):
            raise web.HTTPConflict(text=f"attempt {attempt} is over")

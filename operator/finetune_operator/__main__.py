"""Start the operator: configuration, logging, the metrics and status endpoints, the queues, and Kopf's watches."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import ssl
import sys
from collections.abc import AsyncIterator

import kopf
from aiohttp import web
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from finetune_operator import config, handlers, parts
from finetune_operator.adapters.kube import Kube
from finetune_operator.adapters.telemetry import Telemetry
from finetune_operator.api import finetunejob
from finetune_operator.core.facts import Defaults
from finetune_operator.manifests.rayjobs import Platform
from finetune_operator.reconcile.finetunejob import FineTuneJobReconciler
from finetune_operator.reconcile.mailbox import Mailbox
from finetune_operator.reconcile.queue import Key, KeyedQueue
from finetune_operator.status_server import StatusServer

STUCK_SECONDS = 300.0  # a pass takes milliseconds; one of this length hangs


def main() -> None:
    try:
        settings = config.load(os.environ)
    except config.ConfigurationError as error:
        sys.exit(f"finetune-operator: {error}")
    kopf.configure(log_format=kopf.LogFormat.JSON if settings.json_logs else kopf.LogFormat.FULL)
    logging.getLogger("aiohttp.access").setLevel(logging.WARNING)
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)  # one line per watch event otherwise
    asyncio.run(run(settings))


async def run(settings: config.OperatorConfig) -> None:
    """Run until a signal arrives or one of the parts fails."""
    kube = await Kube.connect()
    telemetry, mailbox = Telemetry(), Mailbox()
    reconciler = FineTuneJobReconciler(
        kube=kube,
        mailbox=mailbox,
        telemetry=telemetry,
        defaults=Defaults(
            output_uri=settings.output_uri, image=settings.trainer_image, prices=settings.prices
        ),
        platform=Platform(
            submission_mode=settings.submission_mode,
            status_url=settings.status_url,
            authority_pem=settings.authority_pem(),
            termination_grace_seconds=settings.termination_grace_seconds,
            accelerator_label=settings.accelerator_label,
        ),
    )
    queue = KeyedQueue(reconciler, on_depth=telemetry.queue_depth.labels(finetunejob.KIND).set)
    reconciler.followers.wake = queue.add
    status_server = StatusServer(
        kube=kube,
        mailbox=mailbox,
        telemetry=telemetry,
        enqueue=lambda key, after: queue.add(key, after=after),
        progress_seconds=settings.progress_seconds,
    )
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(kube.close)
        await stack.enter_async_context(
            _serving(
                status_server.application(), settings.status_host, settings.status_port, settings.status_tls()
            )
        )
        rollouts = await stack.enter_async_context(
            parts.build_rollouts(settings, kube=kube, telemetry=telemetry)
        )
        await stack.enter_async_context(
            _serving(
                metrics_application(queue, rollouts.queue), settings.metrics_host, settings.metrics_port, None
            )
        )
        serving = asyncio.create_task(queue.run(), name="queue")
        stack.callback(serving.cancel)
        rolling = asyncio.create_task(rollouts.run(), name="rollouts")
        stack.callback(rolling.cancel)

        def job_changed(key: Key) -> None:
            queue.add(key)
            rollouts.watchlist.job_changed(key)

        watching = asyncio.create_task(
            kopf.operator(
                registry=handlers.build_registry(
                    job_changed=job_changed, deployment_changed=rollouts.queue.add
                ),
                clusterwide=not settings.namespaces,
                namespaces=settings.namespaces,
            ),
            name="watches",
        )
        done, _ = await asyncio.wait({serving, rolling, watching}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()  # re-raises: an operator without its queue or its watches must end, and be restarted


def metrics_application(*queues: KeyedQueue) -> web.Application:
    """/metrics for Prometheus and /healthz for the kubelet."""

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(), headers={"Content-Type": CONTENT_TYPE_LATEST})

    async def healthz(_: web.Request) -> web.Response:
        stuck = max(queue.longest_running() for queue in queues)
        if stuck > STUCK_SECONDS:
            return web.Response(status=500, text=f"a reconcile pass has been running for {stuck:.0f} s\n")
        return web.Response(text="ok\n")

    application = web.Application()
    application.router.add_get("/metrics", metrics)
    application.router.add_get("/healthz", healthz)
    return application


@contextlib.asynccontextmanager
async def _serving(
    application: web.Application, host: str, port: int, tls: ssl.SSLContext | None
) -> AsyncIterator[None]:
    runner = web.AppRunner(application)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, ssl_context=tls).start()
        yield
    finally:
        await runner.cleanup()


if __name__ == "__main__":
    main()

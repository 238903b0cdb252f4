"""What only the leader runs: the queues, the rollouts, the endpoint's own answers, and Kopf's watches."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from finetune_operator import handlers, parts
from finetune_operator.adapters.telemetry import Telemetry
from finetune_operator.adapters.tls import AuthorityFile
from finetune_operator.adapters.watched import WatchedKube
from finetune_operator.api import finetunejob
from finetune_operator.config import OperatorConfig
from finetune_operator.core.facts import Defaults
from finetune_operator.endpoint import ReportEndpoint
from finetune_operator.health import Health
from finetune_operator.manifests.rayjobs import Platform
from finetune_operator.reconcile import clocks
from finetune_operator.reconcile.departures import Departures
from finetune_operator.reconcile.finetunejob import FineTuneJobReconciler
from finetune_operator.reconcile.mailbox import Mailbox
from finetune_operator.reconcile.queue import Key, KeyedQueue, Priority
from finetune_operator.status_server import StatusServer


async def lead(
    settings: OperatorConfig,
    *,
    kube: WatchedKube,
    telemetry: Telemetry,
    report_endpoint: ReportEndpoint,
    health: Health,
    may_push: Callable[[], bool],
) -> None:
    """Serve until a signal arrives or one of the parts fails. When this returns or raises, nothing acts any more."""
    clocks.CLOCK.begin_to_listen()  # a stand-by hears no trainer
    mailbox = Mailbox()
    reconciler = _reconciler(settings, kube=kube, mailbox=mailbox, telemetry=telemetry)
    queue = KeyedQueue(reconciler, ordinary=parts.ORDINARY)
    telemetry.queue_depth.labels(finetunejob.KIND).set_function(queue.depth)
    reconciler.followers.wake = queue.add
    reports = StatusServer(
        kube=kube,
        mailbox=mailbox,
        enqueue=lambda key, after, is_awaited: queue.add(
            key, after=after, priority=Priority.FIRST if is_awaited else Priority.ORDINARY
        ),
        progress_seconds=settings.progress_seconds,
    )
    departures = Departures(
        kube=kube, namespaces=settings.namespaces, shown=telemetry.shown_jobs, wake=queue.add
    )
    async with parts.build_rollouts(settings, kube=kube, telemetry=telemetry, may_act=may_push) as rollouts:

        def job_changed(key: Key, is_news: bool, *, is_untouched: bool = False) -> None:
            if is_news:
                # Where the operator is behind, what starts a job comes before what only tells of others.
                queue.add(key, priority=Priority.EARLY if is_untouched else Priority.ORDINARY)
            rollouts.watchlist.job_changed(key)

        stand_by, login = report_endpoint.answer, handlers.Login(kube.server)
        report_endpoint.answer, health.queues = reports.answer, (queue, rollouts.queue)
        watches = handlers.watch(
            settings.namespaces,
            notice=kube.sightings.notice,
            job_changed=job_changed,
            deployment_changed=rollouts.queue.add,
            login=login,
        )
        tasks = [
            asyncio.create_task(watches, name="watches"),
            asyncio.create_task(login.last(), name="credentials"),
            asyncio.create_task(queue.run(), name="queue"),
            asyncio.create_task(rollouts.run(), name="rollouts"),
            asyncio.create_task(reconciler.recorder.run(), name="events"),
            asyncio.create_task(departures.run(), name="departures"),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # re-raises: an operator without its queue or its watches must end, and be restarted
        finally:
            report_endpoint.answer, health.queues = stand_by, ()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _reconciler(
    settings: OperatorConfig,
    *,
    kube: WatchedKube,
    mailbox: Mailbox,
    telemetry: Telemetry,
) -> FineTuneJobReconciler:
    authority = AuthorityFile(settings.status_authority)

    def platform() -> Platform:
        return Platform(
            submission_mode=settings.submission_mode,
            status_url=settings.status_url,
            authority_pem=authority.read(),
            termination_grace_seconds=settings.termination_grace_seconds,
            pod_defaults=settings.pod_defaults,
            accelerator_label=settings.accelerator_label,
        )

    return FineTuneJobReconciler(
        kube=kube,
        mailbox=mailbox,
        telemetry=telemetry,
        defaults=Defaults(
            output_uri=settings.output_uri, image=settings.trainer_image, prices=settings.prices
        ),
        platform=platform,
    )

"""Start the operator: configuration, logging, the endpoints of every replica, and the leader's part in one of them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any

# Ctrl-C while the modules below are loaded ends the process without a traceback.
_on_interrupt = signal.getsignal(signal.SIGINT)
if _on_interrupt is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from aiohttp import web

from finetune_operator import config, endpoint, handlers, kopf_logging, leader, leadership
from finetune_operator.adapters import tls
from finetune_operator.adapters.environment import ConfigurationError
from finetune_operator.adapters.kube import Kube
from finetune_operator.adapters.kubeconfig import KubeconfigError
from finetune_operator.adapters.telemetry import Telemetry
from finetune_operator.adapters.watched import WatchedKube
from finetune_operator.endpoint import ReportEndpoint
from finetune_operator.forwarding import Forwarder
from finetune_operator.health import Health
from finetune_operator.leadership import Leadership, LeadershipLostError

signal.signal(signal.SIGINT, _on_interrupt)

logger = logging.getLogger(__name__)


def main() -> None:
    try:
        settings = config.load(os.environ)
    except ConfigurationError as error:
        sys.exit(f"finetune-operator: {error}")
    kopf_logging.configure(as_json=settings.json_logs)
    tls.buffer_single_records()
    try:
        asyncio.run(run(settings))
    except asyncio.CancelledError:  # a signal
        return
    except (ConfigurationError, KubeconfigError, handlers.CredentialsError) as error:
        logger.critical("the operator ends: %s", error)
        sys.exit(1)
    except Exception:  # the border of the process: what ends it is a line of its log, and no success
        logger.critical("the operator ends", exc_info=True)
        sys.exit(1)


async def run(settings: config.OperatorConfig) -> None:
    """Run until a signal arrives or one of the parts fails."""
    _cancel_on_sigterm()
    telemetry = Telemetry()
    health = Health(telemetry)
    async with contextlib.AsyncExitStack() as stack:
        election = await _election(settings, stack, telemetry)
        may_act = election.may_act if election else lambda: True
        may_push = election.may_push if election else lambda: True
        kube = await WatchedKube.connect(may_write=may_act, on_answer=telemetry.api_answered)
        stack.push_async_callback(kube.close)
        forwarder = await stack.enter_async_context(
            Forwarder(
                leader=lambda: election.leader_address if election else None,
                status_url=settings.status_url,
                authority=settings.status_authority,
            )
        )
        report_endpoint = ReportEndpoint(answer=forwarder.answer, telemetry=telemetry)
        await _listen(settings, stack, report_endpoint=report_endpoint, health=health)
        leading = leader.lead(
            settings,
            kube=kube,
            telemetry=telemetry,
            report_endpoint=report_endpoint,
            health=health,
            may_push=may_push,
        )
        if election is None:
            telemetry.leads.set(1)
            await leading
        else:
            await _lead_while_elected(election, leading, telemetry)


async def _lead_while_elected(
    election: Leadership, leading: Coroutine[Any, Any, None], telemetry: Telemetry
) -> None:
    try:
        await election.acquire()
    except BaseException:
        leading.close()
        raise
    telemetry.leads.set(1)
    keeping = asyncio.create_task(election.keep(), name="lease")
    acting = asyncio.create_task(leading, name="leader")
    ended: list[BaseException | None] = []
    try:
        await asyncio.wait({keeping, acting}, return_when=asyncio.FIRST_COMPLETED)
        if keeping.done() and not keeping.cancelled():
            lost = keeping.exception()
            if isinstance(lost, LeadershipLostError):
                _die(str(lost))
    finally:
        for task in (acting, keeping):  # the Lease is kept until nothing acts any more
            task.cancel()
            ended += await asyncio.gather(task, return_exceptions=True)
        await election.release()
    for error in ended:
        if isinstance(error, Exception):
            raise error


def _die(reason: str) -> None:
    """End at once. No cleaning up: whatever it did would be done in the name of a Lease that is lost."""
    logger.critical("this process leads no more and ends: %s", reason)
    logging.shutdown()
    os._exit(1)


def _cancel_on_sigterm() -> None:
    """A stand-by is process 1 of its container, for which the kernel ignores SIGTERM unless it is handled. Kopf
    replaces the handler when it starts."""
    task = asyncio.current_task()
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)


async def _election(
    settings: config.OperatorConfig, stack: contextlib.AsyncExitStack, telemetry: Telemetry
) -> Leadership | None:
    if not settings.leader_election:
        return None
    kube = await Kube.connect(on_answer=telemetry.api_answered)
    stack.push_async_callback(kube.close)
    address = leadership.own_address(
        settings.status_port,
        scheme="https" if settings.status_certificate else "http",
        pod_ip=settings.pod_ip,
    )
    return Leadership(kube, namespace=settings.namespace, address=address, terms=settings.terms)


async def _listen(
    settings: config.OperatorConfig,
    stack: contextlib.AsyncExitStack,
    *,
    report_endpoint: ReportEndpoint,
    health: Health,
) -> None:
    """Open the two ports that every replica has."""
    files = None
    if settings.status_certificate and settings.status_key:
        with _blamed_on("FINETUNE_TLS_CERT_FILE and FINETUNE_TLS_KEY_FILE"):
            files = tls.TlsFiles(certificate=settings.status_certificate, key=settings.status_key)
        stack.callback(health.look_after(files.watch(), name="certificates").cancel)
    stack.callback(health.look_after(health.beat(), name="heartbeat").cancel)
    with _blamed_on("FINETUNE_STATUS_HOST and FINETUNE_STATUS_PORT"):
        await stack.enter_async_context(
            endpoint.listening(
                report_endpoint.application(),
                host=settings.status_host,
                port=settings.status_port,
                tls=files.context if files else None,
            )
        )
    with _blamed_on("FINETUNE_METRICS_HOST and FINETUNE_METRICS_PORT"):
        await stack.enter_async_context(
            _serving(health.application(), settings.metrics_host, settings.metrics_port)
        )


@contextlib.contextmanager
def _blamed_on(variables: str) -> Iterator[None]:
    """What the system refuses here is what these variables ask for."""
    try:
        yield
    except OSError as error:
        raise ConfigurationError(f"{variables}: {error}") from error


@contextlib.asynccontextmanager
async def _serving(application: web.Application, host: str, port: int) -> AsyncIterator[None]:
    runner = web.AppRunner(application, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        yield
    finally:
        await runner.cleanup()


if __name__ == "__main__":
    main()

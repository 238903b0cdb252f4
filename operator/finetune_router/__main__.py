"""finetune-router: the parent process. Reads the configuration, opens the ports, keeps the workers, ends in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sqlite3
import sys
from pathlib import Path

# Ctrl-C while the modules below are loaded ends the process without a traceback.
_on_interrupt = signal.getsignal(signal.SIGINT)
if _on_interrupt is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import uvloop
from aiohttp import web

from finetune_router import storage, tickets
from finetune_router.admin import AdminPort
from finetune_router.config import RouterConfig, parse_config, read_secret
from finetune_router.credentials import ApiKeys
from finetune_router.exposition import MetricsBoard
from finetune_router.feedback import FeedbackStore
from finetune_router.fleet import Fleet
from finetune_router.ledger import Ledger
from finetune_router.routing import RouteKeeper
from finetune_router.worker import configure_logging

signal.signal(signal.SIGINT, _on_interrupt)

logger = logging.getLogger(__name__)

_PRUNE_SECONDS = 3600.0


async def run(config: RouterConfig) -> None:
    """Serve until SIGTERM or SIGINT. Raises OSError for a port that is taken, ValueError for a file of no use."""
    config.state_folder.mkdir(parents=True, exist_ok=True)
    with storage.lock(config.state_folder):
        await serve(config)


async def serve(config: RouterConfig) -> None:
    """The life of a router whose state folder is its own. Raises what `run` raises."""
    check_files(config)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    instance = storage.read_instance(config.state_folder)
    ledger, board = Ledger(config.state_folder), MetricsBoard()
    ledger.load()
    workers = Fleet(config, ledger, board)
    store = FeedbackStore(config.state_folder)
    keeper = RouteKeeper(
        folder=config.state_folder,
        routes_file=Path(config.routes_file) if config.routes_file else None,
        workers=workers,
    )
    admin = AdminPort(
        instance=instance, token_file=config.admin_token_file, keeper=keeper, workers=workers, ledger=ledger,
        board=board, store=store,
    )  # fmt: skip
    workers.listen()
    await keeper.load()
    runner = web.AppRunner(admin.application(), access_log=None, shutdown_timeout=1.0)
    await runner.setup()
    site = web.TCPSite(runner, config.admin_host, config.admin_port)
    await site.start()
    workers.start()
    background = [
        asyncio.create_task(keeper.watch()),
        asyncio.create_task(prune(store, config.feedback_days)),
    ]
    admin_port = runner.addresses[0][1]
    logger.info("data port %s:%d, admin port %s:%d", config.host, workers.port, config.admin_host, admin_port)
    await stop.wait()
    logger.info("stopping: up to %.0f s for requests under way", config.grace)
    admin.draining = True
    workers.announce_drain()
    await asyncio.sleep(config.drain_delay)
    await workers.drain()
    for task in background:
        task.cancel()
    try:
        ledger.save()
    except OSError as error:
        logger.error("what was counted is not on disk, and lost with this process: %s", error)
    await runner.cleanup()


async def prune(store: FeedbackStore, days: int) -> None:
    """Delete old feedback records now and then, for ever."""
    while True:
        try:
            deleted = await asyncio.to_thread(store.prune, days)
        except sqlite3.Error as error:  # the next time it may have room, or not be locked
            logger.error("old feedback records are still there: %s", error)
            deleted = 0
        if deleted:
            logger.info("deleted %d feedback records older than %d days", deleted, days)
        await asyncio.sleep(_PRUNE_SECONDS)


def check_files(config: RouterConfig) -> None:
    """Whether all named files are of use, before any worker stumbles over them. Raises ValueError or OSError."""
    tickets.load_key(Path(config.signing_key_file) if config.signing_key_file else None, config.state_folder)
    for file in (config.admin_token_file, config.upstream_api_key_file):
        read_secret(file)
    if config.api_keys_file:
        ApiKeys(Path(config.api_keys_file)).reload()


def main() -> None:
    config = parse_config(sys.argv[1:])
    configure_logging(config)
    try:
        with contextlib.suppress(KeyboardInterrupt):
            uvloop.run(run(config))
    except (OSError, ValueError) as error:
        raise SystemExit(f"finetune-router: {error}") from None


if __name__ == "__main__":
    main()

"""A worker process: the data port, and the line to the parent. Started by `fleet.py`, not by people."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

import uvloop
from aiohttp import web

from finetune_router import tickets
from finetune_router.config import RouterConfig, read_secret
from finetune_router.control import Channel, Message
from finetune_router.counters import Book, Report
from finetune_router.credentials import ApiKeys
from finetune_router.feedback import FeedbackDesk, FeedbackStore
from finetune_router.flights import Tools
from finetune_router.forwarding import Forwarder, Limits
from finetune_router.headers import HeaderPolicy
from finetune_router.proxy import Proxy
from finetune_router.recording import Recorder
from finetune_router.server import DataServer
from finetune_router.service import Service
from finetune_router.tables import Change, SchemaCache, TableBuilder
from finetune_router.tickets import TicketOffice
from finetune_router.upstreams import Upstreams

logger = logging.getLogger(__name__)

BEAT_SECONDS = 0.5
BEATS_PER_REPORT = 4  # a worker that is killed has told what it counted up to two seconds before
_REPORT_PAUSE = 0.005  # seconds between parts: requests must not queue up behind a thousand aliases
_TEND_SECONDS = 2.0
# Objects that may be made and still be there before the garbage collector looks at them. Requests leave no cycles, and
# those under way are no garbage: at the usual 700, a burst of ten had it run in their midst.
_YOUNG_OBJECTS = 20_000
_MIRROR_SHARE = 0.25  # of the room for bodies, which mirrors may hold beside it
# libuv lends half of its threads to lookups of names, and uvloop makes one for each connection, also to an IP address:
# with the usual four, two names whose server is silent kept every engine from being reached.
_LIBUV_THREADS = "64"


@dataclass
class Worker:
    """Everything that one worker process holds."""

    channel: Channel
    service: Service
    recorder: Recorder
    book: Book
    upstreams: Upstreams
    builder: TableBuilder
    urls: frozenset[str] = frozenset()

    async def run(self, listener: socket.socket) -> None:
        """Serve until the parent says drain, or is gone."""
        config = self.service.config
        background = [
            asyncio.create_task(self.recorder.run()),
            asyncio.create_task(self._report_forever()),
            asyncio.create_task(self._tend_forever()),
        ]
        runner = web.ServerRunner(DataServer(self.service), shutdown_timeout=config.grace)
        try:
            if await self._obey_until_serving():
                await runner.setup()
                await web.SockSite(runner, listener, backlog=4096).start()
                self.channel.send("serving")
                await self._obey_until_drain()
                self.service.draining = True
        finally:
            await runner.cleanup()
            for task in background:
                task.cancel()
            self.recorder.flush()
            self._report()
            with contextlib.suppress(ConnectionError):
                await self.channel.drain()
            self.channel.close()

    async def _obey_until_serving(self) -> bool:
        """Apply what comes until the parent says serve; False when it is gone."""
        while (message := await self.channel.receive()) is not None:
            if message["kind"] == "serve":
                return True
            await self._obey(message)
        return False

    async def _obey_until_drain(self) -> None:
        while (message := await self.channel.receive()) is not None:
            if message["kind"] == "drain":
                return
            await self._obey(message)

    async def _obey(self, message: Message) -> None:
        match message["kind"]:
            case "routes":
                await self._apply(Change(**message["change"]))
            case "draining":  # still taking connections, but none is kept
                self.service.draining = True
            case "report":
                self.recorder.sweep()
                self.recorder.flush()
                self._report(number=message["number"])

    async def _apply(self, change: Change) -> None:
        """Make the new table the current one. Requests under way keep the one that they started with."""
        try:
            table = await self.builder.build(change)
        except ValueError as error:  # pydantic's ValidationError is one
            logger.error("a snapshot cannot be applied: %s", error)
            self.channel.send("refused", version=change.version)
            return
        self.service.table = table
        routes = list((table.by_model or {}).values())
        legs = [(route.alias, leg) for route in routes for leg in route.legs]
        self.urls = frozenset(upstream.address.url for _, leg in legs for upstream in leg.upstreams)
        self.book.forget_gone({(alias, leg.revision) for alias, leg in legs})
        # Tables are large and live long: without this the garbage collector would walk through them again and again,
        # 50 ms and more for a thousand aliases. They are freed by their reference counts.
        gc.freeze()
        self.channel.send("applied", version=change.version)

    async def _report_forever(self) -> None:
        """Whoever asks for counters makes every worker tell them; this is for workers that die."""
        while True:
            for _ in range(BEATS_PER_REPORT):
                await asyncio.sleep(BEAT_SECONDS)
                self.recorder.sweep()
                self._beat()
            for report in self.book.take_reports():
                self._send(report)
                await asyncio.sleep(_REPORT_PAUSE)

    def _beat(self) -> None:
        self.channel.send(
            "beat",
            in_flight=self.service.in_flight,
            mirrors=len(self.service.proxy.mirrors),
            unread=self.recorder.unread,
        )

    def _report(self, *, number: int | None = None) -> None:
        """All that changed, at once; the parent then has what this worker has counted up to now."""
        for report in self.book.take_reports():
            self._send(report)
        self._beat()
        self.channel.send("reported", number=number)

    def _send(self, report: Report) -> None:
        desk = self.service.desk
        feedback = None
        if desk.changed:
            feedback = [[*key, count] for key, count in desk.counts.items()]
            desk.changed = False
        self.channel.send(
            "counters",
            arms=report.arms,
            samples=report.samples,
            metrics=report.metrics,
            forgotten=report.forgotten,
            feedback=feedback,
        )

    async def _tend_forever(self) -> None:
        while True:
            await asyncio.sleep(_TEND_SECONDS)
            self.upstreams.tend(self.urls)
            if self.service.api_keys is not None:
                try:
                    self.service.api_keys.reload()
                except (OSError, ValueError) as error:
                    logger.error("the former API keys stay in force: %s", error)


def build_worker(channel: Channel, config: RouterConfig) -> Worker:
    """Put a worker together. Raises ValueError or OSError for files that cannot be used."""
    book, schemas = Book(), SchemaCache()
    office = TicketOffice(
        tickets.load_key(
            Path(config.signing_key_file) if config.signing_key_file else None, config.state_folder
        )
    )
    recorder = Recorder(book, schemas)
    api_keys = None
    if config.api_keys_file:
        api_keys = ApiKeys(Path(config.api_keys_file))
        api_keys.reload()
    limits = Limits(
        connect=config.connect_timeout,
        first_byte=config.first_byte_timeout,
        silence=config.silence_timeout,
        total=config.total_timeout,
    )
    tools = Tools(
        forwarder=Forwarder(limits, upstream_key=read_secret(config.upstream_api_key_file)),
        recorder=recorder,
        book=book,
        tickets=office,
        policy=HeaderPolicy(config.forward_headers),
    )
    proxy = Proxy(
        tools,
        max_mirrors=config.max_mirrors,
        max_mirror_bytes=int(config.max_buffered_bytes * _MIRROR_SHARE),
    )
    service = Service(
        config=config,
        proxy=proxy,
        book=book,
        desk=FeedbackDesk(FeedbackStore(config.state_folder), office, days=config.feedback_days),
        api_keys=api_keys,
    )
    upstreams = Upstreams()
    builder = TableBuilder(upstreams=upstreams, book=book, schemas=schemas)
    return Worker(channel, service, recorder, book, upstreams, builder)


async def work(control: socket.socket, listener: socket.socket) -> None:
    """The life of a worker process."""
    channel = Channel(*await asyncio.open_connection(sock=control))
    setup = await channel.receive()
    if setup is None:
        return
    config = RouterConfig.from_json(setup["config"])
    configure_logging(config)
    await build_worker(channel, config).run(listener)


def configure_logging(config: RouterConfig) -> None:
    logging.basicConfig(
        level=config.log_level.upper(),
        format="%(asctime)s %(levelname)s %(process)d %(name)s %(message)s",
        stream=sys.stderr,
    )
    # aiohttp reports malformed requests of clients with a traceback; they got their 400.
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)


def raise_file_limit() -> None:
    """A stream takes two descriptors; the usual soft limit of 1,024 would end at 500 of them."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def main() -> None:
    # The parent says when to stop; a signal to the whole process group must not cut running requests.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise_file_limit()
    os.environ.setdefault("UV_THREADPOOL_SIZE", _LIBUV_THREADS)
    control = socket.socket(fileno=int(sys.argv[1]))
    listener = socket.socket(fileno=int(sys.argv[2]))
    control.setblocking(False)
    listener.setblocking(False)
    gc.set_threshold(_YOUNG_OBJECTS)
    gc.freeze()  # what is imported stays
    uvloop.run(work(control, listener))


if __name__ == "__main__":
    main()

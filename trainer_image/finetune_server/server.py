"""The engine's process: model in, two ports out, and an orderly end."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_server import agent_app, threads
from finetune_server.ports import listen, read_key
from finetune_trainer import machine, storage
from finetune_trainer.failures import BadConfig, TrainerError

if TYPE_CHECKING:
    from finetune_server.engine import Engine

ANY = ("0.0.0.0", "::", "")  # noqa: S104  compared, not bound
LOG = logging.getLogger("finetune_server")


def run(options: argparse.Namespace) -> int:
    """Serves until SIGTERM or SIGINT."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    if not asyncio.run(_serve(options)):
        sys.stderr.flush()
        os._exit(0)  # nothing can end the thread that loads, and the end of Python under it may crash
    return 0


async def _serve(options: argparse.Namespace) -> bool:
    """Returns whether the model was loaded before the stop."""
    try:
        tempfile.gettempdir()  # torch asks for it as it is imported
    except OSError as error:
        raise BadConfig(storage.NO_WORK_FOLDER.format(error)) from error
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    api_key = read_key(options.api_key_file)  # before the model: who mistyped the name need not wait for it
    async with contextlib.AsyncExitStack() as stack:
        if options.agent_port:  # before the model: whoever asks meanwhile hears that it is not ready
            await stack.enter_async_context(_agent_beside(options, api_key))
        loading = asyncio.create_task(threads.apart(lambda: build_engine(options)))
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            return False
        engine, names = loading.result()
        from finetune_server.api import Api  # with torch behind it: see build_engine

        api = Api(engine, names=names, api_key=api_key)
        engine.start()
        stack.push_async_callback(asyncio.to_thread, engine.stop)
        address = await stack.enter_async_context(listen(api.application(), options.host, options.port))
        LOG.info("serving %s on %s:%d", ", ".join(names), *address)
        while not stopping.done():
            if not engine.alive:
                raise TrainerError(
                    "the engine has stopped; its log says why"
                )  # whoever started it starts it again
            await asyncio.wait({stopping}, timeout=1)
        api.draining = True
        LOG.info("draining")
    return True


def _agent_beside(
    options: argparse.Namespace, api_key: str | None
) -> contextlib.AbstractAsyncContextManager[tuple[str, int]]:
    host = "127.0.0.1" if options.host in ANY else options.host
    return agent_app.serve(
        engine_url=f"http://{host}:{options.port}",
        api_key=api_key,
        settings=agent_app.build_settings(
            options,
            max_loras=options.max_loras,
            max_lora_rank=options.max_lora_rank,
            base_uri=to_uri(options.model),
        ),
        token_file=options.agent_token_file,
        host=options.agent_host or options.host,
        port=options.agent_port,
    )


def build_engine(options: argparse.Namespace) -> tuple[Engine, list[str]]:
    """Loads the model; returns the engine, not yet started, and the served names of the base model."""
    import torch  # seconds of imports, during which the agent answers already

    from finetune_server import models
    from finetune_server.engine import Engine, Limits
    from finetune_server.telemetry import Telemetry

    torch.set_num_threads(options.threads or machine.count_cores()[0])
    uri = to_uri(options.model)
    path = models.find_model(uri)
    base = models.load_base(
        path, uri=uri, device=options.device, dtype=options.dtype, max_length=options.max_model_len
    )
    names = options.served_model_name or [Path(uri.rstrip("/")).name]
    limits = Limits(
        max_num_seqs=options.max_num_seqs,
        max_loras=options.max_loras,
        max_lora_rank=options.max_lora_rank,
        max_queue=options.max_queue,
        cache_tokens=max(base.max_length, options.kv_cache_tokens or max(16384, 4 * base.max_length)),
    )
    engine = Engine(base, limits, Telemetry(names[0]))
    engine.registry.set_base_names(frozenset(names))
    return engine, names


def to_uri(text: str) -> str:
    """Takes a plain path as file://."""
    return text if "://" in text else f"file://{Path(text).absolute()}"

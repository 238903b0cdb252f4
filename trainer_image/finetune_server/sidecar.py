"""The agent alone: the sidecar of a vLLM pod."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal

from finetune_server import agent_app
from finetune_server.ports import read_key


def run(options: argparse.Namespace) -> int:
    """Serves until SIGTERM or SIGINT."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    asyncio.run(_serve(options))
    return 0


async def _serve(options: argparse.Namespace) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    settings = agent_app.build_settings(
        options,
        max_loras=options.max_loras,
        max_lora_rank=options.max_lora_rank,
        base_uri=options.base_model,
    )
    async with agent_app.serve(
        engine_url=options.engine,
        api_key=read_key(options.api_key_file),
        settings=settings,
        token_file=options.agent_token_file,
        host=options.host,
        port=options.port,
    ):
        await stop.wait()

"""Pieces of answers, from the engine's thread to the client: as one document, or as a stream of events."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from aiohttp import web

from finetune_server import answers, errors
from finetune_server.sequences import Finish, Piece, Sequence


class Inbox:
    """Where the engine puts the pieces of one request; made on the event loop that takes them out."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()

    def put(self, index: int, piece: Piece) -> None:
        """From any thread."""
        if not self._loop.is_closed():  # the process ends: nobody reads any more
            self._loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))

    async def next(self) -> tuple[int, Piece]:
        """Returns the next piece and which answer it is of. Raises ApiError when the engine failed."""
        index, piece = await self._pieces.get()
        if piece.finish is Finish.ERROR:
            raise errors.ApiError(piece.message)
        if piece.finish is Finish.ABORT:
            raise errors.Unavailable("the engine is shutting down")
        return index, piece


async def collect(form: answers.Form, sequences: list[Sequence], inbox: Inbox) -> web.Response:
    """Answers when all is there."""
    choices = [answers.Choice() for _ in sequences]
    while any(choice.finish is None for choice in choices):
        index, piece = await inbox.next()
        choices[index].add(piece)
    document = form.whole(choices, prompt_tokens=sum(len(one.prompt) for one in sequences))
    return web.json_response(document, dumps=dumps)


async def stream(
    request: web.Request,
    form: answers.Form,
    sequences: list[Sequence],
    inbox: Inbox,
    *,
    wants_usage: bool,
) -> web.StreamResponse:
    """Answers piece by piece. Raises ApiError as long as nothing was sent."""
    choices = [answers.Choice() for _ in sequences]
    index, piece = await inbox.next()  # before the headers: a request that fails at once gets a status
    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
    )
    try:
        await response.prepare(request)
        await response.write(b"".join(form.opening(number) for number in range(len(choices))))
        while True:
            chunk = form.chunk(index, piece, offset=len(choices[index].text))
            choices[index].add(piece)
            if chunk:
                await response.write(chunk)
            if all(choice.finish is not None for choice in choices):
                break
            try:
                index, piece = await inbox.next()
            except errors.ApiError as error:  # too late for a status
                await response.write(answers.event(error.document()) + answers.DONE)
                return response
        if wants_usage:
            prompt_tokens = sum(len(one.prompt) for one in sequences)
            tokens = sum(choice.tokens for choice in choices)
            await response.write(form.usage_chunk(prompt_tokens=prompt_tokens, tokens=tokens))
        await response.write(answers.DONE)
        await response.write_eof()
    except ConnectionResetError:  # the client went away; the caller cancels
        pass
    return response


def dumps(document: Any) -> str:
    """JSON without spaces, and with letters as they are."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))

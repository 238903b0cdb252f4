"""Work on storage, which may hang for ever, in threads that nobody waits for.

asyncio.to_thread has a few threads for everything: storage that hangs would soon hold them all, and the end of the
process would wait for it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def apart(call: Callable[[], T]) -> T:
    """Returns what `call` returns, from a thread of its own; who is cancelled here leaves it behind."""
    done: concurrent.futures.Future[T] = concurrent.futures.Future()

    def work() -> None:
        try:
            done.set_result(call())
        except BaseException as error:  # handed to whoever awaits
            done.set_exception(error)

    done.set_running_or_notify_cancel()
    begin(work)
    return await asyncio.wrap_future(done)


def begin(call: Callable[[], object]) -> None:
    """Calls in a thread of its own, for which nobody waits."""
    threading.Thread(target=call, name="storage", daemon=True).start()

"""Ray's notice that its node will go away (a drained node, a spot instance) counts as SIGTERM.

Ray Train tells its workers (`ray.train.get_preemption_info`). A training in one process is none of them: it asks Ray's
control service itself, as Ray Serve does. A RayCluster of ours has one node, so whichever is drained is this one.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

from finetune_trainer.progress import say

INTERVAL = 5.0  # seconds between two looks; Ray Train's default
TIMEOUT = 5.0  # seconds for one


@contextlib.contextmanager
def heeded() -> Iterator[None]:
    """While inside, and where Ray started this process, a notice sends it SIGTERM, once."""
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        yield
        return
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(address, over), name="ray-notices", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join(2 * TIMEOUT)


def _watch(address: str, over: threading.Event) -> None:
    client = None
    while not over.wait(INTERVAL):
        # After the first wait, because this takes a second: a short training does without.
        from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled, without types

        # Whatever Ray says: a training must not end because nobody tells it about nodes.
        with contextlib.suppress(Exception):
            client = client or GcsClient(address=address)
            if client.get_draining_nodes(timeout=TIMEOUT) and not over.is_set():
                say("Ray drains this node: a checkpoint is saved, and training ends")
                os.kill(os.getpid(), signal.SIGTERM)
                return

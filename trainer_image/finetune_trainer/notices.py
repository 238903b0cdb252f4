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

INTERVAL = 5.0  # seconds between two looks; Ray Train's default
TIMEOUT = 5.0  # seconds for one


@contextlib.contextmanager
def heeded() -> Iterator[None]:
    """While inside, and where Ray started this process, a notice sends it SIGTERM, once."""
    address, over = os.environ.get("RAY_ADDRESS"), threading.Event()
    watcher = threading.Thread(target=_watch, args=(address, over), name="ray-notices", daemon=True)
    if address:
        watcher.start()
    try:
        yield
    finally:
        over.set()
        if address:
            watcher.join(2 * TIMEOUT)


def _watch(address: str, over: threading.Event) -> None:
    if over.wait(INTERVAL):  # before the import, which takes a second: a short training does without
        return
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled, without types

    client = None
    while not over.is_set():
        # Whatever Ray says: a training must not end because nobody tells it about nodes.
        with contextlib.suppress(Exception):
            client = client or GcsClient(address=address)
            if client.get_draining_nodes(timeout=TIMEOUT) and not over.is_set():
                print("Ray drains this node: a checkpoint is saved, and training ends", flush=True)
                os.kill(os.getpid(), signal.SIGTERM)
                return
        over.wait(INTERVAL)

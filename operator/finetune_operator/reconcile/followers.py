"""Who waits for the artifact of which job, other jobs or deployments, so that its end wakes them at once."""

from __future__ import annotations

from collections.abc import Callable, Collection

from finetune_operator.reconcile.queue import Key


def _nobody(key: Key) -> None:
    del key


class Followers:
    """`wake` asks for a pass over one that waits; it is set once the queue exists. Kept in memory only: after a restart
    everyone is looked at, and says again for whom it waits."""

    def __init__(self) -> None:
        self.wake: Callable[[Key], None] = _nobody
        self._wanted: dict[Key, frozenset[Key]] = {}
        self._followers: dict[Key, set[Key]] = {}

    def follow(self, follower: Key, wanted: Collection[Key]) -> None:
        """It waits for these jobs, and for no others any more. To be called before they are looked at: what happens
        to them afterwards is told."""
        before, now = self._wanted.get(follower, frozenset()), frozenset(wanted)
        for upstream in before - now:
            self._followers[upstream].discard(follower)
            if not self._followers[upstream]:
                del self._followers[upstream]
        for upstream in now - before:
            self._followers.setdefault(upstream, set()).add(follower)
        if now:
            self._wanted[follower] = now
        else:
            self._wanted.pop(follower, None)

    def changed(self, upstream: Key) -> None:
        """A job was created, deleted, or is in another phase."""
        for follower in tuple(self._followers.get(upstream, ())):
            self.wake(follower)

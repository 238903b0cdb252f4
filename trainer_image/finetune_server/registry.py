"""Which adapters are loaded, who uses them, and which may go when another one needs the room."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

_numbers = itertools.count(1)


class AlreadyLoaded(Exception):  # noqa: N818  as the API reports it
    """An adapter of this name is loaded."""


class CapacityFull(Exception):  # noqa: N818  as the API reports it
    """Every place is taken by an adapter that somebody asked to keep, or that is answering."""


@dataclass(eq=False)
class LoadedAdapter:
    name: str
    path: str
    rank: int
    pinned: bool  # somebody asked to keep it
    template: str | None = None  # chat template that it was trained with
    created: int = field(default_factory=lambda: int(time.time()))
    key: str = field(default_factory=lambda: f"adapter-{next(_numbers)}")  # a name may come back, a key never
    users: int = 0
    last_used: float = field(default_factory=time.monotonic)
    retired: bool = False  # unloaded, but an answer still uses it


class Registry:
    """The engine's table of adapters; every method may be called from any thread."""

    def __init__(self, *, max_loras: int) -> None:
        self.max_loras = max_loras
        self._lock = threading.Lock()
        self._listed: dict[str, LoadedAdapter] = {}
        self._by_key: dict[str, LoadedAdapter] = {}
        self._base_names: frozenset[str] = frozenset()

    def set_base_names(self, names: frozenset[str]) -> None:
        self._base_names = names

    def listed(self) -> list[LoadedAdapter]:
        """Adapters that can be asked, in the order of their loading."""
        with self._lock:
            return list(self._listed.values())

    def is_base(self, name: str) -> bool:
        return name in self._base_names

    def knows(self, name: str) -> bool:
        with self._lock:
            return name in self._listed or name in self._base_names

    def template(self, name: str) -> str | None:
        """Returns the adapter's own chat template; None for the base model and for adapters without one."""
        with self._lock:
            loaded = self._listed.get(name)
        return None if loaded is None else loaded.template

    def acquire(self, models: Iterable[str]) -> list[str | None]:
        """Counts one more user of each; returns the keys of their weights, None for the base.

        All or none: Raises KeyError, and then nobody is a user. An unload may come between two requests, never within.
        """
        with self._lock:
            found = [None if model in self._base_names else self._listed[model] for model in models]
            for loaded in found:
                if loaded is not None:
                    loaded.users += 1
                    loaded.last_used = time.monotonic()
            return [None if loaded is None else loaded.key for loaded in found]

    def release(self, key: str | None) -> str | None:
        """Counts one user less; returns the key when its weights are to be removed now."""
        if key is None:
            return None
        with self._lock:
            loaded = self._by_key[key]
            loaded.users -= 1
            return self._forget(loaded) if loaded.retired else None

    def retire(self, name: str) -> str | None:
        """Takes a name from the list; returns the key when its weights are to be removed now. Raises KeyError."""
        with self._lock:
            loaded = self._listed.pop(name)
            loaded.retired = True
            return self._forget(loaded)

    def check_room(self, name: str) -> None:
        """Raises AlreadyLoaded or CapacityFull."""
        with self._lock:
            self._find_victim(name)

    def make_room(self, name: str) -> LoadedAdapter | None:
        """Forgets the adapter that was unused for longest, if a place is needed; returns it.

        Raises AlreadyLoaded or CapacityFull.
        """
        with self._lock:
            victim = self._find_victim(name)
            if victim is not None:
                del self._listed[victim.name]
                del self._by_key[victim.key]
            return victim

    def insert(self, loaded: LoadedAdapter) -> None:
        with self._lock:
            self._listed[loaded.name] = self._by_key[loaded.key] = loaded

    def _find_victim(self, name: str) -> LoadedAdapter | None:
        if name in self._listed or name in self._base_names:
            raise AlreadyLoaded(name)
        if len(self._by_key) < self.max_loras:
            return None
        idle = [one for one in self._listed.values() if not one.pinned and not one.users]
        if not idle:
            raise CapacityFull(
                f"all {self.max_loras} places for adapters are taken "
                f"({', '.join(one.name for one in self._by_key.values())}); unload one, or raise --max-loras"
            )
        return min(idle, key=lambda one: one.last_used)

    def _forget(self, loaded: LoadedAdapter) -> str | None:
        if loaded.users:
            return None
        del self._by_key[loaded.key]
        return loaded.key

"""How often somebody may do something: token buckets."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rate:
    """So many at once, and then so many per second."""

    burst: int
    per_second: float


@dataclass
class Limiter:
    """A bucket per key. Keys that were quiet until their buckets are full again are forgotten: memory follows those
    that talk, not those that ever did. Above `keys` of them those go that were quiet for longest."""

    rate: Rate
    keys: int = 20_000
    _buckets: OrderedDict[Hashable, tuple[float, float]] = field(default_factory=OrderedDict)

    def take(self, key: Hashable, *, now: float) -> float:
        """0 and one token less; where none is left, the seconds until there is one, and nothing taken."""
        tokens, since = self._buckets.pop(key, (float(self.rate.burst), now))
        tokens = min(float(self.rate.burst), tokens + (now - since) * self.rate.per_second)
        wait = 0.0 if tokens >= 1.0 else (1.0 - tokens) / self.rate.per_second
        self._buckets[key] = (tokens if wait else tokens - 1.0, now)
        full = now - self.rate.burst / self.rate.per_second
        while len(self._buckets) > self.keys or next(iter(self._buckets.values()))[1] < full:
            self._buckets.popitem(last=False)
        return wait

"""Whose engines answer requests for a base model's own name.

Agents say what their engines serve, and any namespace may have engines: a name alone proves nothing. Requests for it
go to the operator's default engine where that serves it, else to the engines of one namespace: the one that had the
name first, as long as a deployment of it has the name. Engines of two parties never share one name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from finetune_operator.api.routes import Snapshot
from finetune_operator.core.rollout_facts import EngineFacts
from finetune_operator.reconcile.aliases import Claim
from finetune_operator.reconcile.queue import Key


@dataclass(frozen=True)
class Base:
    """A base model of a deployment, and the engines that serve it under this name."""

    name: str
    upstreams: tuple[str, ...] = ()


def base_of(name: str, engines: Iterable[EngineFacts], snapshot: Snapshot) -> Base:
    """The engines that serve the base model under the name that spec has for it. An agent that does not answer is no
    proof that its engine is gone, so what is published for it stays."""
    published = {url for base in snapshot.base_models if base.name == name for url in base.upstreams}
    urls = [
        engine.url
        for engine in engines
        if (engine.ready and name in engine.base_models if engine.reachable else engine.url in published)
    ]
    return Base(name, tuple(sorted(urls)))


class BaseNames:
    """Remembers who asked for which base model, and which namespace has each name."""

    def __init__(self) -> None:
        self._claims: dict[Key, Claim] = {}
        self._holders: dict[str, str] = {}

    def claim(self, claim: Claim) -> None:
        self._claims[claim.key] = claim

    def release(self, key: Key) -> None:
        self._claims.pop(key, None)

    def published(
        self,
        bases: Mapping[Key, Base],
        *,
        inherited: Mapping[str, tuple[str, ...]],
        silent: Callable[[Key], bool],
    ) -> dict[str, set[str]]:
        """Name -> engines. `inherited` is what was published before this operator started, which stays until those
        are heard that are still `silent`. What is published settles which namespace has a name, so all that want it
        must have been told of before."""
        self._settle()
        names = {base.name for base in bases.values()} | inherited.keys()
        found = {name: self._winners(name, bases, silent) for name in names}
        return {
            name: {*inherited.get(name, ()), *(url for key in keys for url in bases[key].upstreams)}
            for name, keys in found.items()
        }

    def owner_of(self, name: str, bases: Mapping[Key, Base]) -> Key | None:
        """A deployment whose engines answer for the name, as it was settled."""
        return min(self._winners(name, bases, lambda key: False), default=None)

    def answered_by(self, claim: Claim, bases: Mapping[Key, Base]) -> str | None:
        """Whose engines answer for the base model of a deployment, where they are not its own, as it was settled."""
        winners = self._winners(claim.base, bases, lambda key: False)
        if not winners or claim.key in winners:
            return None
        by_default = self._claims[winners[0]].is_served_by_default
        return "the operator's default engine" if by_default else f"the engines of namespace {winners[0][0]}"

    def _winners(self, name: str, bases: Mapping[Key, Base], silent: Callable[[Key], bool]) -> list[Key]:
        """Deployments whose engines count."""
        asking = [claim for claim in self._claims.values() if claim.base == name]
        by_default = [claim for claim in asking if claim.is_served_by_default]
        served = [c.key for c in by_default if c.key in bases and bases[c.key].upstreams]
        if served or any(silent(claim.key) for claim in by_default):
            return [key for key in served if bases[key].name == name]
        holder = self._holders.get(name)
        return [c.key for c in asking if c.key[0] == holder and c.key in bases and bases[c.key].name == name]

    def _settle(self) -> None:
        """Who came first has a name, and keeps it for as long as a deployment of that namespace asks for it."""
        asking: dict[str, list[str]] = {}
        for claim in sorted(self._claims.values(), key=lambda c: (c.created, c.key)):
            if not claim.is_served_by_default:
                asking.setdefault(claim.base, []).append(claim.key[0])
        self._holders = {
            name: self._holders[name] if self._holders.get(name) in namespaces else namespaces[0]
            for name, namespaces in asking.items()
        }

"""Which deployment owns which alias. Clients know one alias, so two deployments cannot share it."""

from __future__ import annotations

from dataclasses import dataclass

from finetune_operator.reconcile.queue import Key


@dataclass(frozen=True)
class Claim:
    """A deployment that wants an alias."""

    key: Key
    uid: str
    created: str
    """metadata.creationTimestamp, which sorts by time."""
    alias: str
    base: str = ""
    """Name of its base model."""
    is_served_by_default: bool = False
    """Whether spec names no engines of its own, so that the operator's default engine serves it."""

    @property
    def owner(self) -> str:
        """As routes name their owner."""
        return f"{self.key[0]}/{self.key[1]}/{self.uid}"


def key_of(owner: str) -> Key:
    """The deployment that a route's owner names. Raises ValueError for anything else."""
    namespace, name, _ = owner.split("/")
    return namespace, name


class Aliases:
    """Whoever has an alias keeps it until it is gone; among newcomers the older one gets it."""

    def __init__(self) -> None:
        self._claims: dict[Key, Claim] = {}
        self._holders: dict[str, Key] = {}

    def claim(self, claim: Claim) -> Key | None:
        """Note that a deployment wants its alias. Returns who has it, when that is another deployment."""
        before = self._claims.get(claim.key)
        # Made anew under its old name, with another alias.
        if before is not None and before.alias != claim.alias:
            self.release(claim.key)
        self._claims[claim.key] = claim
        holder = self._holders.setdefault(claim.alias, claim.key)
        return None if holder == claim.key else holder

    def claim_all(self, claims: list[Claim], *, holders: dict[str, Key]) -> None:
        """Begin with all deployments that there are. `holders` had their aliases before."""
        for claim in sorted(claims, key=lambda c: (holders.get(c.alias) != c.key, c.created, c.key)):
            self.claim(claim)

    def release(self, key: Key) -> list[Key]:
        """Forget a deployment. Returns who wants the alias that it had: the oldest of them has it now."""
        claim = self._claims.pop(key, None)
        if claim is None or self._holders.get(claim.alias) != key:
            return []
        del self._holders[claim.alias]
        waiting = sorted(
            (c for c in self._claims.values() if c.alias == claim.alias), key=lambda c: (c.created, c.key)
        )
        for other in waiting[:1]:
            self._holders[claim.alias] = other.key
        return [other.key for other in waiting]

    def holder(self, alias: str) -> Key | None:
        return self._holders.get(alias)

    def is_claimed(self, alias: str) -> bool:
        return alias in self._holders

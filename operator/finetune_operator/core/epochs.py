"""What each life of each router process told last: the memory that turns cumulative counters into gains."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from finetune_operator.api.routes import Arm
from finetune_operator.core import tallies
from finetune_operator.core.tallies import Tally

MAX_EPOCHS = 200  # remembered in full
MAX_NUMBERS = 50_000  # of these epochs together; about 400 kB, and the evidence has to fit into a ConfigMap
MAX_RETIRED = 1500  # remembered by a fingerprint of their last word
MAX_INSTANCES = 500
# Answers with growing but too small counts after which they are believed to begin anew, and not to be late.
RESET_SIGHTINGS = 3

Arms = Mapping[Arm, Tally]


@dataclass(frozen=True)
class Told:
    """One epoch's last word."""

    arms: Arms
    behind: Arms | None = None
    """Counts below `arms` that were told afterwards: a late answer, or a counter that began anew."""
    sightings: int = 0
    """How often those have grown since."""


@dataclass(frozen=True)
class Epochs:
    """All epochs of a rollout; the one that has not changed for the longest time is first."""

    told: Mapping[str, Told] = field(default_factory=dict)
    """By short name."""
    retired: Mapping[str, str] = field(default_factory=dict)
    """Short name -> fingerprint of the last word, where there was no room for the word itself. While it stays the
    same there is no gain; when it changes, the gain is unknown and given up."""
    instances: tuple[str, ...] = ()
    """Short names of routers that were heard in this rollout."""
    forgetful: bool = False
    """Whether even fingerprints were given up. From then on an unknown epoch might be an old one."""

    def knows_instance(self, instance: str) -> bool:
        return short_name(instance) in self.instances

    def with_instance(self, instance: str) -> Epochs:
        if self.knows_instance(instance):
            return self
        return replace(self, instances=(*self.instances, short_name(instance))[-MAX_INSTANCES:])

    def after(self, epoch: str, arms: Arms, *, counts_from_zero: bool) -> tuple[Epochs, Arms]:
        """The memory after an epoch's answer, and what that answer has more than the one before.

        An epoch that is heard for the first time counts from zero where its router was heard before (a worker
        restarted); otherwise its counters may be older than the rollout, and are only its starting line.
        """
        name = short_name(epoch)
        old = self.told.get(name)
        if old is None:
            if not arms or self.retired.get(name) == fingerprint(arms):
                return self, {}
            from_zero = counts_from_zero and not self.forgetful and name not in self.retired
            retired = {other: mark for other, mark in self.retired.items() if other != name}
            known = replace(self, told={**self.told, name: Told(arms)}, retired=retired)
            return known, (arms if from_zero else {})
        now, gain = _advanced(old, arms)
        others = self.told
        if now.arms != old.arms:  # to the end: it has just changed
            others = {other: told for other, told in self.told.items() if other != name}
        return replace(self, told={**others, name: now}), gain

    def pruned(self) -> Epochs:
        """Without the last words of epochs that did not change for the longest time, where there are too many."""
        names = list(self.told)
        excess = len(names) - self._latest_that_fit()
        if excess <= 0:
            return self
        retired = {**self.retired, **{name: fingerprint(self.told[name].arms) for name in names[:excess]}}
        return replace(
            self,
            told={name: self.told[name] for name in names[excess:]},
            retired=dict(list(retired.items())[-MAX_RETIRED:]),
            forgetful=self.forgetful or len(retired) > MAX_RETIRED,
        )

    def _latest_that_fit(self) -> int:
        numbers = 0
        for kept, told in enumerate(reversed(list(self.told.values()))):
            numbers += sum(len(tally) for arms in (told.arms, told.behind or {}) for tally in arms.values())
            if kept == MAX_EPOCHS or numbers > MAX_NUMBERS:
                return kept
        return len(self.told)


def short_name(name: str) -> str:
    """Eight hexadecimal digits for a name of any length."""
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def fingerprint(arms: Arms) -> str:
    """Eight hexadecimal digits for an epoch's counters."""
    return short_name(repr(sorted((arm.value, sorted(tally.items())) for arm, tally in arms.items())))


def _advanced(old: Told, new: Arms) -> tuple[Told, Arms]:
    """An epoch's memory after another answer, and the gain. An arm that is not told of has not changed."""
    arms = {**old.arms, **new}
    if not _any_shrunk(arms, old.arms):
        return Told(arms), {
            arm: tallies.subtract(tally, old.arms.get(arm, {})) for arm, tally in arms.items()
        }
    if old.behind == new:  # the same late answer once more
        return old, {}
    grows = old.behind is not None and not _any_shrunk(new, old.behind)
    sightings = old.sightings + 1 if grows else 1
    if sightings < RESET_SIGHTINGS:
        return Told(old.arms, behind=new, sightings=sightings), {}
    return Told(new), new


def _any_shrunk(new: Arms, old: Arms) -> bool:
    return any(tallies.has_shrunk(new.get(arm, {}), tally) for arm, tally in old.items())

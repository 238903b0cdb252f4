"""What each life of each router process told last: the memory that turns cumulative counters into gains."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from finetune_operator.api.routes import Arm
from finetune_operator.core import tallies
from finetune_operator.core.tallies import Tally

MAX_EPOCHS = 200  # remembered in full; the evidence has to fit into a ConfigMap
MAX_RETIRED = 2000  # remembered by name only
MAX_INSTANCES = 500
# Answers with growing but too small counts after which they are believed to begin anew, and not to be late.
RESET_SIGHTINGS = 3


@dataclass(frozen=True)
class Told:
    """One epoch's last word."""

    arms: Mapping[Arm, Tally]
    weight: float
    """Weight in force then."""
    behind: Mapping[Arm, Tally] | None = None
    """Counts below `arms` that were told afterwards: a late answer, or a counter that began anew."""
    sightings: int = 0
    """How often those have grown since."""


@dataclass(frozen=True)
class Epochs:
    """All epochs of a comparison; the one that has not changed for the longest time is first."""

    told: Mapping[str, Told] = field(default_factory=dict)
    """By short name."""
    retired: tuple[str, ...] = ()
    """Short names of epochs whose last word was given up; they are told by their names, and their gains are lost."""
    instances: tuple[str, ...] = ()
    """Short names of routers that were heard in this comparison."""
    forgetful: bool = False
    """Whether even names were given up. From then on an unknown epoch might be an old one."""

    def knows_instance(self, instance: str) -> bool:
        return short_name(instance) in self.instances

    def with_instance(self, instance: str) -> Epochs:
        if self.knows_instance(instance):
            return self
        return replace(self, instances=(*self.instances, short_name(instance))[-MAX_INSTANCES:])

    def weight_of(self, epoch: str, *, default: float) -> float:
        """Weight that was in force when the epoch was last heard."""
        told = self.told.get(short_name(epoch))
        return told.weight if told else default

    def after(self, epoch: str, new: Told, *, counts_from_zero: bool) -> tuple[Epochs, Mapping[Arm, Tally]]:
        """The memory after an epoch's answer, and what that answer has more than the one before.

        An epoch that is heard for the first time counts from zero where its router was heard before (a worker
        restarted); otherwise its counters may be older than the comparison, and are only its starting line.
        """
        name = short_name(epoch)
        old = self.told.get(name)
        if old is None:
            from_zero = counts_from_zero and not self.forgetful and name not in self.retired
            retired = tuple(other for other in self.retired if other != name)
            return replace(self, told={**self.told, name: new}, retired=retired), (
                new.arms if from_zero else {}
            )
        now, gain = _advanced(old, new)
        others = self.told
        if now.arms != old.arms:  # to the end: it has just changed
            others = {other: told for other, told in self.told.items() if other != name}
        return replace(self, told={**others, name: now}), gain

    def pruned(self) -> Epochs:
        """Without the last words of epochs that did not change for the longest time, where there are too many."""
        excess = len(self.told) - MAX_EPOCHS
        if excess <= 0:
            return self
        names = list(self.told)
        retired = (*self.retired, *names[:excess])
        return replace(
            self,
            told={name: self.told[name] for name in names[excess:]},
            retired=retired[-MAX_RETIRED:],
            forgetful=self.forgetful or len(retired) > MAX_RETIRED,
        )


def short_name(name: str) -> str:
    """Eight hexadecimal digits for a name of any length."""
    return hashlib.sha256(name.encode()).hexdigest()[:8]


def _advanced(old: Told, new: Told) -> tuple[Told, Mapping[Arm, Tally]]:
    """An epoch's memory after another answer, and the gain. An arm that is not told of has not changed."""
    arms = {**old.arms, **new.arms}
    if not _any_shrunk(arms, old.arms):
        gain = {arm: tallies.subtract(tally, old.arms.get(arm, {})) for arm, tally in arms.items()}
        return Told(arms, new.weight), gain
    if old.behind == new.arms:  # the same late answer once more
        return replace(old, weight=new.weight), {}
    grows = old.behind is not None and not _any_shrunk(new.arms, old.behind)
    sightings = old.sightings + 1 if grows else 1
    if sightings < RESET_SIGHTINGS:
        return Told(old.arms, new.weight, behind=new.arms, sightings=sightings), {}
    return Told(new.arms, new.weight), new.arms


def _any_shrunk(new: Mapping[Arm, Tally], old: Mapping[Arm, Tally]) -> bool:
    return any(tallies.has_shrunk(new.get(arm, {}), tally) for arm, tally in old.items())

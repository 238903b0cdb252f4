"""Whether a fine-tuning fits into a GPU: yes, perhaps, or certainly not, with the numbers and a way out."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from finetune_fit.architectures import Architecture
from finetune_fit.memory import GIB, Estimate, Option, Workload, estimate, options

MARGIN = 0.9  # of the memory: an estimate below that is taken for fitting
MAY_RUN_OUT = "may run out of memory"
NAMED = 2  # ways out that a message names


class Fit(StrEnum):
    FITS = "Fits"
    TIGHT = "Tight"  # within a tenth of what there is, or above it by estimated parts: it may run out
    TOO_LARGE = "TooLarge"  # what is counted, not estimated, is more than there is
    UNKNOWN = "Unknown"  # the memory is not known


@dataclass(frozen=True)
class Verdict:
    fit: Fit
    estimate: Estimate
    capacity: int | None
    """Bytes of the GPU; None: not known."""
    ways: tuple[Option, ...]
    """What would fit, the least change first; empty where it fits already or nothing would."""
    message: str


def judge(model: Architecture, work: Workload, *, capacity: int | None, device: str) -> Verdict:
    """Compare what training needs with `capacity` bytes of `device` (a name for people)."""
    needed = estimate(model, work)
    if capacity is None:
        text = f"needs about {gib(needed.total)}; the memory of {device} is not known"
        return Verdict(Fit.UNKNOWN, needed, None, (), text)
    there = f"{device} has {gib(capacity)}"
    if needed.total <= MARGIN * capacity:
        return Verdict(Fit.FITS, needed, capacity, (), f"needs about {gib(needed.total)}; {there}")
    ways = tuple(option for option in options(model, work) if option.estimate.total <= MARGIN * capacity)
    if needed.certain + needed.overhead > capacity:
        counted = f"weights, gradients and optimizer states alone need {gib(needed.certain)}"
        return Verdict(Fit.TOO_LARGE, needed, capacity, ways, f"{counted}, and {there}{_way_out(ways)}")
    text = f"needs about {gib(needed.total)} ({breakdown(needed)}), and {there}{_way_out(ways)}"
    return Verdict(Fit.TIGHT, needed, capacity, ways, text)


def _way_out(ways: tuple[Option, ...]) -> str:
    if not ways:
        return "; no other method or batch fits either: use a GPU with more memory or a smaller model"
    return "; " + "; ".join(f"{way.name} would need {gib(way.estimate.total)}" for way in ways[:NAMED])


def breakdown(needed: Estimate) -> str:
    """The parts in words, the largest first; those below a hundredth are left out."""
    parts = sorted(needed.parts().items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {gib(size)}" for name, size in parts if size >= needed.total / 100)


def gib(size: float) -> str:
    """Bytes for people, for example 7.4 GiB."""
    if size < GIB / 10:
        return f"{size / 2**20:.0f} MiB"
    return f"{size / GIB:.1f} GiB"

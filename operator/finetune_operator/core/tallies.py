"""What the routers count, as flat tallies of numbers that can be added, subtracted and stored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from finetune_operator.api import routes
from finetune_operator.core.sequences import Moments

# Names: `requests`, `fallbacks`, `events/<signal>`, `watched/<signal>` (requests of which it is known whether they have
# it), `lengths/<bin>`, `words/<bin>`, and for each quantity `<quantity>/n`, `<quantity>/sum`, `<quantity>/squares`,
# and, of each group of keys, `<quantity>/<group>/n` and `<quantity>/<group>/sum`. A quantity is `seconds`,
# `ttft_seconds`, `completion_tokens` or `scores/<metric>`.
Tally = Mapping[str, float]

REQUESTS = "requests"
# Sums are rounded on their way in, so that differences of what was stored add up to the very total.
SUM_DIGITS = 10
SIGNED = ("/sum", "/squares")  # may shrink: a later feedback value replaces the former


WATCHED = "watched/"
BY_SIGNAL = ("events/", WATCHED)
# What longer answers have more of, or other than short ones.
BY_LENGTH = ("lengths/", "words/", "seconds/", "ttft_seconds/", "completion_tokens/")


def event(signal: str) -> str:
    """Where answers that had the signal are counted."""
    return f"events/{signal}"


def watched(signal: str) -> str:
    """Where requests are counted of which it is known whether they have the signal."""
    return f"{WATCHED}{signal}"


def tally_of(arm: routes.ArmCounters) -> dict[str, float]:
    """The arm's counters as a tally; zeros are left out."""
    numbers: dict[str, float] = {REQUESTS: arm.requests, "fallbacks": arm.fallbacks}
    numbers.update({event(name): count for name, count in arm.events.items()})
    numbers.update({watched(name): count for name, count in arm.watched.items()})
    numbers.update({f"lengths/{index}": count for index, count in enumerate(arm.length_histogram)})
    numbers.update({f"words/{index}": count for index, count in enumerate(arm.word_histogram)})
    quantities = {
        "seconds": arm.seconds,
        "ttft_seconds": arm.ttft_seconds,
        "completion_tokens": arm.completion_tokens,
        **{f"scores/{metric}": moments for metric, moments in arm.scores.items()},
    }
    for name, moments in quantities.items():
        numbers[f"{name}/n"] = moments.n
        numbers[f"{name}/sum"] = _rounded(moments.sum)
        numbers[f"{name}/squares"] = _rounded(moments.sum_squares)
        for group, (n, total) in enumerate(moments.groups):
            numbers[f"{name}/{group}/n"] = n
            numbers[f"{name}/{group}/sum"] = _rounded(total)
    return {name: number for name, number in numbers.items() if number}


def add(first: Tally, second: Tally) -> dict[str, float]:
    """Sum by name."""
    return _kept({name: first.get(name, 0) + second.get(name, 0) for name in first.keys() | second.keys()})


def subtract(new: Tally, old: Tally) -> dict[str, float]:
    """What `new` has more than `old`, by name; negative where it has less."""
    return _kept({name: new.get(name, 0) - old.get(name, 0) for name in new.keys() | old.keys()})


def add_all(tallies: Iterable[Tally]) -> dict[str, float]:
    """Sum of all, by name."""
    total: dict[str, float] = {}
    for tally in tallies:
        total = add(total, tally)
    return total


def has_shrunk(new: Tally, old: Tally) -> bool:
    """Whether a count is smaller than before, which no count does within one life of a process."""
    return any(new.get(name, 0) < count for name, count in old.items() if not name.endswith(SIGNED))


def moments(tally: Tally, quantity: str) -> Moments:
    """Moments of `seconds`, `ttft_seconds`, `completion_tokens` or `scores/<metric>`."""
    return Moments(
        n=int(tally.get(f"{quantity}/n", 0)),
        total=tally.get(f"{quantity}/sum", 0.0),
        squares=tally.get(f"{quantity}/squares", 0.0),
        groups=tuple(
            (int(tally.get(f"{quantity}/{group}/n", 0)), tally.get(f"{quantity}/{group}/sum", 0.0))
            for group in range(routes.GROUPS)
        ),
    )


def count(tally: Tally, name: str) -> int:
    return int(tally.get(name, 0))


def lengths(tally: Tally) -> Sequence[int]:
    """Responses by length, `routes.LENGTH_BINS` bins."""
    return [count(tally, f"lengths/{index}") for index in range(routes.LENGTH_BINS)]


def words(tally: Tally) -> Sequence[int]:
    """First words of the responses by hash, `routes.WORD_BINS` bins."""
    return [count(tally, f"words/{index}") for index in range(routes.WORD_BINS)]


def _rounded(number: float) -> float:
    return float(f"{number:.{SUM_DIGITS}g}")


def _kept(numbers: Mapping[str, float]) -> dict[str, float]:
    """Without zeros, in the order of names: equal tallies look equal when stored."""
    return {name: numbers[name] for name in sorted(numbers) if numbers[name]}

"""Seeded traffic for the calibration tests: requests of users, their arms, their failures, and polls of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from finetune_operator.core.eprocesses import BLOCK_REQUESTS, HarmProcess

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
Batch = tuple[int, int, int, int]
"""Of one poll: stable requests, candidate requests, stable failures, candidate failures."""


@dataclass(frozen=True)
class Requests:
    """Of one rollout, in the order in which they came."""

    candidate: Flags
    failed: Flags
    weights: Floats
    """Share that was in force, 0 to 1."""


def zipf_requests(
    rng: np.random.Generator,
    *,
    requests: int,
    users: int,
    weights: Sequence[float],
    rates: Floats | float = 0.05,
    exponent: float = 1.2,
    relative_risk: float = 1.0,
    spread: float | None = None,
) -> Requests:
    """Sticky traffic of users who ask with Zipf frequencies (exponent 0: equally often).

    `weights` hold for equal parts of the rollout; `rates` are per request; `spread` gives each user a failure rate of
    their own, Beta distributed about the rate with this concentration.
    """
    frequencies = 1.0 / np.arange(1, users + 1) ** exponent
    who = rng.choice(users, requests, p=frequencies / frequencies.sum())
    in_force = np.repeat(np.asarray(weights, float), math.ceil(requests / len(weights)))[:requests]
    candidate = rng.random(users)[who] >= 1.0 - in_force
    risk = np.broadcast_to(np.asarray(rates, float), requests)
    if spread is not None:
        base = float(np.mean(risk))
        risk = rng.beta(base * spread, (1.0 - base) * spread, users)[who]
    risk = np.where(candidate, np.minimum(risk * relative_risk, 1.0), risk)
    return Requests(candidate, rng.random(requests) < risk, in_force)


def polls(traffic: Requests, *, every: int) -> list[Batch]:
    """What polls after each `every` requests tell."""
    whole = len(traffic.candidate) // every * every
    candidate = traffic.candidate[:whole].reshape(-1, every)
    failed = traffic.failed[:whole].reshape(-1, every)
    candidates, failures = candidate.sum(1), (candidate & failed).sum(1)
    columns = (every - candidates, candidates, failed.sum(1) - failures, failures)
    return [(a, b, c, d) for a, b, c, d in np.stack(columns, 1).tolist()]


def disturb(rng: np.random.Generator, batches: Sequence[Batch]) -> list[Batch]:
    """The batches as they arrive when one in twenty is lost with its router, and one in ten comes with the next."""
    arrived: list[Batch] = []
    carried: Batch = (0, 0, 0, 0)
    for batch, fate in zip(batches, rng.random(len(batches)).tolist(), strict=True):
        if fate < 0.05:
            continue
        carried = (
            carried[0] + batch[0], carried[1] + batch[1], carried[2] + batch[2], carried[3] + batch[3],
        )  # fmt: skip
        if fate >= 0.15:
            arrived.append(carried)
            carried = (0, 0, 0, 0)
    return arrived


def random_batches(
    rng: np.random.Generator,
    *,
    polls: int,
    requests_per_poll: float,
    weight: float,
    stable_rate: float,
    candidate_rate: float,
) -> Iterable[Batch]:
    """Polls of independent requests, Poisson many in each."""
    requests = rng.poisson(requests_per_poll, polls)
    candidates = rng.binomial(requests, weight)
    stables = requests - candidates
    columns = (
        stables, candidates, rng.binomial(stables, stable_rate), rng.binomial(candidates, candidate_rate),
    )  # fmt: skip
    return [(a, b, c, d) for a, b, c, d in np.stack(columns, 1).tolist()]


def unhurried_polls(
    rng: np.random.Generator,
    *,
    spans: Sequence[tuple[float, int]],
    requests_per_poll: int,
    answer_polls: float,
    failure_polls: float,
    rate: float,
) -> list[tuple[float, Batch]]:
    """What polls tell of requests that are counted when they end, with the weight in force: answers take `answer_polls`
    polls on average and failures `failure_polls`. `spans` are weights, and for how many polls each is in force."""
    weights = np.repeat([weight for weight, _ in spans], [polls for _, polls in spans])
    begun = np.sort(rng.random(requests_per_poll * len(weights)) * len(weights))
    candidate = rng.random(len(begun)) < weights[begun.astype(int)]
    failed = rng.random(len(begun)) < rate
    durations = rng.lognormal(math.log(answer_polls) - 0.125, 0.5, len(begun))
    ended = (begun + np.where(failed, failure_polls, durations)).astype(int)

    def told(which: Flags) -> list[int]:
        counts: list[int] = np.bincount(ended[which], minlength=len(weights))[: len(weights)].tolist()
        return counts

    columns = (
        told(~candidate), told(candidate), told(~candidate & failed), told(candidate & failed),
    )  # fmt: skip
    return list(zip(weights.tolist(), zip(*columns, strict=True), strict=True))


def watch(batches: Iterable[Batch], *, log_needed: float = math.inf) -> tuple[HarmProcess, int, int]:
    """The guardrail after the batches, or at the poll that proves harm; and the requests of both arms, and of the
    candidate, by then."""
    process = HarmProcess()
    stables = candidates = stable_failures = failures = total = exposed = 0
    for batch in batches:
        stables, candidates = stables + batch[0], candidates + batch[1]
        stable_failures, failures = stable_failures + batch[2], failures + batch[3]
        total, exposed = total + batch[0] + batch[1], exposed + batch[1]
        requests = stables + candidates
        if requests >= BLOCK_REQUESTS:
            process = process.after(
                failures=stable_failures + failures, exposed_failures=failures, share=candidates / requests
            )
            stables = candidates = stable_failures = failures = 0
            if process.log_peak >= log_needed:
                break
    return process, total, exposed

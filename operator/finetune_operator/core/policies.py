"""Class of failure -> what follows: another attempt, out of which budget, with what changed, and after how long.

Pure, and a function of what is stored only: whoever asks twice gets the same answer, to the second.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum

from finetune_fit import runs
from finetune_operator.api.finetunejob import (
    INFRASTRUCTURE,
    UNLIMITED,
    BackoffSpec,
    ErrorClass,
    FineTuneJobSpec,
    FineTuneJobStatus,
    OutOfMemoryPolicy,
    Overrides,
    Retries,
)

MEMORY_FACTOR = 2
CHECK = 0  # the number of the attempt that only checks


class Budget(StrEnum):
    """What an attempt that follows on a class of failure is charged to."""

    NONE = "none"  # never followed by another attempt
    FREE = "free"  # always followed by one
    NEXT = "next"  # it was only the check before the first one
    USER = "user"
    INFRASTRUCTURE = "infrastructure"
    PREEMPTION = "preemption"
    GPU_MEMORY = "gpu memory"  # as long as the batch can be halved
    HOST_MEMORY = "host memory"  # once


BUDGETS = {
    ErrorClass.SUCCEEDED: Budget.NONE,
    ErrorClass.CHECKED: Budget.NEXT,
    ErrorClass.BAD_CONFIG: Budget.USER,
    ErrorClass.BAD_DATA: Budget.USER,
    ErrorClass.MODEL_NOT_FOUND: Budget.USER,
    ErrorClass.NOT_FINITE: Budget.USER,
    **dict.fromkeys(INFRASTRUCTURE, Budget.INFRASTRUCTURE),
    ErrorClass.PREEMPTED: Budget.PREEMPTION,
    ErrorClass.GPU_OUT_OF_MEMORY: Budget.GPU_MEMORY,
    ErrorClass.HOST_OUT_OF_MEMORY: Budget.HOST_MEMORY,
    ErrorClass.EVALUATION_GATE: Budget.NONE,
    ErrorClass.CANCELLED: Budget.NONE,
    ErrorClass.DEADLINE_EXCEEDED: Budget.NONE,
    ErrorClass.SUSPENDED: Budget.FREE,
}


# What a check finds wrong stays wrong, and one that was lost says nothing against training.
OF_A_CHECK = {
    Budget.USER: Budget.NONE,
    Budget.INFRASTRUCTURE: Budget.NEXT,
    Budget.PREEMPTION: Budget.NEXT,
}


@dataclass(frozen=True)
class Verdict:
    """What follows on an attempt."""

    retry: bool
    why: str
    """Which retry of how many it is, or why there is none; for people."""
    retries: Retries
    """The counts after it."""
    delay: float = 0.0
    """Seconds to the next attempt."""
    overrides: Overrides | None = None
    """What the next attempt is given instead of what the spec says."""


def judge(error_class: ErrorClass, *, spec: FineTuneJobSpec, status: FineTuneJobStatus, uid: str) -> Verdict:
    """What follows on the last attempt of `status`, which ended with this class."""
    retries = status.retries or Retries()
    attempt = status.attempts[-1]
    budget = BUDGETS[error_class]
    if attempt.number == CHECK:
        budget = OF_A_CHECK.get(budget, budget)
    match budget:
        case Budget.NONE:
            return Verdict(False, "", retries)
        case Budget.NEXT:
            return Verdict(True, "which asks for the GPU", retries)
        case Budget.FREE:
            why = "when spec.suspend is false; it costs no retry"
            return Verdict(True, why, retries, overrides=attempt.overrides)
        case Budget.GPU_MEMORY:
            return _with_half_the_batch(spec, status, retries)
        case Budget.HOST_MEMORY:
            return _with_more_memory(spec, status, retries)
        case Budget.USER:
            field, limit, used, name = "user", spec.retry.max_user_retries, retries.user, "maxUserRetries"
        case Budget.INFRASTRUCTURE:
            field, limit = "infrastructure", spec.retry.max_infra_retries
            used, name = retries.infrastructure, "maxInfraRetries"
        case Budget.PREEMPTION:
            field, used, name = "preemption", retries.preemption, "preemptions"
            limit = -1 if spec.retry.preemptions == UNLIMITED else int(spec.retry.preemptions)
    if 0 <= limit <= used:
        why = f"all retries are used (spec.retry.{name} is {limit})" if limit else ""
        return Verdict(False, why, retries)
    return Verdict(
        True,
        f"{field} retry {used + 1}" + (f" of {limit}" if limit >= 0 else ""),
        retries.model_copy(update={field: used + 1}),
        delay=backoff(spec.retry.backoff_seconds, retry=used + 1, uid=uid, attempt=attempt.number),
        overrides=attempt.overrides,
    )


def backoff(spec: BackoffSpec, *, retry: int, uid: str, attempt: int) -> float:
    """Seconds before the `retry`-th retry of a kind: doubled each time, with jitter on the upper half. The jitter
    follows from the job and the attempt, so a pass that is repeated comes to the same time."""
    ceiling = min(float(spec.max), spec.min * 2.0 ** min(retry - 1, 30))
    digest = hashlib.sha256(f"{uid}/{attempt}".encode()).digest()
    share = int.from_bytes(digest[:8]) / 2.0**64
    return ceiling * (0.5 + 0.5 * share)


def _with_half_the_batch(spec: FineTuneJobSpec, status: FineTuneJobStatus, retries: Retries) -> Verdict:
    if spec.retry.on_out_of_memory is OutOfMemoryPolicy.FAIL:
        return Verdict(False, "spec.retry.onOutOfMemory is Fail", retries)
    rows = micro_batch_size(spec, status)
    fewer = halved(rows, spec.hyperparameters.global_batch_size)
    if fewer is None:
        return Verdict(False, "it was trained with 1 row per forward pass already", retries)
    known = status.attempts[-1].overrides or Overrides()
    return Verdict(
        True,
        f"with {fewer} rows per forward pass instead of {rows}, globalBatchSize stays",
        retries,
        overrides=known.model_copy(update={"micro_batch_size": fewer}),
    )


def _with_more_memory(spec: FineTuneJobSpec, status: FineTuneJobStatus, retries: Retries) -> Verdict:
    if spec.retry.on_out_of_memory is OutOfMemoryPolicy.FAIL:
        return Verdict(False, "spec.retry.onOutOfMemory is Fail", retries)
    known = status.attempts[-1].overrides or Overrides()
    if known.memory is not None:
        return Verdict(False, f"it had {known.memory} already instead of {spec.resources.memory}", retries)
    more = grown(spec.resources.memory)
    return Verdict(
        True,
        f"with {more} of memory instead of {spec.resources.memory}",
        retries,
        overrides=known.model_copy(update={"memory": more}),
    )


def micro_batch_size(spec: FineTuneJobSpec, status: FineTuneJobStatus) -> int:
    """Rows per forward pass of the last attempt: as it was told to, as it reported, or as the trainer chooses."""
    overrides, effective = status.attempts[-1].overrides, status.effective
    if overrides and overrides.micro_batch_size:
        return overrides.micro_batch_size
    if spec.hyperparameters.micro_batch_size:
        return spec.hyperparameters.micro_batch_size
    if effective and effective.micro_batch_size:
        return effective.micro_batch_size
    return runs.micro_batch_size(spec.hyperparameters.global_batch_size)


def halved(rows: int, global_batch_size: int) -> int | None:
    """The largest divisor of the global batch that is at most half of `rows`; None where `rows` is 1."""
    return runs.micro_batch_size(global_batch_size, most=rows // 2) if rows > 1 else None


_PREFIXES = "kMGTPE"
_UNITS = {
    "": Decimal(1),
    "m": Decimal("0.001"),
    **{prefix: Decimal(1000) ** (power + 1) for power, prefix in enumerate(_PREFIXES)},
    **{f"{prefix.upper()}i": Decimal(1024) ** (power + 1) for power, prefix in enumerate(_PREFIXES)},
}


def grown(memory: str) -> str:
    """A quantity of memory times MEMORY_FACTOR, in whole Mi."""
    number = memory.rstrip("mkKMGTPEi")
    size = Decimal(number) * _UNITS[memory[len(number) :]] * MEMORY_FACTOR
    return f"{-(-int(size) // 2**20)}Mi"

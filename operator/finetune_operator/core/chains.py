"""Chains of jobs: the base model that another FineTuneJob makes."""

from __future__ import annotations

from dataclasses import dataclass

from finetune_operator.api.finetunejob import Phase
from finetune_operator.core.facts import UpstreamFacts


@dataclass(frozen=True)
class Ready:
    uri: str
    """Folder of the model."""


@dataclass(frozen=True)
class Waiting:
    reason: str
    message: str


@dataclass(frozen=True)
class Broken:
    """The model will never come."""

    reason: str
    message: str


def resolve(name: str, upstream: UpstreamFacts | None, *, wanted: str) -> Ready | Waiting | Broken:
    """What the job `name` can expect of the FineTuneJob `wanted` that its spec refers to."""
    field = "spec.model.fineTuneJobRef"
    if upstream is None or not upstream.exists:
        return Waiting(
            "FineTuneJobNotFound",
            f"{field}: there is no FineTuneJob {wanted} in this namespace; waits for it",
        )
    if name in upstream.waits_for:
        circle = " -> ".join((name, upstream.name, *upstream.waits_for))
        return Broken("ChainIsACircle", f"{field}: the jobs wait for one another: {circle}")
    match upstream.phase:
        case Phase.FAILED | Phase.CANCELLED:
            why = f" ({upstream.reason})" if upstream.reason else ""
            return Broken(
                "UpstreamFailed",
                f"{field}: FineTuneJob {wanted} ended {upstream.phase}{why}, so there is no model to train: "
                "create that job again, then this one",
            )
        case Phase.SUCCEEDED if upstream.artifact is not None:
            if upstream.artifact.rank is not None:
                return Broken(
                    "UpstreamIsAnAdapter",
                    f"{field}: FineTuneJob {wanted} left an adapter of rank {upstream.artifact.rank}, and a base model "
                    "must be whole: train it with method Full, then create this job again",
                )
            return Ready(upstream.artifact.uri)
        case _:
            return Waiting(
                "WaitingForModel",
                f"{field}: waits for FineTuneJob {wanted}, which is {upstream.phase or Phase.PENDING}",
            )

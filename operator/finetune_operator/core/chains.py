"""Chains of jobs: the model, the adapter and the reward model that other FineTuneJobs make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from finetune_operator.api.finetunejob import (
    Artifact,
    FineTuneJobSpec,
    MethodType,
    Objective,
    Phase,
    Upstream,
)
from finetune_operator.core.facts import UpstreamFacts

MODEL = "spec.model.fineTuneJobRef"
REWARD = "spec.reward.fineTuneJobRef"


@dataclass(frozen=True)
class Ready:
    """What the artifacts of others are to this job; None where the spec names no job for it."""

    model_uri: str | None = None
    """Base model: another job's artifact, or the model that its artifact is an adapter of."""
    adapter: Upstream | None = None
    reward: Upstream | None = None


@dataclass(frozen=True)
class Waiting:
    reason: str
    message: str
    is_polled: bool = False
    """Whether nothing tells when it comes."""


@dataclass(frozen=True)
class Broken:
    """What is waited for will never come, or is of no use here."""

    reason: str
    message: str


def settle(
    name: str,
    spec: FineTuneJobSpec,
    *,
    model: UpstreamFacts | None,
    reward: UpstreamFacts | None,
    scripts: Mapping[str, Sequence[str]],
) -> Ready | Waiting | Broken:
    """What the job `name` can expect of what its spec refers to: all is there, or the first thing missing.

    What will never come is told before what is waited for. `scripts` are the ConfigMaps that exist, with their keys.
    """
    answers: list[Artifact | Waiting | Broken] = []
    wanted = spec.model.fine_tune_job_ref
    if wanted is not None:
        found = _resolve(name, model, wanted=wanted.name, field=MODEL, what="model to train")
        answers.append(_refuse_as_model(spec, model, found) if isinstance(found, Artifact) else found)
    judge = spec.reward.fine_tune_job_ref if spec.reward else None
    if judge is not None:
        found = _resolve(name, reward, wanted=judge.name, field=REWARD, what="reward model")
        answers.append(_refuse_as_reward(reward, found) if isinstance(found, Artifact) else found)
    for kind in (Broken, Waiting):
        for answer in answers:
            if isinstance(answer, kind):
                return answer
    missing = _missing_script(spec, scripts)
    if missing is not None:
        return missing
    artifacts = [answer for answer in answers if isinstance(answer, Artifact)]
    ready = Ready() if wanted is None else _as_model(artifacts[0])
    return ready if judge is None else replace(ready, reward=_as_upstream(artifacts[-1]))


def _resolve(
    name: str, upstream: UpstreamFacts | None, *, wanted: str, field: str, what: str
) -> Artifact | Waiting | Broken:
    if upstream is None or not upstream.exists:
        return Waiting(
            "FineTuneJobNotFound",
            f"{field}: there is no FineTuneJob {wanted} in this namespace; waits for it",
        )
    if name in upstream.waits_for:
        path = upstream.waits_for[: list(upstream.waits_for).index(name) + 1]
        circle = " -> ".join((name, upstream.name, *path))
        return Broken("ChainIsACircle", f"{field}: the jobs wait for one another: {circle}")
    match upstream.phase:
        case Phase.FAILED | Phase.CANCELLED:
            why = f" ({upstream.reason})" if upstream.reason else ""
            return Broken(
                "UpstreamFailed",
                f"{field}: FineTuneJob {wanted} ended {upstream.phase}{why}, so there is no {what}: "
                "create that job again, then this one",
            )
        case Phase.SUCCEEDED if upstream.artifact is not None:
            return upstream.artifact
        case _:
            return Waiting(
                "WaitingForModel",
                f"{field}: waits for FineTuneJob {wanted}, which is {upstream.phase or Phase.PENDING}",
            )


def _refuse_as_model(
    spec: FineTuneJobSpec, upstream: UpstreamFacts | None, artifact: Artifact
) -> Artifact | Broken:
    name = upstream.name if upstream else ""
    scores = upstream is not None and upstream.objective == Objective.REWARD_MODEL
    if scores and spec.objective != Objective.REWARD_MODEL:
        return Broken(
            "UpstreamIsARewardModel",
            f"{MODEL}: FineTuneJob {name} left a reward model, which scores answers and writes none: refer to it in "
            f"spec.reward, and here to the job whose model is to learn by {spec.objective}",
        )
    if artifact.rank is not None and spec.method.type is MethodType.FULL:
        return Broken(
            "UpstreamIsAnAdapter",
            f"{MODEL}: FineTuneJob {name} left an adapter of rank {artifact.rank}, and method Full trains a whole "
            "model: use LoRA or QLoRA, which go on with the adapter, or train that job with method Full",
        )
    return artifact


def _refuse_as_reward(upstream: UpstreamFacts | None, artifact: Artifact) -> Artifact | Broken:
    if upstream is not None and upstream.objective not in (None, Objective.REWARD_MODEL):
        return Broken(
            "UpstreamIsNoRewardModel",
            f"{REWARD}: FineTuneJob {upstream.name} has objective {upstream.objective}, and only one of objective "
            "RewardModel leaves a model that scores answers: refer to such a job",
        )
    return artifact


def _as_model(artifact: Artifact) -> Ready:
    """An adapter is put on its own base model, so that what is trained fits the same base model in the end."""
    if artifact.rank is None:
        return Ready(model_uri=artifact.uri)
    return Ready(model_uri=artifact.base_model, adapter=_as_upstream(artifact))


def _as_upstream(artifact: Artifact) -> Upstream:
    base = None if artifact.rank is None else artifact.base_model
    return Upstream(uri=artifact.uri, digest=artifact.digest, base_model=base)


def _missing_script(spec: FineTuneJobSpec, scripts: Mapping[str, Sequence[str]]) -> Waiting | None:
    """The first reward function whose file is not there: its pod would hang at the mount without a word."""
    for number, function in enumerate(spec.reward.functions if spec.reward else ()):
        wanted = function.config_map_ref
        field = f"spec.reward.functions[{number}].configMapRef"
        if wanted.name not in scripts:
            return Waiting(
                "ConfigMapNotFound",
                f"{field}: there is no ConfigMap {wanted.name} in this namespace; create it with "
                f"kubectl create configmap {wanted.name} --from-file={wanted.key}",
                is_polled=True,
            )
        if wanted.key not in scripts[wanted.name]:
            keys = ", ".join(sorted(scripts[wanted.name])) or "none"
            return Waiting(
                "ConfigMapNotFound",
                f"{field}: ConfigMap {wanted.name} has no key {wanted.key} (keys: {keys}); add it, or change the spec",
                is_polled=True,
            )
    return None

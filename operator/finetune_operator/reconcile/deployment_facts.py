"""From the JSON of the API and the words of the agents to the facts of a rollout."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from finetune_operator.adapters import agents
from finetune_operator.adapters.kube import Json
from finetune_operator.api.adapterdeployment import AdapterDeploymentSpec
from finetune_operator.api.adapterdeployment_status import AdapterDeploymentStatus
from finetune_operator.api.adapterdeployment_traffic import SourceReference
from finetune_operator.api.base import ACTION_ANNOTATION
from finetune_operator.api.finetunejob import FineTuneJobSpec, MethodType, Objective
from finetune_operator.api.finetunejob_status import Phase
from finetune_operator.core.rollout_facts import (
    AdapterFacts,
    ArtifactFacts,
    DeploymentFacts,
    EngineFacts,
    EvaluationFacts,
    Wanted,
)
from finetune_operator.reconcile import facts
from finetune_operator.reconcile.aliases import Claim

# What says which users get which revision from which engines: it is known, or nobody is moved.
VITAL = frozenset({"alias", "baseModelRef", "adapter", "serving", "traffic"})
STEPS = ("strategy", "canary", "steps")


def deployment_facts(body: Json, *, known: AdapterDeploymentSpec | None = None) -> DeploymentFacts:
    """The facts of an AdapterDeployment. A spec that an older or newer CRD let through becomes a problem, not an
    error; `known` is the one that could be read before. Raises UnreadableStatusError."""
    metadata = body["metadata"]
    spec: AdapterDeploymentSpec | None = None
    problem: str | None = None
    try:
        spec = AdapterDeploymentSpec.model_validate(body.get("spec", {}))
    except ValidationError as error:
        problem = facts.spec_problem(error)
        spec = known or _salvaged(body.get("spec", {}))
    return DeploymentFacts(
        namespace=metadata["namespace"],
        name=metadata["name"],
        uid=metadata["uid"],
        generation=metadata.get("generation", 1),
        spec=spec,
        problem=problem,
        status=facts.read_status(AdapterDeploymentStatus, body),
        action=metadata.get("annotations", {}).get(ACTION_ANNOTATION),
        deleting="deletionTimestamp" in metadata,
    )


def _salvaged(raw: Any) -> AdapterDeploymentSpec | None:
    """The spec without what this operator does not know, and without the parts that it cannot read: an operator that
    starts has no former spec, and a candidate that has users needs its guardrails. None where a vital part is bad."""
    left = copy.deepcopy(raw)
    while True:  # one part at a time, the last one first, as the parts of a list move up
        try:
            return AdapterDeploymentSpec.model_validate(left)
        except ValidationError as error:
            item = error.errors(include_url=False, include_input=False)[-1]
            path = _part(item["loc"], is_unknown=item["type"] == "extra_forbidden")
            if path is None:
                return None
            _remove(left, path)


def _part(path: Sequence[int | str], *, is_unknown: bool) -> Sequence[int | str] | None:
    """What to leave out for the sake of a bad field: as little as the rest makes sense without. None: that is
    vital."""
    if tuple(path[:3]) == STEPS:  # others would have other numbers without one of them
        return STEPS
    if is_unknown:
        return path
    if not path or path[0] in VITAL:
        return None
    if path[0] != "analysis":
        return path[:1]
    return path[: 3 if len(path) > 2 and isinstance(path[2], int) else 2]


def _remove(document: Any, path: Sequence[int | str]) -> None:
    """Without that part; a list that has no others goes with its last one."""
    *parents, leaf = path
    part = document
    for key in parents:
        part = part[key]
    del part[leaf]
    if isinstance(part, list) and not part:
        _remove(document, parents)


def claim(body: Json) -> Claim:
    """What the stored object says of its names, also where its spec cannot be read."""
    metadata, spec = body["metadata"], _mapping(body.get("spec"))
    serving = _mapping(spec.get("serving"))
    alias, base = spec.get("alias"), _mapping(spec.get("baseModelRef")).get("name")
    return Claim(
        key=(metadata["namespace"], metadata["name"]),
        uid=metadata["uid"],
        created=metadata.get("creationTimestamp", ""),
        alias=alias if alias and isinstance(alias, str) else metadata["name"],
        base=base if isinstance(base, str) else "",
        is_served_by_default=not (serving.get("endpoint") or serving.get("podSelector")),
    )


def _mapping(value: Any) -> Json:
    return value if isinstance(value, dict) else {}


def wanted_by_source(source: SourceReference) -> Wanted:
    return Wanted(artifact=ArtifactFacts(digest=source.digest, uri=source.uri.rstrip("/")))


def wanted_by_job(name: str, body: Json | None) -> Wanted:
    """The artifact of a FineTuneJob, or why there is none (yet)."""
    if body is None:
        return Wanted(
            reason="FineTuneJobNotFound",
            message=f"FineTuneJob {name} does not exist in this namespace; create it, or change spec.adapter",
        )
    job = facts.job_facts(body)
    artifact = job.status.artifact
    match job.status.phase:
        case Phase.SUCCEEDED if artifact is not None:
            if refusal := _not_servable(name, job.spec):
                return refusal
            return Wanted(
                artifact=ArtifactFacts(
                    digest=artifact.digest,
                    uri=artifact.uri.rstrip("/"),
                    base_model=artifact.base_model,
                    rank=artifact.rank,
                    fine_tune_job=name,
                )
            )
        case Phase.FAILED | Phase.CANCELLED as phase:
            return Wanted(
                reason="FineTuneJobFailed",
                message=f"FineTuneJob {name} is {phase} and has no artifact: {job.status.message or ''}".rstrip(
                    ": "
                ),
            )
        case phase:
            return Wanted(
                reason="WaitingForFineTuneJob",
                message=f"waiting for FineTuneJob {name}, which is {phase or 'Pending'}",
            )


def _not_servable(name: str, spec: FineTuneJobSpec | None) -> Wanted | None:
    """Why the artifact of a job that succeeded is nothing that an engine can load and that answers users."""
    if spec is None:
        return None
    if spec.method.type is MethodType.FULL:
        return Wanted(
            reason="NotAnAdapter",
            message=f"FineTuneJob {name} trained a whole model (method Full), which no engine can load as an "
            "adapter; use a job with method LoRA, QLoRA or another adapter method",
        )
    if spec.objective == Objective.REWARD_MODEL:
        return Wanted(
            reason="NotALanguageModel",
            message=f"FineTuneJob {name} trained a reward model, which scores answers and writes none; use a job "
            "with another objective, for example the one that was trained with this reward model",
        )
    return None


def engine_facts(url: str, agent_url: str, told: agents.AgentStatus | agents.Unheard) -> EngineFacts:
    if isinstance(told, agents.Unheard):
        return EngineFacts(url=url, agent_url=agent_url, reachable=False, message=told.reason)
    engine, capacity = told.engine, told.capacity
    named = [engine.base_model] if engine.base_model else []
    return EngineFacts(
        url=url,
        agent_url=agent_url,
        reachable=True,
        ready=engine.ready,
        message=engine.message,
        instance=engine.instance,
        base_models=tuple(dict.fromkeys([*engine.base_models, *named])),
        # No engine takes nothing: what is not known limits nothing, and the engine has the last word.
        max_loras=capacity.max_loras or None,
        loaded_loras=capacity.loaded_loras or 0,
        max_rank=capacity.max_lora_rank or None,
        adapters={
            adapter.name: AdapterFacts(
                digest=adapter.digest, state=adapter.state, reason=adapter.reason, message=adapter.message
            )
            for adapter in told.adapters
        },
    )


def evaluation_facts(identity: str, told: agents.Evaluation | agents.Missing) -> EvaluationFacts:
    if isinstance(told, agents.Missing):
        return EvaluationFacts(id=identity, state="Missing")
    return EvaluationFacts(
        id=identity,
        state=told.state,
        message=told.message,
        scores={name: score.score for name, score in told.scores.items()},
        rows=max((score.rows for score in told.scores.values()), default=0),
    )

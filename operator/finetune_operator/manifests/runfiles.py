"""The run file: everything that the trainer needs to know, as the JSON that it validates (trainer/v1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune_operator.api.finetunejob import (
    SAMPLING,
    CheckpointSpec,
    FineTuneJobSpec,
    GenerationSpec,
    LoraSpec,
    MethodSpec,
    MethodType,
    Objective,
    Overrides,
    PreferenceSpec,
    QuantizationSpec,
    Upstream,
)

API_VERSION = "trainer/v1"
EVERY_MINUTES = 10.0  # between checkpoints, where the spec names neither steps nor minutes
NOT_FOR_THE_TRAINER: dict[str, Any] = {
    "model": {"secret_ref", "fine_tune_job_ref", "uri"},
    "dataset": {"secret_ref"},
    "reward": {"secret_ref", "fine_tune_job_ref"},
    "resources": True,
    "scheduling": True,
    "output": True,
    "checkpoint": True,
    "retry": True,
    "deadlines": True,
    "suspend": True,
    "ttl_seconds_after_finished": True,
}


@dataclass(frozen=True)
class Places:
    """The folders of an attempt, as they were settled when the job began."""

    model_uri: str
    output_uri: str
    checkpoint_uri: str | None
    """None: no checkpoints (a job that was begun by an operator that had none)."""
    adapter: Upstream | None = None
    """Adapter of another job that training goes on with; `model_uri` is then the model that it fits."""
    reward: Upstream | None = None
    """Reward model of another job."""

    def uris(self) -> list[str]:
        """Every folder that the trainer reads or writes, in the order of use."""
        folders = [self.model_uri]
        for upstream in (self.adapter, self.reward):
            folders += [uri for uri in (upstream.uri, upstream.base_model) if uri] if upstream else []
        return [*folders, self.output_uri, *([self.checkpoint_uri] if self.checkpoint_uri else [])]


def build_run_file(
    *,
    namespace: str,
    name: str,
    uid: str,
    attempt: int,
    spec: FineTuneJobSpec,
    places: Places,
    overrides: Overrides | None = None,
) -> dict[str, Any]:
    """The run file of one attempt. Every default is written out; secrets are not in it."""
    explicit = spec.model_copy(
        update={
            "method": _explicit_method(spec.method, continued=places.adapter is not None),
            **_explicit_objective(spec),
        }
    )
    settings = explicit.model_dump(mode="json", by_alias=True, exclude_none=True, exclude=NOT_FOR_THE_TRAINER)
    settings["model"] = {"uri": places.model_uri, **settings["model"]}
    if places.adapter is not None:
        settings["model"]["adapter"] = {"uri": places.adapter.uri, "digest": places.adapter.digest}
    if places.reward is not None:
        settings["reward"] |= {"uri": places.reward.uri, "digest": places.reward.digest}
    run_file = {
        "apiVersion": API_VERSION,
        "job": {"namespace": namespace, "name": name, "uid": uid, "attempt": attempt},
        **settings,
        "output": {"uri": places.output_uri},
    }
    if attempt == 0 and spec.resources.accelerator_type is not None:
        # Only the check reads it, and images of before the check refuse it. A job keeps the image that it began with.
        run_file["accelerator"] = spec.resources.accelerator_type
    if places.checkpoint_uri is not None:
        run_file["checkpoint"] = _checkpoint(spec.checkpoint, places.checkpoint_uri)
    if overrides is not None and overrides.micro_batch_size is not None:
        run_file["overrides"] = {"microBatchSize": overrides.micro_batch_size}
    return run_file


def _checkpoint(spec: CheckpointSpec, uri: str) -> dict[str, Any]:
    settings = spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    if spec.every_steps is None and spec.every_minutes is None:
        settings["everyMinutes"] = EVERY_MINUTES
    return {**settings, "uri": uri}


def _explicit_method(method: MethodSpec, *, continued: bool) -> MethodSpec:
    """The method with the settings that its type implies; those of an adapter that is continued are its own."""
    updates: dict[str, Any] = {}
    if method.type is not MethodType.FULL and method.lora is None and not continued:
        updates["lora"] = LoraSpec()
    if method.type is MethodType.QLORA and method.quantization is None:
        updates["quantization"] = QuantizationSpec()
    return method.model_copy(update=updates)


def _explicit_objective(spec: FineTuneJobSpec) -> dict[str, Any]:
    """The parts that the objective reads and the spec leaves out."""
    if spec.objective in SAMPLING and spec.generation is None:
        return {"generation": GenerationSpec()}
    if spec.objective == Objective.DPO and spec.preference is None:
        return {"preference": PreferenceSpec()}
    return {}

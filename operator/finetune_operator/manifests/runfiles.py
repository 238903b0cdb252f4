"""The run file: everything that the trainer needs to know, as the JSON that it validates (trainer/v1)."""

from __future__ import annotations

from typing import Any

from finetune_operator.api.finetunejob import (
    FineTuneJobSpec,
    LoraSpec,
    MethodSpec,
    MethodType,
    QuantizationSpec,
)

API_VERSION = "trainer/v1"
NOT_FOR_THE_TRAINER: dict[str, Any] = {
    "model": {"secret_ref"},
    "dataset": {"secret_ref"},
    "resources": True,
    "output": True,
}


def build_run_file(
    *, namespace: str, name: str, uid: str, attempt: int, spec: FineTuneJobSpec, output_uri: str
) -> dict[str, Any]:
    """The run file of one attempt. Every default is written out; secrets are not in it."""
    explicit = spec.model_copy(update={"method": _explicit_method(spec.method)})
    settings = explicit.model_dump(mode="json", by_alias=True, exclude_none=True, exclude=NOT_FOR_THE_TRAINER)
    return {
        "apiVersion": API_VERSION,
        "job": {"namespace": namespace, "name": name, "uid": uid, "attempt": attempt},
        **settings,
        "output": {"uri": output_uri},
    }


def _explicit_method(method: MethodSpec) -> MethodSpec:
    """The method with the settings that its type implies."""
    updates: dict[str, Any] = {}
    if method.type is not MethodType.FULL and method.lora is None:
        updates["lora"] = LoraSpec()
    if method.type is MethodType.QLORA and method.quantization is None:
        updates["quantization"] = QuantizationSpec()
    return method.model_copy(update=updates)

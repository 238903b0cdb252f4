"""Which modules of a model get an adapter: method.lora.targetModules against the names that the model has."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from finetune_trainer.failures import BadConfig
from finetune_trainer.model_files import Tensors

ALL_LINEAR = "all-linear"
HEAD = "lm_head"
# Two-dimensional weights that are no linear layer between others.
NO_TARGETS = frozenset({HEAD, "embed_out", "embed_in", "embed_positions", "embed_tokens", "wpe", "wte"})
# Model types whose modules are called as their weights are in the files. transformers renames those of some others
# while it loads them; for these the answer comes only with the loaded model.
NAMED_AS_IN_FILES = frozenset(
    {
        "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "granite", "llama", "mistral",
        "olmo2", "phi", "phi3", "qwen2", "qwen3", "smollm3", "stablelm", "starcoder2",
    }
)  # fmt: skip


def check_early(names: list[str], config: dict[str, Any], tensors: Tensors) -> None:
    """Refuses, before anything slow, a name that the model cannot have. Silence promises nothing. Raises BadConfig."""
    known = config.get("model_type") in NAMED_AS_IN_FILES and "quantization_config" not in config
    weights = [name.removesuffix(".weight") for name, shape in tensors.items() if len(shape) == 2]
    # Last parts only: the module that holds all others may have another name in the files, or none.
    available = {_last(name) for name in weights} - NO_TARGETS
    if known and available and names != [ALL_LINEAR]:
        check([name for name in names if _last(name) not in available], available)


def check(names: Iterable[str], available: Iterable[str]) -> None:
    """Raises BadConfig, which lists what there is, for a name that is not the end of any available module's name."""
    modules = list(available)
    choices = f"choose from {', '.join(sorted({_last(module) for module in modules}))}, or {ALL_LINEAR}"
    for name in names:
        if _last(name) == HEAD:
            raise BadConfig(f"method.lora.targetModules: {HEAD} cannot get an adapter; {choices}")
        if not any(module == name or module.endswith(f".{name}") for module in modules):
            raise BadConfig(f"method.lora.targetModules: the model has no module {name!r}; {choices}")


def _last(name: str) -> str:
    return name.rsplit(".", 1)[-1]

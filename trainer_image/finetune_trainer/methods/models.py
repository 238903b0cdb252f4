"""Loading of the base model and of its tokenizer: safetensors only, never code from the model's folder."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import safetensors
import torch
import transformers

from finetune_trainer import model_files
from finetune_trainer.failures import BadConfig, ModelNotFound
from finetune_trainer.runfile import MethodType, Precision, Quantization, RunFile

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


CLASSIFIER_HEADS = ("score", "classifier")  # as transformers' models call them; PEFT trains and saves these


class Head(StrEnum):
    LANGUAGE = "causal language model"
    REWARD = "sequence classification model"


LOADERS = {
    Head.LANGUAGE: transformers.AutoModelForCausalLM,
    Head.REWARD: transformers.AutoModelForSequenceClassification,
}


@dataclass(frozen=True)
class Device:
    name: str  # "cuda:0" or "cpu"
    description: str  # for people, such as "NVIDIA L4" or "cpu (4 threads)"
    has_bfloat16: bool
    memory_bytes: int | None = None  # that is free; None on a CPU


def find_device(*, threads: int) -> Device:
    if torch.cuda.is_available():
        return Device(
            "cuda:0",
            torch.cuda.get_device_name(0),
            torch.cuda.is_bf16_supported(including_emulation=False),
            memory_bytes=torch.cuda.mem_get_info(0)[0],
        )
    return Device("cpu", f"cpu ({threads} threads)", has_bfloat16=False)


def load_tokenizer(path: Path, *, uri: str) -> Any:
    """Returns the tokenizer, with a padding token. Raises ModelNotFound when it cannot be loaded."""
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the library below raises nothing narrower for a broken tokenizer.json
        raise ModelNotFound(
            f"model.uri: the tokenizer of {uri} cannot be loaded ({_first_line(error)})"
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelNotFound(
            f"model.uri: the tokenizer of {uri} has no end token; set eos_token in tokenizer_config.json"
        )
    if not tokenizer.is_fast:
        raise ModelNotFound(
            f"model.uri: the tokenizer of {uri} has no fast version; convert it to tokenizer.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padded places are masked and never learnt
    return tokenizer


def load_base(
    run: RunFile, path: Path, *, device: Device, precision: Precision, head: Head = Head.LANGUAGE
) -> Any:
    """Returns the base model on its device; for QLoRA quantized and prepared. Raises BadConfig or ModelNotFound.

    With `Head.REWARD` it gets a new head with one output, drawn by the run's seed, unless its files bring one.
    """
    transformers.set_seed(run.hyperparameters.seed)
    model = _load(
        path,
        head,
        uri=run.model.uri,
        device=device,
        dtype=_weights_dtype(run.method.type, precision),
        quantization=build_quantization(run.method.quantization, precision=precision, head=head),
    )
    if run.method.quantization is not None:
        import peft

        _keep_gradients(model)
        model = peft.prepare_model_for_kbit_training(
            model, use_gradient_checkpointing=run.hyperparameters.gradient_checkpointing
        )
    return model


def load_classifier(
    path: Path, *, uri: str, device: Device, precision: Precision, quantization: Quantization | None
) -> Any:
    """Returns a model with one output, to be used and not trained. Raises BadConfig or ModelNotFound."""
    return _load(
        path,
        Head.REWARD,
        uri=uri,
        device=device,
        dtype=_weights_dtype(MethodType.LORA, precision),
        quantization=build_quantization(quantization, precision=precision, head=Head.REWARD),
        field="reward",
    )


def _load(
    path: Path,
    head: Head,
    *,
    uri: str,
    device: Device,
    dtype: torch.dtype,
    quantization: Any | None,
    field: str = "model.uri",
) -> Any:
    options: dict[str, Any] = {"dtype": dtype}
    if quantization is not None:
        options["quantization_config"] = quantization
    if head is Head.REWARD:
        options["num_labels"] = 1
    try:
        model, found = LOADERS[head].from_pretrained(
            path,
            trust_remote_code=False,
            use_safetensors=True,
            device_map={"": device.name},
            ignore_mismatched_sizes=True,  # told below
            output_loading_info=True,
            **options,
        )
    except (OSError, safetensors.SafetensorError) as error:
        raise ModelNotFound(
            f"{field}: the weights of {uri} cannot be loaded ({_first_line(error)})"
        ) from error
    except ImportError as error:  # of what reads weights that are quantized in other ways
        raise BadConfig(
            f"{field}: {uri} needs a library that this image does not have ({_first_line(error)}); name the model that "
            "it was made from, or an image that has it"
        ) from error
    except (ValueError, KeyError) as error:
        raise BadConfig(
            f"{field}: {uri} is no {head} that transformers knows ({_first_line(error)}); "
            "models that bring their own code are not run"
        ) from error
    model_files.check_loaded(
        found, field=field, uri=uri, heads=CLASSIFIER_HEADS if head is Head.REWARD else ()
    )
    return model


def _keep_gradients(model: Any) -> None:
    """Keeps bitsandbytes from its packed CPU layout, in which no gradient passes.

    On CPUs with AVX512-BF16 a quantized layer repacks its weights at the first evaluation and stays so: training goes
    on without error, but every layer below gets no gradient.
    """
    import bitsandbytes

    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _weights_dtype(method: MethodType, precision: Precision) -> torch.dtype:
    # Full training keeps float32 weights under bfloat16 computation: small updates vanish in bfloat16.
    return (
        torch.bfloat16 if precision is Precision.BFLOAT16 and method is not MethodType.FULL else torch.float32
    )


def build_quantization(
    spec: Quantization | None, *, precision: Precision, head: Head = Head.LANGUAGE
) -> Any | None:
    if spec is None:
        return None
    default = "bfloat16" if precision is Precision.BFLOAT16 else "float32"
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.type,
        bnb_4bit_use_double_quant=spec.double_quant,
        bnb_4bit_compute_dtype=DTYPES[spec.compute_dtype or default],
        # A head that is trained as a whole cannot be quantized. None: transformers leaves out the language head.
        llm_int8_skip_modules=list(CLASSIFIER_HEADS) if head is Head.REWARD else None,
    )


def check_vocabulary(model: Any, tokenizer: Any, largest_token: int, *, uri: str) -> None:
    """Raises BadConfig when the tokenizer makes tokens, or pads with one, that the model has no embedding for."""
    rows = model.get_input_embeddings().num_embeddings
    if largest_token >= rows:
        raise BadConfig(
            f"model.uri: the tokenizer of {uri} makes token {largest_token}, but the model has {rows} embeddings; "
            "the two do not belong together"
        )
    if tokenizer.pad_token_id >= rows:
        raise BadConfig(
            f"model.uri: pad_token {tokenizer.pad_token!r} of {uri} is token {tokenizer.pad_token_id}, but the model "
            f"has {rows} embeddings; name another pad_token in tokenizer_config.json, such as the end token"
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]

"""What a model's folder tells without loading the model: its configuration, its tokenizer, its weights' names.

A folder that a download left incomplete, or that holds something else, is refused here and not after a minute of work.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from finetune_trainer import storage
from finetune_trainer.failures import BadConfig, ModelNotFound
from finetune_trainer.runfile import MethodType

INDEX = "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_FILES = (TOKENIZER, "tokenizer.model", "vocab.json", TOKENIZER_CONFIG)
LARGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors format
COPY_AGAIN = "copy the model's folder again, or write it anew with save_pretrained"

Tensors = dict[str, list[int]]  # name -> shape


def check_model_files(path: Path, *, uri: str) -> Path:
    """Returns the path if configuration, tokenizer and whole safetensors are there. Raises ModelNotFound otherwise."""
    if not (path / "config.json").is_file():
        raise ModelNotFound(
            f"model.uri: {uri} has no config.json (looked at {path}); name the folder of a transformers model"
        )
    if not any(path.glob("*.safetensors")):
        raise ModelNotFound(
            f"model.uri: {uri} has no *.safetensors (looked at {path}); other weight files are not loaded, "
            "because they can carry code: convert them with save_pretrained"
        )
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        raise ModelNotFound(
            f"model.uri: {uri} has no tokenizer (looked at {path} for {', '.join(TOKENIZER_FILES)})"
        )
    return path


def read_config(path: Path, *, uri: str) -> dict[str, Any]:
    """Returns the model's config.json. Raises ModelNotFound."""
    return _read_object(path / "config.json", uri=uri)


def check_quantization(config: dict[str, Any], method: MethodType, *, uri: str) -> None:
    """Raises BadConfig for weights that are quantized already, and not as the method has it."""
    found = config.get("quantization_config")
    if not isinstance(found, dict) or method is MethodType.LORA:
        return
    kind = found.get("quant_method", "bitsandbytes")
    if method is MethodType.FULL or kind != "bitsandbytes":
        raise BadConfig(
            f"method.type: {method} cannot train {uri}, which is quantized already (quantization_config in "
            f"config.json: {kind}); name the model that it was made from, or use LoRA"
        )


def has_chat_template(path: Path, *, uri: str) -> bool:
    """Says whether the tokenizer brings a chat template, without loading it. Raises ModelNotFound."""
    if (path / "chat_template.jinja").is_file() or (path / "chat_template.json").is_file():
        return True
    file = path / TOKENIZER_CONFIG
    return file.is_file() and bool(_read_object(file, uri=uri).get("chat_template"))


def check_tokenizer(path: Path, *, uri: str) -> None:
    """Raises ModelNotFound, which names the file, for a tokenizer that is cut off or otherwise broken."""
    if (path / TOKENIZER_CONFIG).is_file():
        _read_object(path / TOKENIZER_CONFIG, uri=uri)
    if not (path / TOKENIZER).is_file():
        return
    import tokenizers  # needed for this one check

    try:
        tokenizers.Tokenizer.from_file(str(path / TOKENIZER))
    except Exception as error:  # the library raises nothing narrower
        raise _broken(path / TOKENIZER, error, uri=uri) from error


def read_tensors(path: Path, *, uri: str) -> Tensors:
    """Returns name and shape of every weight. Raises ModelNotFound for a file that is missing or cut off."""
    names = sorted(file.name for file in path.glob("*.safetensors"))
    if (path / INDEX).is_file():
        listed = _read_object(path / INDEX, uri=uri).get("weight_map") or {}
        if not isinstance(listed, dict):
            raise ModelNotFound(f"model.uri: weight_map in {INDEX} of {uri} is not an object; {COPY_AGAIN}")
        missing = sorted({str(name) for name in listed.values()} - set(names))
        if missing:
            raise ModelNotFound(
                f"model.uri: {uri} has no {missing[0]}, which {INDEX} lists (looked at {path}); {COPY_AGAIN}"
            )
    tensors: Tensors = {}
    for name in names:
        tensors.update(_read_header(path / name, uri=uri))
    return tensors


def check_loaded(
    found: Mapping[str, Collection[Any]], *, field: str, uri: str, heads: Collection[str] = ()
) -> None:
    """Raises ModelNotFound for weights that the files do not have, or in another shape: transformers draws them at
    random. `found` is its loading info; only modules in `heads` may be new."""
    missing = sorted(name for name in found["missing_keys"] if name.partition(".")[0] not in heads)
    if missing:
        raise ModelNotFound(
            f"{field}: {uri} has no weights for {len(missing)} parts of the model that its config.json describes, such "
            f"as {missing[0]}; {COPY_AGAIN}"
        )
    for name, shape, wanted in sorted(found["mismatched_keys"]):
        raise ModelNotFound(
            f"{field}: {name} of {uri} has the shape {list(shape)}, the model that its config.json describes needs "
            f"{list(wanted)}; {COPY_AGAIN}"
        )


def _read_header(file: Path, *, uri: str) -> Tensors:
    """A safetensors file begins with the length of its header (8 bytes), then the header, which is JSON."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, LARGEST_HEADER)))
        header.pop("__metadata__", None)
        ends = [tensor["data_offsets"][1] for tensor in header.values()]
        shapes: Tensors = {name: tensor["shape"] for name, tensor in header.items()}
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise _broken(file, error, uri=uri) from error
    expected, found = 8 + length + max(ends, default=0), file.stat().st_size
    if found < expected:
        raise ModelNotFound(
            f"model.uri: {file.name} of {uri} is cut off: {found} of {expected} bytes ({file}); {COPY_AGAIN}"
        )
    return shapes


def _read_object(file: Path, *, uri: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _broken(file, error, uri=uri) from error
    if not isinstance(value, dict):
        raise ModelNotFound(f"model.uri: {file.name} of {uri} is not a JSON object ({file}); {COPY_AGAIN}")
    return value


def _broken(file: Path, error: Exception, *, uri: str) -> ModelNotFound:
    reason = storage.describe_error(error).splitlines()[0][:300]
    return ModelNotFound(f"model.uri: {file.name} of {uri} cannot be read ({file}: {reason}); {COPY_AGAIN}")

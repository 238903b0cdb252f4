"""Tokens per second of the engine beside transformers' own generate, in one process; writes docs/benchmarks.md.

Needs an otherwise idle machine. Both ways take turns, round after round, over the same weights and prompts:

    python -m benchmarks.engine --rounds 3
"""

from __future__ import annotations

import argparse
import os
import queue
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # before torch; the engine sets the same

import peft
import torch

from benchmarks.pages import current_load, describe_machine, say, spread, write_section
from finetune_local import models as local_models
from finetune_server import models, sampling
from finetune_server.engine import Engine, Limits
from finetune_server.sequences import Sequence
from finetune_server.telemetry import Telemetry
from finetune_trainer.machine import count_cores

BATCHES = (1, 4, 8)
TOKENS = 64  # per answer
BASE = "base"
WAYS = ("transformers generate", "engine, base", "engine, one adapter", "engine, base and adapters mixed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    options = parser.parse_args()
    load = current_load()
    torch.set_num_threads(count_cores()[0])
    cache = Path(os.environ.get("FINETUNE_CACHE", Path.home() / ".cache" / "finetune-operator"))
    path = local_models.prepare_smollm2(cache, say)
    plain = load_base(path, options.dtype)
    with tempfile.TemporaryDirectory() as folder:
        engine = start_engine(load_base(path, options.dtype), write_adapters(path, Path(folder)))
        found: dict[tuple[str, int], list[float]] = {}
        for number in range(options.rounds + 1):
            for batch in BATCHES:
                for way in WAYS:
                    speed = measure(way, batch, plain, engine)
                    if number:  # the first round warms up
                        found.setdefault((way, batch), []).append(speed)
                    say(f"round {number}, {way}, batch {batch}: {speed:.1f} tokens/s")
        engine.stop()
    write_section("Engine", page(found, options, load=load))


def load_base(path: Path, dtype: str) -> models.Base:
    return models.load_base(path, uri=f"file://{path}", device="cpu", dtype=dtype, max_length=None)


def write_adapters(path: Path, folder: Path) -> list[Path]:
    """Writes seven random adapters of rank 16 on all linear layers."""
    made = []
    for number in range(7):
        base = load_base(path, "float32").model
        tuned = peft.get_peft_model(
            base, peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
        )
        tuned.save_pretrained(folder / str(number))
        made.append(folder / str(number))
    return made


def start_engine(base: models.Base, adapters: list[Path]) -> Engine:
    limits = Limits(max_num_seqs=16, max_loras=8, max_lora_rank=16, max_queue=64, cache_tokens=32768)
    engine = Engine(base, limits, Telemetry(BASE))
    engine.registry.set_base_names(frozenset({BASE}))
    engine.start()
    for adapter in adapters:
        engine.load(adapter.name, adapter, pinned=True)
    return engine


def make_prompts(base: models.Base, count: int) -> list[list[int]]:
    return [
        base.tokenizer.apply_chat_template(
            [{"role": "user", "content": f"Tell a long story about the number {number}."}],
            add_generation_prompt=True,
            return_dict=False,
        )
        for number in range(count)
    ]


def measure(way: str, batch: int, plain: models.Base, engine: Engine) -> float:
    """Returns generated tokens per second, the reading of the prompts included."""
    prompts = make_prompts(plain, batch)
    begun = time.monotonic()
    if way == WAYS[0]:
        generate(plain, prompts)
    else:
        mixed = [BASE, *(str(number) for number in range(7))]
        chosen = {WAYS[1]: [BASE] * batch, WAYS[2]: ["0"] * batch, WAYS[3]: mixed[:batch]}
        answer(engine, prompts, chosen[way])
    return batch * TOKENS / (time.monotonic() - begun)


def generate(base: models.Base, prompts: list[list[int]]) -> None:
    width = max(len(prompt) for prompt in prompts)
    ids, mask = (
        torch.zeros(len(prompts), width, dtype=torch.long),
        torch.zeros(len(prompts), width, dtype=torch.long),
    )
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    with torch.inference_mode():
        base.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
            pad_token_id=0,
        )


def answer(engine: Engine, prompts: list[list[int]], names: list[str]) -> None:
    inbox: queue.Queue[Any] = queue.Queue()
    base = engine.base
    settings = sampling.Sampling(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    engine.submit(
        [
            Sequence(prompt, settings, name, base.tokenizer.backend_tokenizer, base.ends, inbox.put)
            for prompt, name in zip(prompts, names, strict=True)
        ]
    )
    ended = 0
    while ended < len(prompts):
        piece = inbox.get(timeout=300)
        if piece.message:
            raise RuntimeError(piece.message)
        ended += piece.finish is not None


def page(found: dict[tuple[str, int], list[float]], options: argparse.Namespace, *, load: float) -> str:
    rows = []
    for batch in BATCHES:
        plain = statistics.median(found[WAYS[0], batch])
        cells = [spread(found[way, batch], "") for way in WAYS]
        ratios = [statistics.median(found[way, batch]) / plain for way in WAYS[1:]]
        rows.append(
            f"| {batch} | {cells[0]} | "
            + " | ".join(f"{cell}, {ratio:.2f}×" for cell, ratio in zip(cells[1:], ratios, strict=True))
            + " |"
        )
    heading = "".join(f" {way} |" for way in WAYS)
    return f"""\
Generated tokens per second over SmolLM2-135M-Instruct in {options.dtype} on the CPU, {TOKENS} tokens per greedy
answer to a prompt of about 40 tokens, all answers at once: median (smallest to largest) of {options.rounds} rounds, and
how many times the speed of transformers' `generate` with the same batch. The ways take turns. Adapters: rank 16 on
all linear layers, 7 of them loaded; mixed: the first answer is
the base model's, each other one has an adapter of its own.

| batch |{heading}
|---|---|---|---|---|
{chr(10).join(rows)}

Command: `python -m benchmarks.engine --rounds {options.rounds} --dtype {options.dtype}`.
{describe_machine(("torch", "transformers", "peft"), load=load)}"""


if __name__ == "__main__":
    main()

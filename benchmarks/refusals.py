"""How long the trainer takes to refuse a bad spec, model or data file; writes docs/benchmarks.md.

Each case is one start of `finetune-trainer run`, from the start of the process to its end:

    python -m benchmarks.refusals --rounds 5
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.pages import current_load, describe_machine, say, spread, write_section
from finetune_local import layouts, models

LIMIT = 1.0  # seconds
TRAINER = Path(sys.executable).with_name("finetune-trainer")
CHAT = [f'{{"prompt": "question {number}", "completion": "an answer"}}\n' for number in range(40_000)]


@dataclass(frozen=True)
class Case:
    """A good run file with `changes` of its top-level keys, over a data file and a model folder with a fault."""

    title: str
    code: int
    says: str  # part of the message: the case must fail for its own reason
    changes: dict[str, Any] = field(default_factory=dict)
    data: str | None = "".join(CHAT[:40])
    file: str = "rows.jsonl"
    broken: str | None = None  # of the model's files, the one that is cut in half
    limit: float | None = LIMIT


def lora(*names: str) -> dict[str, Any]:
    return {"method": {"type": "LoRA", "lora": {"targetModules": list(names)}}}


def with_last(line: str, *, number: int) -> str:
    """Good rows before a bad one in line `number`."""
    return "".join(CHAT[: number - 1]) + line


CASES = (
    Case("QLoRA without quantization", 64, "method.quantization", {"method": {"type": "QLoRA"}}),
    Case("unknown field", 64, "learningrate", {"learningrate": 1}),
    Case("output that cannot be written", 64, "output.uri", {"output": {"uri": "file:///dev/null/out"}}),
    Case("targetModules that the model lacks", 64, "no module 'q_projection'", lora("q_projection")),
    Case("no such model", 66, "model.uri", {"model": {"uri": "file:///no/model"}}),
    Case("weights cut off", 66, "model.safetensors", broken="model.safetensors"),
    Case("tokenizer.json cut off", 66, "tokenizer.json", broken="tokenizer.json"),
    Case("no such data file", 65, "does not exist", data=None),
    Case("broken JSON in line 17", 65, "line 17", data=with_last('{"prompt": "a', number=17)),
    Case("row without answer in line 40 000", 65, "line 40000", data=with_last('{"prompt": "a"}', number=40_000)),
    Case("CSV with an unknown header", 65, "fit no format", data="ask,reply\na,b\n", file="rows.csv"),
    Case("Parquet file that is none", 65, "not a Parquet file", data="PAR0", file="rows.parquet"),
    Case("nothing to learn within maxLength", 65, "maxLength", {"hyperparameters": {"maxLength": 8}}, limit=None),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each case runs (default 5)")
    rounds = parser.parse_args().rounds
    model = models.prepare_smollm2(layouts.cache_folder(), say)
    load = current_load()
    seconds = {}
    for case in CASES:
        with tempfile.TemporaryDirectory(prefix="refusals-") as folder:
            run_file = prepare(case, model, Path(folder))
            seconds[case.title] = [refuse(case, run_file) for _ in range(rounds)]
        say(f"{case.title}: {spread(seconds[case.title], 's')}")
    write_section("Refusals", build_section(seconds, rounds=rounds, load=load))


def prepare(case: Case, model: Path, folder: Path) -> Path:
    """Makes model, data and run file of a case; returns the run file."""
    copy = folder / "model"
    copy.mkdir()
    for file in model.iterdir():
        (copy / file.name).symlink_to(file)
    if case.broken is not None:
        (copy / case.broken).unlink()
        shutil.copyfile(model / case.broken, copy / case.broken)
        os.truncate(copy / case.broken, (model / case.broken).stat().st_size // 2)
    data = folder / case.file
    if case.data is not None:
        data.write_text(case.data)
    document = {
        "apiVersion": "trainer/v1",
        "job": {"namespace": "default", "name": "refused", "uid": "1", "attempt": 1},
        "model": {"uri": f"file://{copy}"},
        "dataset": {"sources": [{"uri": f"file://{data}"}]},
        "output": {"uri": f"file://{folder}/out"},
        **case.changes,
    }
    run_file = folder / "run.json"
    run_file.write_text(json.dumps(document))
    return run_file


def refuse(case: Case, run_file: Path) -> float:
    """Seconds from the start of the trainer to its end. Raises SystemExit when it does not end as it should."""
    started = time.monotonic()
    done = subprocess.run(
        [str(TRAINER), "run", "--run-file", str(run_file)], capture_output=True, text=True, check=False
    )
    seconds = time.monotonic() - started
    if done.returncode != case.code or case.says not in done.stderr:
        raise SystemExit(f"error: {case.title}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return seconds


def build_section(seconds: dict[str, list[float]], *, rounds: int, load: float) -> str:
    rows = [f"| {case.title} | {case.code} | {spread(seconds[case.title], 's')} |" for case in CASES]
    over = [case.title for case in CASES if case.limit is not None and max(seconds[case.title]) > case.limit]
    verdict = f"over the limit: {', '.join(over)}" if over else "all others are within it"
    table = "\n".join(["| bad input | exit code | time |", "|---|---|---|", *rows])
    return f"""\
From the start of `finetune-trainer run` to its end, {rounds} times each: median (smallest to largest). The model is
that of the quickstart, on a local disk. The limit is {LIMIT:g} s; the last case loads PyTorch first and has none;
{verdict}. That the others import neither PyTorch nor transformers is asserted in
`tests/integration/trainer/test_bad_input.py`.

{table}

Command: `python -m benchmarks.refusals --rounds {rounds}`.
{describe_machine(("pydantic", "tokenizers", "torch", "transformers"), load=load)}"""


if __name__ == "__main__":
    main()

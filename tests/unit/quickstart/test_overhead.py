"""The benchmark's own arithmetic: settings are translated whole, processes told apart, the page kept."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml

from benchmarks import observers, overhead, pages, plain_trl

SPEC = yaml.safe_load(overhead.JOB_FILE.read_text())["spec"]


def test_plain_script_gets_every_setting_of_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [*overhead.plain_flags(SPEC), "--model", "m", "--output", "o"]
    monkeypatch.setattr("sys.argv", ["plain_trl.py", *flags])
    arguments = plain_trl.parse_arguments()
    hyper, lora = SPEC["hyperparameters"], SPEC["method"]["lora"]
    assert Path(arguments.data).is_file()
    assert arguments.max_steps == hyper["maxSteps"]
    assert arguments.batch_size == hyper["globalBatchSize"]
    assert arguments.micro_batch_size == hyper["microBatchSize"]
    assert arguments.learning_rate == hyper["learningRate"]
    assert arguments.warmup_ratio == hyper["warmupRatio"]
    assert arguments.max_length == hyper["maxLength"]
    assert (arguments.rank, arguments.alpha, arguments.dropout) == (lora["r"], lora["alpha"], lora["dropout"])
    assert arguments.target_modules == lora["targetModules"]
    assert arguments.scheduler == "cosine"


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["python3.11", "finetune-trainer", "run"], True),
        (["python", "-m", "finetune_trainer", "run"], True),
        (["sh", "-c", "finetune-trainer run"], False),
        (["python", "finetune-trainer", "compare"], False),
        (["python", "plain_trl.py"], False),
    ],
)
def test_trainer_is_told_from_the_shell_around_it(names: list[str], *, expected: bool) -> None:
    assert observers.is_trainer(names) is expected


def test_nothing_is_held_out_so_that_both_ways_train_on_the_same_rows() -> None:
    spec = copy.deepcopy(SPEC)
    overhead.without_evaluation(spec, max_steps=7)
    assert spec["dataset"]["split"]["eval"] == 0
    assert spec["hyperparameters"]["maxSteps"] == 7
    assert "evalSteps" not in spec["hyperparameters"]


def test_peak_memory_is_read_in_bytes() -> None:
    assert observers.peak_rss("Name:\tpython\nVmHWM:\t    2048 kB\nVmRSS:\t 1024 kB\n") == 2 * 2**20


def test_table_compares_medians() -> None:
    plain = [overhead.Timings(10, 100, 2.0, 2**30), overhead.Timings(30, 120, 2.2, 2**30)]
    through = [
        overhead.Timings(25, 130, 2.1, 2**31),
        overhead.Timings(35, 134, 2.1, 2**31),
    ]
    table = overhead.build_table(plain, through)
    assert "| 20.00 s (10.00 to 30.00) | 30.00 s (25.00 to 35.00) | +10.00 s | 1.500× |" in table
    assert "| +0.00 s | 1.000× | 1.03× at most |" in table
    assert "| 1024 MiB (1024 to 1024) | 2048 MiB (2048 to 2048) | +1024.00 MiB | 2.000× |" in table


def test_other_sections_of_the_page_stay() -> None:
    page = "# Benchmarks\n\n## First\n\nkept\n\n## Overhead\n\nold\n\n## Last\n\nkept, too\n"
    replaced = pages.replace_section(page, "Overhead", "new\n")
    assert replaced == "# Benchmarks\n\n## First\n\nkept\n\n## Overhead\n\nnew\n\n## Last\n\nkept, too\n"
    assert pages.replace_section("# Benchmarks\n", "Overhead", "new\n").endswith("\n\n## Overhead\n\nnew\n")

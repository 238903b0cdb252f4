"""finetune-trainer compare: arguments in, a table or JSON out."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune_trainer import lifecycle, model_files, preflight, storage
from finetune_trainer.data import files, formats
from finetune_trainer.failures import EXIT_CODES, BadConfig, TrainerError
from finetune_trainer.runfile import Source

if TYPE_CHECKING:
    from finetune_trainer.evaluation.compare import Comparison, Side

SHOWN = 400  # characters of a sample's texts in the table


def run(options: argparse.Namespace) -> int:
    """Compares and prints. Returns the exit code: 0, or that of the error's class."""
    try:
        with tempfile.TemporaryDirectory(prefix="finetune-compare-") as work:
            comparison = _compare(options, Path(work))
    except TrainerError as error:
        print(f"{error.error_class}: {error}", file=sys.stderr)
        return EXIT_CODES[error.error_class]
    if options.output == "json":
        print(json.dumps(to_document(comparison, samples=options.samples), ensure_ascii=False, indent=2))
    else:
        _print_tables(comparison, samples=options.samples)
    return 0


def _compare(options: argparse.Namespace, work: Path) -> Comparison:
    uris = {name: to_uri(getattr(options, name)) for name in ("base", "adapter", "data")}
    for name in ("limit", "max_new_tokens", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise BadConfig(f"--{name.replace('_', '-')} is {value}; use 1 or more")
    lifecycle.prepare_environment(list(uris.values()))
    source = Source(uri=uris["data"])
    if files.kind_of(source.uri) is None:
        raise BadConfig(
            f"--data {options.data} has no ending that says what it is; use {', '.join(files.SUFFIXES)}"
        )
    examples = formats.parse_rows(
        files.read_rows(preflight.find_source(source, work / "data"), uri=source.uri), source
    )
    base, _ = preflight.find_model(uris["base"], None, work / "base")
    model_files.read_tensors(base, uri=uris["base"])  # refuses a file that is cut off
    adapter = _find_adapter(uris["adapter"], work / "adapter")
    from finetune_trainer.evaluation import compare  # seconds of imports

    asked = examples[: options.limit]
    # JSON is read by programs: what libraries print must not get between.
    with contextlib.redirect_stdout(sys.stderr), _progress(2 * len(asked)) as on_answers:
        return compare.compare(
            base,
            adapter,
            asked,
            base_uri=uris["base"],
            options=compare.Options(
                keys=_split(options.json_keys),
                fields=_split(options.match),
                max_new_tokens=options.max_new_tokens,
                batch_size=options.batch_size,
                on_answers=on_answers,
            ),
        )


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error, which only a terminal shows; base and artifact answer every question once."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.advance(task, count)


def to_uri(text: str) -> str:
    """Takes a plain path as file://."""
    return text if "://" in text else f"file://{Path(text).absolute()}"


def _split(text: str | None) -> tuple[str, ...]:
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def _find_adapter(uri: str, folder: Path) -> Path:
    path = storage.local_path(uri)
    if path is None:
        try:
            return storage.fetch_folder(uri, folder)
        except (OSError, ValueError) as error:
            reason = storage.describe_error(error)
            raise BadConfig(
                f"--adapter {uri} cannot be read ({reason}); name an artifact's folder"
            ) from error
    if not path.is_dir():
        raise BadConfig(f"--adapter {uri} is not a folder; name an artifact's folder")
    return path


def to_document(comparison: Comparison, *, samples: int) -> dict[str, Any]:
    """Returns the comparison for programs; shares are percentages, 0 to 100."""
    return {
        "rows": comparison.rows,
        "base": _side(comparison.base),
        "adapter": _side(comparison.adapter),
        "artifact": comparison.artifact,
        "samples": [
            {"prompt": question.prompt, "expected": question.expected, "base": base, "adapter": adapter}
            for question, base, adapter in zip(
                comparison.questions[:samples],
                comparison.base.answers,
                comparison.adapter.answers,
                strict=False,
            )
        ],
    }


def _side(side: Side) -> dict[str, Any]:
    document = {
        "exactMatch": side.scores.exact_match,
        "match": side.scores.match,
        "evalLoss": round(side.eval_loss, 4),
        "tokensPerSecond": round(side.tokens_per_second, 1),
    }
    return document if side.scores.valid_json is None else {"validJson": side.scores.valid_json, **document}


def _print_tables(comparison: Comparison, *, samples: int) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"Base model and artifact on {comparison.rows} rows")
    table.add_column("")
    table.add_column("base", justify="right")
    table.add_column("artifact", justify="right")
    for label, base, adapter in _lines(comparison):
        table.add_row(label, base, adapter)
    console.print(table)
    for question, base, adapter in list(
        zip(comparison.questions, comparison.base.answers, comparison.adapter.answers, strict=True)
    )[:samples]:
        sample = Table(show_header=False, expand=True)
        sample.add_column(style="bold", no_wrap=True)
        sample.add_column(overflow="fold", ratio=1)
        for label, text in (
            ("prompt", question.prompt),
            ("expected", question.expected),
            ("base", base),
            ("artifact", adapter),
        ):
            sample.add_row(label, _plain(text))
        console.print(sample)
    artifact = comparison.artifact
    console.print(
        ", ".join(f"{name} {value}" for name, value in artifact.items() if value is not None),
        markup=False,
        soft_wrap=True,
    )


def _plain(text: str) -> Any:
    from rich.text import Text  # answers may hold what rich would take for markup

    return Text(text if len(text) <= SHOWN else text[: SHOWN - 1] + "…")


def _lines(comparison: Comparison) -> list[tuple[str, str, str]]:
    def line(label: str, show: Callable[[Side], str]) -> tuple[str, str, str]:
        return label, show(comparison.base), show(comparison.adapter)

    scores = comparison.base.scores
    lines = [line(f"right {field}", partial(_share_right, field)) for field in scores.match]
    if scores.valid_json is not None:
        lines.insert(0, line("valid JSON", lambda side: f"{side.scores.valid_json:.1f} %"))
    return [
        *lines,
        line("exact match", lambda side: f"{side.scores.exact_match:.1f} %"),
        line("eval loss", lambda side: f"{side.eval_loss:.4f}"),
        line("tokens/s", lambda side: f"{side.tokens_per_second:.0f}"),
    ]


def _share_right(field: str, side: Side) -> str:
    return f"{side.scores.match[field]:.1f} %"

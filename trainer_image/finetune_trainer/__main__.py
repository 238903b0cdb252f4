"""finetune-trainer run | check | inspect | compare | stop."""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import sys
import threading
from pathlib import Path

EPILOG = """\
run, check and inspect read the run file named by FINETUNE_RUN_FILE (or --run-file) and end with one of these codes:
0 Succeeded or Checked, 64 BadConfig, 65 BadData, 66 ModelNotFound, 74 Storage, 75 Preempted, 80 GpuOutOfMemory,
81 HostOutOfMemory, 82 NotFinite, 83 Collective, 84 CheckpointCorrupt, 1 Internal.
"""


def main(arguments: list[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    for stream in (sys.stdout, sys.stderr):
        # Whoever reads the log takes it for UTF-8, whatever the locale says.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")
    if options.command == "compare":
        try:
            from finetune_trainer.evaluation import command

            return command.run(options)
        except KeyboardInterrupt:
            return 130
    from finetune_trainer import signals

    if options.command == "stop":
        return 0 if signals.stop_running(patience=options.wait) else 1
    signals.install()
    with signals.noted():  # an import must not be broken off, and the result has to be told
        from finetune_trainer import lifecycle
    if options.command == "run":
        with signals.known_process():
            code = lifecycle.run_job(options.run_file)
        return _end(code)
    task = lifecycle.check if options.command == "check" else lifecycle.inspect
    return lifecycle.run_job(options.run_file, task)


def _end(code: int) -> int:
    """Python would wait, without end, for threads and processes that a reward function left running."""
    for process in multiprocessing.active_children():
        process.kill()
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        os._exit(code)  # everything was printed and flushed
    return code


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="finetune-trainer", epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("run", "train as the run file says and commit the artifact to output.uri"),
        (
            "check",
            "check configuration, model, data and memory without training, as a job does before it gets a GPU",
        ),
        ("inspect", "verify the artifact in output.uri against its manifest and report it"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "--run-file",
            type=Path,
            default=Path(os.environ.get("FINETUNE_RUN_FILE", "/etc/finetune/run.json")),
            help="JSON run file (default: FINETUNE_RUN_FILE, else /etc/finetune/run.json)",
        )
    _add_compare(
        commands.add_parser("compare", help="compare the base model with an artifact on rows it never saw")
    )
    stop = commands.add_parser(
        "stop",
        help="ask the run in this container to save a checkpoint and end",
        description="Sends SIGTERM to the run in this container and waits until it ended: for a preStop hook. "
        "Ends with 0 when none runs any more, with 1 when it still runs.",
    )
    stop.add_argument(
        "--wait", type=float, default=30.0, metavar="SECONDS", help="how long to wait (default 30)"
    )
    return parser


def _add_compare(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--base", required=True, metavar="URI", help="base model: file:///path, hf://org/model, s3://..."
    )
    command.add_argument("--adapter", required=True, metavar="DIR", help="artifact's folder: a path or a URI")
    command.add_argument(
        "--data", required=True, metavar="FILE", help="rows in any of the four formats: a path or a URI"
    )
    command.add_argument("--limit", type=int, metavar="N", help="use the first N rows only")
    command.add_argument(
        "--json-keys", metavar="A,B", help="answers must be JSON objects with exactly these keys"
    )
    command.add_argument(
        "--match", metavar="A,B", help="of the JSON answer, these fields are compared with the expected ones"
    )
    command.add_argument(
        "--max-new-tokens", type=int, default=96, metavar="N", help="longest answer (default 96)"
    )
    command.add_argument(
        "--samples", type=int, default=3, metavar="N", help="answers to show in full (default 3)"
    )
    command.add_argument(
        "--batch-size", type=int, default=16, metavar="N", help="rows generated at once (default 16)"
    )
    command.add_argument("--output", choices=("table", "json"), default="table")


if __name__ == "__main__":
    sys.exit(main())

"""finetune-server: the engine with its agent, or `finetune-server agent`: the agent alone, beside a vLLM."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from finetune_trainer import machine
from finetune_trainer.failures import EXIT_CODES, TrainerError


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code: 0, or that of the error's class, or 130 after Ctrl-C."""
    try:
        return _run(sys.argv[1:] if arguments is None else arguments)
    except TrainerError as error:
        print(f"{error.error_class}: {error}", file=sys.stderr)
        return EXIT_CODES[error.error_class]
    except KeyboardInterrupt:  # while modules are loaded; later it is a request to stop
        return 130


def _run(arguments: list[str]) -> int:
    machine.prepare_libraries()
    if arguments[:1] == ["agent"]:
        options = make_agent_parser().parse_args(arguments[1:])
        from finetune_server import sidecar

        return sidecar.run(options)
    options = make_parser().parse_args(arguments)
    from finetune_server import server  # seconds of imports

    return server.run(options)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="finetune-server",
        description="Serves a base model and its LoRA adapters through OpenAI's API, as vLLM does.",
        epilog="`finetune-server agent --help` describes the agent alone, the sidecar of a vLLM pod.",
    )
    parser.add_argument(
        "--model", required=True, help="base model: a path, pvc://, file://, s3://, hf:// ..."
    )
    parser.add_argument("--served-model-name", nargs="+", metavar="NAME", help="default: the folder's name")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=_port, default=8000)
    parser.add_argument("--max-loras", type=_positive, default=8, help="adapters in memory (default 8)")
    parser.add_argument("--max-lora-rank", type=_positive, default=64, help="default 64")
    parser.add_argument("--max-model-len", type=_positive, metavar="N", help="prompt and answer, in tokens")
    parser.add_argument("--max-num-seqs", type=_positive, default=16, help="answers at once (default 16)")
    parser.add_argument("--max-queue", type=_positive, default=256, help="requests that wait (default 256)")
    parser.add_argument(
        "--kv-cache-tokens",
        type=_positive,
        metavar="N",
        help="keys and values in memory, in tokens (default: enough for 4 longest sequences, at least 16384)",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--threads", type=_positive, help="default: the cores that the process may use")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="clients must send this key")
    parser.add_argument("--agent-port", type=_port, default=8001, help="port of the agent; 0: none")
    parser.add_argument("--agent-host", help="default: as --host")
    _add_agent_options(parser)
    return parser


def make_agent_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="finetune-server agent", description="Brings adapters to an engine that speaks vLLM's API."
    )
    parser.add_argument("--engine", required=True, metavar="URL", help="such as http://127.0.0.1:8000")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=_port, default=8001)
    parser.add_argument("--max-loras", type=_count, default=0, help="default: what the engine's metrics say")
    parser.add_argument("--max-lora-rank", type=_count, default=0, help="default: the engine decides")
    parser.add_argument("--base-model", metavar="URI", help="the engine's model, to compare adapters with")
    parser.add_argument("--api-key-file", type=Path, metavar="FILE", help="the engine's API key")
    _add_agent_options(parser)
    return parser


def _add_agent_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--agent-token-file", "--token-file", type=Path, metavar="FILE", help="callers of the agent send this"
    )
    parser.add_argument(
        "--state-dir",
        type=Path,
        metavar="DIR",
        help="remembers adapters across restarts (default: nothing is remembered)",
    )
    parser.add_argument("--cache-dir", type=Path, metavar="DIR", help="downloaded adapters")
    parser.add_argument("--load-timeout", type=_seconds, default=120.0, metavar="SECONDS")
    parser.add_argument("--download-timeout", type=_seconds, default=900.0, metavar="SECONDS")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is below 0")
    return value


def _port(text: str) -> int:
    value = int(text)
    if not 0 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{value} is no port; ports are from 0 (any) to 65535")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:  # false for NaN as well
        raise argparse.ArgumentTypeError(f"{text} is no time; give seconds above 0")
    return value


if __name__ == "__main__":
    sys.exit(main())

"""Configuration of the router: one table of options, each a flag and an environment variable."""

from __future__ import annotations

import argparse
import ipaddress
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

ENVIRONMENT_PREFIX = "FINETUNE_ROUTER_"
_LAST_PORT = 65_535
_AT_LEAST_ONE = ("workers", "max_body_bytes", "max_buffered_bytes", "max_concurrency", "feedback_days")
_TIMEOUTS = ("connect_timeout", "first_byte_timeout", "silence_timeout", "total_timeout", "body_timeout")


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class RouterConfig:
    """Everything that a router is told at its start. Seconds and bytes are meant where nothing else is said."""

    host: str = _option("127.0.0.1", "address of the data port")
    port: int = _option(8080, "data port; 0 takes a free one")
    admin_host: str = _option("127.0.0.1", "address of the admin port")
    admin_port: int = _option(8081, "admin port: routes, counters, metrics, probes; 0 takes a free one")
    workers: int = _option(1, "worker processes")
    state_dir: str = _option("", "folder for the last snapshot, feedback and the identity (required)")
    routes_file: str = _option("", "snapshot to start from, for example a mounted ConfigMap; watched")
    admin_token_file: str = _option("", "file with the admin token; without one the admin port must be local")
    signing_key_file: str = _option("", "file with the key of response ids, the same for all replicas")
    api_keys_file: str = _option("", "file with the clients' API keys; without one every client is let in")
    upstream_api_key_file: str = _option("", "file with the key that is sent to the engines")
    forward_headers: str = _option(
        "", "further client headers to pass on, comma separated, * for all but credentials"
    )
    extra_paths: str = _option("", "further POST paths that carry a model, comma separated")
    max_body_bytes: int = _option(16 * 1024 * 1024, "largest request body; more is answered with 413")
    max_buffered_bytes: int = _option(
        256 * 1024 * 1024, "request bodies in memory, also those still coming, per worker; more is 429"
    )
    max_concurrency: int = _option(2048, "requests under way, per worker; more is 429")
    max_mirrors: int = _option(64, "mirrored requests under way, per worker; more are left out")
    connect_timeout: float = _option(5.0, "seconds to connect to an engine")
    first_byte_timeout: float = _option(120.0, "seconds to the first byte of a stream")
    silence_timeout: float = _option(120.0, "seconds without a byte in the middle of a stream")
    total_timeout: float = _option(900.0, "seconds for a request as a whole")
    body_timeout: float = _option(60.0, "seconds for a client to send its body")
    drain_delay: float = _option(
        0.0, "seconds to go on taking connections after SIGTERM, until no one sends any"
    )
    grace: float = _option(30.0, "seconds for running requests after that")
    feedback_days: int = _option(90, "days that single feedback records are kept")
    log_level: str = _option("INFO", "DEBUG, INFO, WARNING or ERROR")

    def __post_init__(self) -> None:
        if not self.state_dir:
            raise ValueError("--state-dir: name a folder that the router may write to")
        for name in ("port", "admin_port"):
            if not 0 <= getattr(self, name) <= _LAST_PORT:
                raise ValueError(f"{flag(name)}: {getattr(self, name)} is no port; they end at {_LAST_PORT}")
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{flag(name)}: {getattr(self, name)} is less than 1")
        if self.max_mirrors < 0:
            raise ValueError(f"--max-mirrors: {self.max_mirrors} is less than 0")
        for name in _TIMEOUTS:
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{flag(name)}: {getattr(self, name)} is not a time above 0 seconds")
        for name in ("drain_delay", "grace"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{flag(name)}: {getattr(self, name)} is not a time of 0 seconds or more")
        if self.log_level.upper() not in {"DEBUG", "INFO", "WARNING", "ERROR"}:
            raise ValueError(f"--log-level: {self.log_level!r} is none of DEBUG, INFO, WARNING, ERROR")
        if not self.admin_token_file and not _is_local(self.admin_host):
            raise ValueError(
                f"--admin-host: {self.admin_host} can be reached from outside, so --admin-token-file is needed"
            )

    @property
    def state_folder(self) -> Path:
        return Path(self.state_dir)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))


def parse_config(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> RouterConfig:
    """Flags win over the environment, that over defaults. Ends the process with a usage message for bad ones."""
    parser = argparse.ArgumentParser(
        prog="finetune-router",
        allow_abbrev=False,
        description="OpenAI-compatible router: picks an arm per request, rewrites the model's name, counts.",
        epilog=f"Each option may be set by its environment variable, for example {ENVIRONMENT_PREFIX}STATE_DIR.",
    )
    kinds: dict[str, Callable[[str], Any]] = {}
    for option in fields(RouterConfig):
        kind: Callable[[str], Any] = type(option.default)
        kinds[option.name] = kind
        parser.add_argument(
            flag(option.name),
            type=kind,
            metavar=kind.__name__.upper(),
            help=_help(option.metadata["help"], option.default),
        )
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    values: dict[str, Any] = {}
    for option in fields(RouterConfig):
        variable = ENVIRONMENT_PREFIX + option.name.upper()
        if option.name in given:
            values[option.name] = given[option.name]
        elif environment.get(variable):
            try:
                values[option.name] = kinds[option.name](environment[variable])
            except ValueError:
                parser.error(f"{variable}: {environment[variable]!r} is no {kinds[option.name].__name__}")
    try:
        return RouterConfig(**values)
    except ValueError as error:
        parser.error(str(error))


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def read_secret(file: str) -> str:
    """The content of a file without white space around it; "" where no file is named.

    Raises ValueError for an empty file, which is more likely a mistake than no secret.
    """
    if not file:
        return ""
    text = Path(file).read_text(encoding="utf-8").strip()
    if not text:
        raise ValueError(f"{file} is empty: put the secret into it")
    return text


def _help(text: str, default: object) -> str:
    shown = text.replace("%", "%%")
    return shown if default == "" else f"{shown} (default {default})"


def _is_local(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False

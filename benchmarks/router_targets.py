"""What the router's benchmark sends requests to: the router, nginx, LiteLLM, and the engine itself."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.pages import REPOSITORY, say
from finetune_local.layouts import cache_folder
from finetune_local.ports import pick
from finetune_operator.api.routes import ROUTES_PATH, Route, Signal, SignalEvent, Snapshot, Target

LITELLM = "litellm[proxy]"
ALIASES = 1000
START_SECONDS = 90.0
PROXY_CORE, OTHER_CORE = "0", "1"
_NGINX = """
worker_processes 1; daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 8192; }}
http {{
    access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
    keepalive_requests 100000000; client_max_body_size 20m; client_body_buffer_size 256k;
    upstream engine {{ server 127.0.0.1:{engine}; keepalive 1024; keepalive_requests 100000000; }}
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location / {{
            proxy_pass http://engine; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
        }}
    }}
}}
"""
_LITELLM = """
model_list:
  - model_name: support-bot
    litellm_params: {{model: openai/base-model, api_base: "http://127.0.0.1:{engine}/v1", api_key: sk-none}}
general_settings: {{dangerously_permit_weak_or_unset_master_key: true}}
litellm_settings: {{num_retries: 0, request_timeout: 600}}
"""


@dataclass
class Subject:
    """Something that answers on a port, and its process."""

    name: str
    port: int
    process: psutil.Process | None = None
    is_peer: bool = False
    """May be stopped while others are measured; the router would replace a worker that was silent for seconds."""

    def cpu_seconds(self) -> float:
        return sum(sum(one.cpu_times()[:2]) for one in self._tree())

    def memory_bytes(self) -> int:
        """Memory of its own: pages that several processes share are counted in parts (PSS)."""
        return sum(int(one.memory_full_info().pss) for one in self._tree())

    def pause(self) -> None:
        """Stop its processes, so that what it does without requests takes nothing from who is measured."""
        for one in self._tree():
            one.suspend()

    def resume(self) -> None:
        for one in self._tree():
            one.resume()

    def _tree(self) -> list[psutil.Process]:
        return [] if self.process is None else [self.process, *self.process.children(recursive=True)]


def pinned(core: str, *command: str) -> list[str]:
    """On one core, where there are several and `taskset` is there."""
    if (os.cpu_count() or 1) > 1 and shutil.which("taskset"):
        return ["taskset", "-c", core, *command]
    return list(command)


@contextlib.contextmanager
def started(name: str, command: list[str], *, port: int, folder: Path) -> Iterator[Subject]:
    """A process that answers on the port. Raises RuntimeError with its log when it does not."""
    log = folder / f"{name}.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, cwd=REPOSITORY)
    try:
        end = time.monotonic() + START_SECONDS
        while not _listens(port):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{name} does not start:\n{log.read_text(errors='replace')[-3000:]}")
            time.sleep(0.1)
        subject = Subject(name, port, psutil.Process(process.pid), is_peer=name in {"nginx", "LiteLLM"})
        yield subject
        subject.resume()  # a paused one would not hear that it has to end
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def engine(folder: Path, *, chunks: int, interval: float) -> Iterator[Subject]:
    (port,) = pick(1)
    command = pinned(
        OTHER_CORE, sys.executable, "-m", "benchmarks.router_upstream", "--port", str(port), "--chunks", str(chunks),
        "--interval", str(interval),
    )  # fmt: skip
    with started("direct", command, port=port, folder=folder) as subject:
        yield subject


@contextlib.contextmanager
def router(folder: Path, engine_port: int) -> Iterator[Subject]:
    """One worker, with the alias that is asked alone and the thousand that are asked in turn, each with a canary and
    signals."""
    port, admin = pick(2)
    command = pinned(
        PROXY_CORE, sys.executable, "-m", "finetune_router", "--port", str(port), "--admin-port", str(admin),
        "--state-dir", str(folder / "router"), "--workers", "1",
    )  # fmt: skip
    with started("router", command, port=admin, folder=folder) as subject:
        subject.port = port
        names = ("support-bot", *(f"support-bot-{number}" for number in range(ALIASES)))
        snapshot = Snapshot(version=1, routes=tuple(build_route(name, engine_port) for name in names))
        request = urllib.request.Request(
            f"http://127.0.0.1:{admin}{ROUTES_PATH}",
            data=snapshot.model_dump_json(by_alias=True).encode(),
            method="PUT",
        )
        with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310 - our own port
            assert response.status == 200
        _wait_ready(admin)
        yield subject


def _wait_ready(admin: int) -> None:
    end = time.monotonic() + START_SECONDS
    while True:
        with (
            contextlib.suppress(OSError),
            urllib.request.urlopen(f"http://127.0.0.1:{admin}/readyz", timeout=5) as response,
        ):
            if response.status == 200:
                return
        if time.monotonic() > end:
            raise RuntimeError("the router does not get ready")
        time.sleep(0.1)


def build_route(alias: str, engine_port: int) -> Route:
    upstreams = (f"http://127.0.0.1:{engine_port}",)
    return Route(
        alias=alias,
        owner="bench/bench/bench",
        stable=Target(revision="11111111", served_name=f"{alias}--11111111", upstreams=upstreams),
        candidate=Target(revision="22222222", served_name=f"{alias}--22222222", upstreams=upstreams),
        weight=20,
        salt="salt",
        comparison="bench",
        signals=(
            Signal(name="errors", event=SignalEvent.ERROR),
            Signal(name="slow-ttft", event=SignalEvent.TTFT_OVER, threshold=2.0),
            Signal(name="empty", event=SignalEvent.EMPTY),
            Signal(name="refusal", event=SignalEvent.REFUSAL),
        ),
    )


@contextlib.contextmanager
def nginx(folder: Path, engine_port: int) -> Iterator[Subject]:
    """One worker process, proxy_pass with kept connections."""
    program = find_nginx()
    (port,) = pick(1)
    own = folder / "nginx"
    own.mkdir(exist_ok=True)
    (own / "nginx.conf").write_text(_NGINX.format(folder=own, engine=engine_port, port=port))
    command = pinned(
        PROXY_CORE, program, "-p", str(own), "-c", str(own / "nginx.conf"), "-e", str(own / "error.log")
    )
    with started("nginx", command, port=port, folder=folder) as subject:
        yield subject


@contextlib.contextmanager
def litellm(folder: Path, engine_port: int) -> Iterator[Subject]:
    """One worker, no database, no keys, no callbacks."""
    program = find_litellm()
    (port,) = pick(1)
    config = folder / "litellm.yaml"
    config.write_text(_LITELLM.format(engine=engine_port))
    command = pinned(
        PROXY_CORE, str(program), "--config", str(config), "--host", "127.0.0.1", "--port", str(port),
        "--num_workers", "1",
    )  # fmt: skip
    with started("LiteLLM", command, port=port, folder=folder) as subject:
        time.sleep(3)
        yield subject


def find_nginx() -> str:
    """nginx from PATH, else Debian's package, unpacked into the cache. Raises RuntimeError where neither is had."""
    found = shutil.which("nginx")
    if found:
        return found
    folder = cache_folder() / "benchmarks" / "nginx"
    program = folder / "usr" / "sbin" / "nginx"
    if not program.exists():
        if not shutil.which("apt-get"):
            raise RuntimeError("nginx is not installed, and there is no apt-get to fetch it with")
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "-q", "nginx"], cwd=folder, check=True, capture_output=True)
        package = next(folder.glob("nginx_*.deb"))
        subprocess.run(["dpkg", "-x", str(package), str(folder)], check=True)
    return str(program)


def find_litellm() -> Path:
    """LiteLLM in a virtual environment of its own in the cache; installed at the first call."""
    folder = cache_folder() / "benchmarks" / "litellm"
    program = folder / "bin" / "litellm"
    if not program.exists():
        say(f"installing {LITELLM} into {folder}, once")
        uv = [sys.executable, "-m", "uv"] if _has_uv() else ["uv"]
        subprocess.run([*uv, "venv", "-q", "--python", sys.executable, str(folder)], check=True)
        subprocess.run(
            [*uv, "pip", "install", "-q", "--python", str(folder / "bin" / "python"), LITELLM], check=True
        )
    return program


def _has_uv() -> bool:
    return (
        subprocess.run([sys.executable, "-m", "uv", "--version"], capture_output=True, check=False).returncode
        == 0
    )


def litellm_version() -> str:
    program = cache_folder() / "benchmarks" / "litellm" / "bin" / "python"
    code = "from importlib.metadata import version; print(version('litellm'))"
    return subprocess.run(
        [str(program), "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip()


def nginx_version() -> str:
    done = subprocess.run([find_nginx(), "-v"], capture_output=True, text=True, check=True)
    return done.stderr.strip().rpartition("/")[2]

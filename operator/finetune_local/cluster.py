"""The laptop cluster as one object: up, down, status. The command line and the tests both use it.

Everything that must outlast a command is in the state folder: `instance.json` (identity, ports, the parts that are
wanted), one record per started process, certificates and data. `up` compares that with what runs and starts only what
is missing; so it is also the way back after any part was killed.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import IO

from finetune_local import (
    binaries,
    certificates,
    commands,
    contents,
    errors,
    graphs,
    instances,
    kubeapi,
    layouts,
    parts,
    ports,
    processes,
    serving,
    starters,
)

Report = Callable[[str], None]
# Stopped from the outside in: nobody is left who would log that its server is gone.
STOP_ORDER = (
    ("operator", "kuberay", "ray-gateway", "router"),
    ("ray", "kwok", "engine"),
    ("kube-controller-manager", "kube-scheduler"),
    ("kube-apiserver",),
    ("etcd",),
)


class State(StrEnum):
    RUNNING = "Running"  # the process lives and answers
    STARTING = "Starting"  # it lives and does not answer (yet)
    CRASHED = "Crashed"  # it was started, nobody stopped it, and it is gone
    STOPPED = "Stopped"


@dataclasses.dataclass(frozen=True)
class PartStatus:
    """One line of `status`. `uptime` in seconds; `port` is the main one, on 127.0.0.1."""

    name: str
    state: State
    pid: int | None
    port: int | None
    uptime: float | None
    log: str


class Cluster:
    """A laptop cluster in a state folder. Several may run side by side in folders of their own.

    `crds` is a folder with our own CRDs (default: they are made from the models). `files` is the folder behind
    the claim `files` in namespace default (default: as at the last `up`, first the current folder). `engine_model` is
    the engine's base model: a folder, a URI, or a name in the cache (default: as at the last `up`, first SmolLM2).
    It may be set until the engine is started. `operator_environment` is added to the operator's environment.
    """

    def __init__(
        self,
        state: Path,
        *,
        crds: Path | None = None,
        files: Path | None = None,
        engine_model: str | None = None,
        sources: binaries.Sources | None = None,
        operator_environment: Mapping[str, str] | None = None,
    ) -> None:
        self.layout = layouts.Layout(state.expanduser().absolute())
        self._crds = crds
        self._files = files
        self.engine_model = engine_model
        self._sources = sources or binaries.Sources.from_environment()
        self._operator_environment = dict(operator_environment or {})

    @property
    def kubeconfig(self) -> Path:
        """Of a cluster administrator."""
        return self.layout.kubeconfig

    @property
    def ports(self) -> dict[str, int]:
        """Port on 127.0.0.1 by name (parts.PORTS); empty before the first `up`."""
        return dict(instances.Instance.load(self.layout.instance).ports)

    @property
    def openai_base_url(self) -> str | None:
        """Where OpenAI clients find the adapters; None where no router runs."""
        return f"http://127.0.0.1:{self.ports['router']}/v1" if self.is_alive("router") else None

    def client(self) -> kubeapi.ApiClient:
        """A client with all rights."""
        return kubeapi.ApiClient(f"https://127.0.0.1:{self.ports['kube-apiserver']}", pki=self.layout.pki)

    def up(
        self,
        names: Sequence[str] = parts.ALL,
        *,
        report: Report = lambda line: None,
        detail: Report = lambda line: None,
    ) -> None:
        """Start what is missing of these parts, and wait until each is ready.

        Raises LocalClusterError, which names the part that failed and quotes its log.
        """
        wanted = _check_names(names)
        self._refuse_foreign_folder()
        with self._locked(report):
            instance = instances.Instance.load(self.layout.instance)
            found = binaries.obtain(
                parts.programs_of(wanted), sources=self._sources, announce=report, detail=detail
            )
            self._settle(instance, wanted, report)
            setting = commands.Setting(
                layout=self.layout,
                identity=instance.identity,
                ports=instance.ports,
                programs=found.programs,
                ray_parameters=commands.ray_parameters(),
                operator_environment=self._operator_environment,
                engine_model=instance.engine_model or serving.DEFAULT_MODEL,
            )
            certificates.ensure(self.layout.pki)
            serving.ensure_tokens(self.layout)
            self._write_kubeconfigs(setting)
            graphs.run_all(self._tasks(setting, wanted, found, Path(instance.files or "."), report))

    def down(self, *, purge: bool = False, report: Report = lambda line: None) -> list[str]:
        """Stop every process that was started from this state folder, and only those; return the parts that ran.

        `purge` also removes the state folder. The artifacts in it are removed with it.
        """
        if not (self.layout.instance.exists() or self.layout.lock.exists()):
            return self._stop_what_lost_its_folder(report)
        with self._locked(report):
            instance = instances.Instance.load(self.layout.instance)
            running: list[str] = []
            for wave in STOP_ORDER:
                stopped = processes.stop(self.layout, instance.identity, wave)
                running += stopped
                if stopped:
                    report(f"stopped {', '.join(stopped)}")
            if purge:  # nothing is written before: this is how a full disk is emptied
                shutil.rmtree(self.layout.ray_folder(instance.identity), ignore_errors=True)
                # First what takes long: interrupted in it, this is still a state folder, and can be purged again.
                for folder in self.layout.folders():
                    shutil.rmtree(folder)
                shutil.rmtree(self.layout.root)
                report(f"removed {self.layout.root}")
            else:
                instance.wanted = []
                instance.save(self.layout.instance)
        return running

    def _stop_what_lost_its_folder(self, report: Report) -> list[str]:
        """Somebody removed the state folder and left the processes."""
        identity = instances.Instance.load(self.layout.instance).identity
        left = [name for name in parts.ALL if processes.find_all(self.layout, identity, [name])]
        if left:
            processes.sweep(self.layout, identity, left)
            shutil.rmtree(self.layout.ray_folder(identity), ignore_errors=True)
            report(f"stopped {', '.join(left)}, whose state folder was removed")
        return left

    def status(self) -> list[PartStatus]:
        """All parts, in start order."""
        instance = instances.Instance.load(self.layout.instance)
        setting = commands.Setting(
            layout=self.layout,
            identity=instance.identity,
            ports=instance.ports,
            programs={},
            ray_parameters={},
            operator_environment={},
            engine_model="",
        )
        with concurrent.futures.ThreadPoolExecutor(max_workers=len(parts.ALL)) as pool:
            return list(pool.map(lambda name: self._status_of(name, setting), parts.ALL))

    def _status_of(self, name: str, setting: commands.Setting) -> PartStatus:
        record = processes.load(self.layout, name)
        process = record.find() if record else None
        if process is None:
            state = State.CRASHED if record else State.STOPPED
        else:
            state = State.RUNNING if parts.PARTS[name].is_ready(setting) else State.STARTING
        return PartStatus(
            name=name,
            state=state,
            pid=process.pid if process else None,
            port=setting.ports.get(parts.MAIN_PORTS.get(name, name)) if process else None,
            uptime=round(record.uptime(), 1) if process and record else None,
            log=str(self.layout.log(name)),
        )

    @contextlib.contextmanager
    def _locked(self, report: Report) -> Iterator[None]:
        """One `up` or `down` per state folder at a time."""
        held = False
        while not held:
            self.layout.create()
            with self.layout.lock.open("w") as stream:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    report("waiting for another `finetune local` command")
                    fcntl.flock(stream, fcntl.LOCK_EX)
                # Whoever held it may have purged the folder: a lock of a removed file keeps nobody out.
                held = _is_at(self.layout.lock, stream)
                if held:
                    yield

    def _refuse_foreign_folder(self) -> None:
        """`down --purge` removes the whole folder: nothing of the user's may be in it."""
        root = self.layout.root
        foreign = [] if self.layout.lock.exists() or not root.exists() else self.layout.find_foreign()
        if foreign:
            raise errors.LocalClusterError(
                f"{root} cannot be the state folder: it holds {', '.join(foreign[:3])}, "
                "and `down --purge` removes all of it",
                remedy="Name an empty or a new folder with --state or FINETUNE_LOCAL_DIR.",
            )

    def _settle(self, instance: instances.Instance, wanted: tuple[str, ...], report: Report) -> None:
        """Decide identity, ports and folders before anything starts, and write them down."""
        alive = [name for name in parts.ALL if self.is_alive(name)]
        # What killed parts left behind would still hold their ports.
        processes.sweep(self.layout, instance.identity, [name for name in parts.ALL if name not in alive])
        kept = [port for port in parts.PORTS if _owner(port) in alive]
        chosen = ports.choose(parts.PORTS, known=instance.ports, in_use_by_us=kept)
        if instance.ports and chosen != instance.ports and alive:
            moved = sorted(name for name in chosen if chosen[name] != instance.ports.get(name))
            report(f"ports in use by other programs ({', '.join(moved)}): starting everything anew")
            for wave in STOP_ORDER:
                processes.stop(self.layout, instance.identity, wave)
        instance.ports = chosen
        instance.wanted = [name for name in parts.ALL if name in {*instance.wanted, *wanted}]
        files = self._files or (Path(instance.files) if instance.files else Path.cwd())
        instance.files = str(files.expanduser().absolute())
        if self.engine_model is not None:
            instance.engine_model = serving.find_model(self.engine_model)
        instance.save(self.layout.instance)

    def is_alive(self, name: str) -> bool:
        """Whether the part's process lives, be it ready or not."""
        record = processes.load(self.layout, name)
        return record is not None and record.find() is not None

    def _write_kubeconfigs(self, setting: commands.Setting) -> None:
        for user in certificates.USERS:
            admin = user == "admin"
            path = self.layout.kubeconfig if admin else self.layout.user_kubeconfig(user)
            certificates.write_kubeconfig(path, pki=self.layout.pki, user=user, server=setting.server)

    def _tasks(
        self,
        setting: commands.Setting,
        wanted: tuple[str, ...],
        found: binaries.Found,
        files: Path,
        report: Report,
    ) -> list[graphs.Task]:
        def start(name: str) -> Callable[[threading.Event], None]:
            return lambda stop: starters.Starter(setting, report).ensure(parts.PARTS[name], stop)

        tasks = [graphs.Task(name, parts.PARTS[name].needs, start(name)) for name in wanted]
        volumes = {
            "files": files,
            "models": layouts.cache_folder() / "models",
            "artifacts": self.layout.artifacts,
        }
        serving.link_volumes(self.layout, volumes)
        if "engine" in wanted:
            model = setting.engine_model
            tasks.append(graphs.Task("engine-model", (), lambda stop: serving.prepare_model(model, report)))
        if "kube-apiserver" not in wanted:
            return tasks
        ray_crds = found.crds if "kuberay" in wanted else None
        steps = contents.tasks(
            setting.client(), self.layout, volumes=volumes, crds=self._crds, ray_crds=ray_crds
        )
        return [*tasks, *steps]


def _check_names(names: Sequence[str]) -> tuple[str, ...]:
    unknown = sorted(set(names) - set(parts.ALL))
    if unknown:
        raise errors.LocalClusterError(
            f"no such part: {', '.join(unknown)}", remedy=f"The parts are: {', '.join(parts.ALL)}."
        )
    return tuple(name for name in parts.ALL if name in names)


def _is_at(path: Path, stream: IO[str]) -> bool:
    """Whether the open file is the one that the path names."""
    try:
        return os.path.samestat(path.stat(), os.fstat(stream.fileno()))
    except FileNotFoundError:
        return False


def _owner(port: str) -> str:
    """The part that listens on a port of parts.PORTS: the longest name that it starts with."""
    return max((name for name in parts.ALL if port == name or port.startswith(f"{name}-")), key=len)

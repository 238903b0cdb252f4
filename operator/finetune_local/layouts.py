"""Where the laptop cluster keeps its things: one state folder, one cache of binaries and models."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Layout:
    """Paths inside the state folder; nothing else in the package spells them."""

    root: Path

    @property
    def kubeconfig(self) -> Path:
        return self.root / "kubeconfig"

    @property
    def pki(self) -> Path:
        return self.root / "pki"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def etcd(self) -> Path:
        return self.root / "etcd"

    @property
    def pods(self) -> Path:
        return self.root / "pods"

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def router(self) -> Path:
        return self.root / "router"

    @property
    def engine(self) -> Path:
        return self.root / "engine"

    @property
    def volumes(self) -> Path:
        return self.engine / "volumes"

    @property
    def alerts(self) -> Path:
        """Written by the user, if at all: alert providers by name."""
        return self.root / "alerts.json"

    @property
    def audit_policy(self) -> Path:
        """The API server's audit policy. Where there is none, nothing is recorded."""
        return self.root / "audit-policy.yaml"

    @property
    def instance(self) -> Path:
        return self.root / "instance.json"

    @property
    def lock(self) -> Path:
        return self.root / "lock"

    def log(self, part: str) -> Path:
        return self.logs / f"{part}.log"

    def token(self, name: str) -> Path:
        return self.pki / f"{name}.token"

    def user_kubeconfig(self, user: str) -> Path:
        return self.pki / f"{user}.kubeconfig"

    def create(self) -> None:
        """Make all folders, private to the user: keys and Secrets of jobs lie in them."""
        for folder in (self.root, *self.folders(), self.volumes):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.root.chmod(0o700)

    def find_foreign(self) -> list[str]:
        """The names of what is in a folder in which no `up` was yet, without what `up` and its user put there."""
        ours = {path.name for path in (*self.folders(), self.alerts, self.audit_policy)}
        return sorted(path.name for path in self.root.iterdir() if path.name not in ours)

    def folders(self) -> tuple[Path, ...]:
        return (
            self.pki, self.logs, self.run, self.etcd, self.pods, self.artifacts, self.router, self.engine,
        )  # fmt: skip

    def ray_folder(self, identity: str) -> Path:
        """Ray's own folder. Not in the state folder or TMPDIR: Unix socket paths end at 107 bytes, and Ray takes 64."""
        return Path("/tmp") / f"finetune-ray-{identity[:8]}"  # noqa: S108 - the name is the cluster's own


def default_state_folder() -> Path:
    chosen = os.environ.get("FINETUNE_LOCAL_DIR")
    return (
        Path(chosen).expanduser() if chosen else Path("~/.local/share/finetune-operator/local").expanduser()
    )


def cache_folder() -> Path:
    chosen = os.environ.get("FINETUNE_CACHE")
    folder = Path(chosen).expanduser() if chosen else Path("~/.cache/finetune-operator").expanduser()
    return folder.absolute()  # the programs in it are started from another folder


def write_private(path: Path, content: str | bytes) -> None:
    """Replace a file atomically; only the user can read it, at no moment anybody else."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
    except OSError as error:  # a full disk; unlike opening, writing does not say where
        temporary.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error
    temporary.replace(path)

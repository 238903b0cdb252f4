"""Processes that outlive the command which started them, and that are stopped only when proven to be ours.

A record (pid and time of birth) names the main process, which leads a session of its own. Every process also carries
MARKER in its environment, which its children inherit. So the children of a killed parent, which no process tree leads
to any more, are still found by their session or their marker, and nothing else is. Both are needed: some of Ray's
processes overwrite their environment with a new title, and Ray's jobs leave the session.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import psutil

from finetune_local import layouts

MARKER = "FINETUNE_LOCAL_PART"  # <identity of the cluster>:<part>
LOG_LIMIT = 20 * 2**20  # bytes; a larger log is set aside as .1 before the next start


@dataclasses.dataclass(frozen=True)
class Record:
    """A started part. `born` (of which boot, clock ticks after it) proves that the pid is still it: a time of day could
    not, because it moves whenever the system's clock is set.
    """

    part: str
    pid: int
    born: str
    fingerprint: str
    log_offset: int

    def find(self) -> psutil.Process | None:
        """The running process, or None; a zombie counts as gone."""
        _reap(self.pid)
        try:
            process = psutil.Process(self.pid)
            same = _born(self.pid) == self.born
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None

    def uptime(self) -> float:
        """Seconds since the start, for a process that was found."""
        ticks = int(self.born.rpartition("/")[2])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")

    def owns_session(self) -> bool:
        """Whether a session with this number is ours: a pid is not used again while its session has members."""
        return _born(self.pid) in (None, self.born)


def start(
    part: str,
    argv: Sequence[str],
    *,
    layout: layouts.Layout,
    identity: str,
    environment: Mapping[str, str],
    fingerprint: str,
    nice: int = 0,
) -> Record:
    """Start a part in a session of its own; output goes to its log. Raises OSError when it cannot be executed."""
    log = layout.log(part)
    if log.exists() and log.stat().st_size > LOG_LIMIT:
        log.replace(log.with_suffix(".log.1"))
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with os.fdopen(descriptor, "ab") as stream:
        offset = os.fstat(stream.fileno()).st_size
        child = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**environment, MARKER: f"{identity}:{part}"},
            cwd=layout.root,
            start_new_session=True,
        )
    # It outlives us on purpose; without this Popen would warn when it is collected.
    child.returncode = 0
    if nice:
        with contextlib.suppress(psutil.NoSuchProcess):
            # Now, because threads that are there already would keep theirs.
            psutil.Process(child.pid).nice(nice)
    record = Record(
        part=part,
        pid=child.pid,
        born=_born(child.pid) or "",
        fingerprint=fingerprint,
        log_offset=offset,
    )
    layouts.write_private(_record_path(layout, part), json.dumps(dataclasses.asdict(record)))
    return record


def load(layout: layouts.Layout, part: str) -> Record | None:
    try:
        return Record(**json.loads(_record_path(layout, part).read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None  # never started, or the record was cut short: the marker still finds the process


def forget(layout: layouts.Layout, part: str) -> None:
    _record_path(layout, part).unlink(missing_ok=True)


def find_all(layout: layouts.Layout, identity: str, parts: Iterable[str]) -> list[psutil.Process]:
    """All living processes of these parts, whoever their parent is now."""
    markers = {f"{identity}:{part}" for part in parts}
    sessions = {record.pid for part in parts if (record := load(layout, part)) and record.owns_session()}
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            if process.uids().real != os.getuid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            ours = os.getsid(process.pid) in sessions or process.environ().get(MARKER) in markers
            for member in (process, *process.children(recursive=True)) if ours else ():
                found[member.pid] = member
        except (psutil.NoSuchProcess, psutil.AccessDenied, ProcessLookupError):
            continue
    return list(found.values())


def stop(layout: layouts.Layout, identity: str, parts: Sequence[str], *, grace: float = 10.0) -> list[str]:
    """Stop parts with all their children: SIGTERM to the main process, after `grace` seconds SIGKILL to the rest.

    Returns the names of the parts that were running.
    """
    running = []
    mains = []
    for part in parts:
        record = load(layout, part)
        process = record.find() if record else None
        if process is not None:
            running.append(part)
            mains.append(process)
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGTERM)
    psutil.wait_procs(mains, timeout=grace)
    sweep(layout, identity, parts)
    for part in parts:
        record = load(layout, part)
        if record:
            _reap(record.pid)
        forget(layout, part)
    return running


def sweep(layout: layouts.Layout, identity: str, parts: Sequence[str]) -> None:
    """SIGKILL to every process of these parts; their records stay."""
    # Twice: a process may have forked while we looked at the table.
    for _ in range(2):
        rest = find_all(layout, identity, parts)
        for process in rest:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(rest, timeout=5)


def tail(path: Path, lines: int, *, offset: int = 0) -> list[str]:
    """The last lines of a text file, none of them from before `offset` (bytes)."""
    try:
        with path.open("rb") as stream:
            end = stream.seek(0, os.SEEK_END)
            stream.seek(max(offset, end - 256 * lines - 4096))
            text = stream.read().decode(errors="replace")
    except FileNotFoundError:
        return []
    return text.splitlines()[-lines:] if lines else []


def _record_path(layout: layouts.Layout, part: str) -> Path:
    return layout.run / f"{part}.json"


def _born(pid: int) -> str | None:
    """When a process was started, in a way that no setting of a clock changes; None where there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    ticks = stat.rpartition(")")[2].split()[19]  # the name before may hold blanks and brackets
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return f"{boot}/{ticks}"


def _reap(pid: int) -> None:
    """Collect a dead child of ours (when `up` and the look happen in one process, as in tests)."""
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)

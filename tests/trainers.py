"""The processes behind a FineTuneJob on the laptop cluster, found by what only they have in their environment."""

from __future__ import annotations

import re
import signal

import psutil

REPORTS_TO = re.compile(r"/namespaces/([^/]+)/finetunejobs/([^/]+)/attempts/(\d+)/status$")
Work = tuple[str, str, int]
"""Namespace, job and attempt."""


def work_of(process: psutil.Process) -> Work | None:
    """What a process works for; None: for no job, or it has just ended, or belongs to somebody else."""
    try:
        url = process.environ().get("KUBEFLOW_TRAINER_SERVER_URL", "")
    except psutil.Error:
        return None
    match = REPORTS_TO.search(url)
    return (match[1], match[2], int(match[3])) if match else None


def find(namespace: str, job: str) -> list[psutil.Process]:
    """The shell and the Python of the job's trainer."""
    return [p for p in psutil.process_iter() if (work_of(p) or ())[:2] == (namespace, job)]


def kill(namespace: str, job: str) -> None:
    """Kill both with SIGKILL: either alone would leave the other behind."""
    processes = find(namespace, job)
    assert processes, f"no trainer of {namespace}/{job} runs"
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=10)


def send(namespace: str, job: str, number: signal.Signals) -> None:
    """A signal to Python alone, as a kubelet or `finetune-trainer stop` sends it."""
    pythons = [p for p in find(namespace, job) if "python" in p.exe().rpartition("/")[2]]
    assert pythons, f"no trainer of {namespace}/{job} runs"
    for process in pythons:
        process.send_signal(number)

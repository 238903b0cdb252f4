"""Stopping exactly what was started, with real processes."""

from __future__ import annotations

import dataclasses
import graphlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from finetune_local import graphs, layouts, processes
from tests.waiting import wait_until


@pytest.fixture
def layout(tmp_path: Path) -> layouts.Layout:
    one = layouts.Layout(tmp_path / "state")
    one.create()
    return one


def start(layout: layouts.Layout, script: str, identity: str = "me") -> processes.Record:
    return processes.start(
        "part",
        ["/bin/sh", "-c", script],
        layout=layout,
        identity=identity,
        environment=dict(os.environ),
        fingerprint="f",
    )


def read_pid(path: Path) -> int:
    return int(wait_until(lambda: path.read_text().strip(), seconds=5, what=str(path)))


def is_alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_orphans_of_a_killed_parent_are_stopped_too(layout: layouts.Layout, tmp_path: Path) -> None:
    # One child stays in the session, another leaves it (as Ray's jobs do).
    leaver = f"setsid sh -c 'echo $$ > {tmp_path}/leaves; exec sleep 300'"
    script = f"sleep 300 & echo $! > {tmp_path}/stays; {leaver} & wait"
    record = start(layout, script)
    children = [read_pid(tmp_path / "stays"), read_pid(tmp_path / "leaves")]
    os.kill(record.pid, signal.SIGKILL)
    time.sleep(0.2)
    assert record.find() is None
    assert all(is_alive(pid) for pid in children)
    processes.stop(layout, "me", ["part"], grace=1)
    assert not any(is_alive(pid) for pid in children)


def test_a_child_that_wiped_its_environment_is_found_by_its_session(
    layout: layouts.Layout, tmp_path: Path
) -> None:
    record = start(layout, f"env -i /bin/sh -c 'echo $$ > {tmp_path}/pid; exec sleep 300' & wait")
    child = read_pid(tmp_path / "pid")
    os.kill(record.pid, signal.SIGKILL)
    processes.stop(layout, "me", ["part"], grace=1)
    assert not is_alive(child)


def test_a_system_clock_that_is_set_changes_nothing(
    layout: layouts.Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = start(layout, "exec sleep 300")
    boot = psutil.boot_time()
    # As Linux does it: the boot is said to have been as much later as the clock was put on.
    monkeypatch.setattr("psutil._pslinux.boot_time", lambda: boot + 3600)
    assert record.find() is not None
    assert record.owns_session()
    assert 0 <= record.uptime() < 60
    assert processes.stop(layout, "me", ["part"], grace=5) == ["part"]


def test_a_stranger_with_the_recorded_pid_is_left_alone(layout: layouts.Layout) -> None:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"]) as stranger:
        record = processes.Record(
            "part", stranger.pid, born="an-earlier-boot/7", fingerprint="f", log_offset=0
        )
        (layout.run / "part.json").write_text(json.dumps(dataclasses.asdict(record)))
        assert record.find() is None
        assert processes.stop(layout, "me", ["part"], grace=1) == []
        assert stranger.poll() is None
        stranger.kill()


def test_another_clusters_part_of_the_same_name_is_left_alone(layout: layouts.Layout, tmp_path: Path) -> None:
    other = layouts.Layout(tmp_path / "other")
    other.create()
    theirs = start(other, "exec sleep 300", identity="them")
    ours = start(layout, "exec sleep 300")
    assert processes.stop(layout, "me", ["part"], grace=2) == ["part"]
    assert ours.find() is None
    assert theirs.find() is not None
    processes.stop(other, "them", ["part"], grace=2)
    assert theirs.find() is None


def test_a_process_that_ignores_sigterm_is_killed(layout: layouts.Layout, tmp_path: Path) -> None:
    record = start(layout, f"trap '' TERM; echo $$ > {tmp_path}/pid; while true; do sleep 0.1; done")
    read_pid(tmp_path / "pid")
    processes.stop(layout, "me", ["part"], grace=0.5)
    assert not is_alive(record.pid)


def test_output_goes_to_a_private_log_and_its_tail_starts_at_this_run(layout: layouts.Layout) -> None:
    for text in ("first", "second"):
        record = start(layout, f"echo {text}")
        for _ in range(100):
            if record.find() is None:
                break
            time.sleep(0.05)
    log = layout.log("part")
    assert log.stat().st_mode & 0o077 == 0
    assert processes.tail(log, 10) == ["first", "second"]
    assert processes.tail(log, 10, offset=record.log_offset) == ["second"]
    assert processes.tail(log, 1) == ["second"]
    assert processes.tail(layout.log("never"), 5) == []


def test_tasks_run_after_what_they_need() -> None:
    order: list[str] = []
    task = graphs.Task
    graphs.run_all(
        [
            task("c", ("a", "b"), lambda stop: order.append("c")),
            task("b", ("a",), lambda stop: order.append("b")),
            task("a", ("outside",), lambda stop: order.append("a")),
        ]
    )
    assert order == ["a", "b", "c"]


def test_a_failing_task_stops_those_that_wait_and_is_raised() -> None:
    ran: list[str] = []

    def fail(stop: object) -> None:
        raise RuntimeError("no port")

    tasks = [graphs.Task("a", (), fail), graphs.Task("b", ("a",), lambda stop: ran.append("b"))]
    with pytest.raises(RuntimeError, match="no port"):
        graphs.run_all(tasks)
    assert ran == []


def test_circles_are_refused() -> None:
    tasks = [graphs.Task("a", ("b",), lambda stop: None), graphs.Task("b", ("a",), lambda stop: None)]
    with pytest.raises(graphlib.CycleError, match=r"cycle.*'a', 'b'"):
        graphs.run_all(tasks)

"""Running named tasks in threads, each as soon as those that it needs are done."""

from __future__ import annotations

import dataclasses
import graphlib
import threading
from collections.abc import Callable, Sequence


@dataclasses.dataclass(frozen=True)
class Task:
    """`run` gets an event that is set once another task has failed: long waits should then end."""

    name: str
    needs: tuple[str, ...]
    run: Callable[[threading.Event], None]


def run_all(tasks: Sequence[Task]) -> None:
    """Run every task; raise the first failure after all threads came to rest.

    A need that is not among the tasks counts as done. Raises graphlib.CycleError.
    """
    names = {task.name for task in tasks}
    graphlib.TopologicalSorter({task.name: task.needs for task in tasks}).prepare()
    done = {name: threading.Event() for name in names}
    stop = threading.Event()
    failures: list[BaseException] = []

    def work(task: Task) -> None:
        for need in task.needs:
            while need in done and not done[need].wait(timeout=0.1):
                if stop.is_set():
                    return
        if stop.is_set():
            return
        try:
            task.run(stop)
        except BaseException as error:  # handed to the caller's thread, which raises it
            failures.append(error)
            stop.set()
        else:
            done[task.name].set()

    threads = [threading.Thread(target=work, args=(task,), name=task.name, daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:
        stop.set()
    if failures:
        raise failures[0]

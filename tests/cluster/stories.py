"""Stories of one job each. Those that leave the rest of the cluster alone are played together: most is waiting."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import pytest

from tests.clients import Json, Kubectl
from tests.cluster.objects import (
    CPU,
    JOB_SECONDS,
    LONG,
    NOWHERE,
    Settings,
    delete,
    head_pod,
    job,
    run_in_head,
)
from tests.cluster.watching import Watcher

INTERVAL = 20  # steps between two checkpoints


@dataclass(frozen=True)
class Stage:
    """What a story needs."""

    team: Kubectl
    settings: Settings
    watcher: Watcher

    def runs_once(self, name: str, attempts: int) -> None:
        """Each of the attempts was started once, where its processes can be seen."""
        if self.settings.kubelet is not None:
            seen = [self.watcher.trainers(name, number + 1) for number in range(attempts)]
            assert seen == [1] * attempts, f"trainers of each attempt: {seen}"


Story = Callable[[Stage], None]
Told = Mapping[Story, Future[None]]


@contextlib.contextmanager
def together(request: pytest.FixtureRequest, stage: Stage, *, at_once: int) -> Iterator[Told]:
    """Play the stories that tests of the module were selected for, a few at a time. A future tells how one ended."""
    params = [
        item.callspec.params
        for item in request.session.items
        if item.path == request.path and hasattr(item, "callspec")
    ]
    with ThreadPoolExecutor(at_once) as pool:
        yield {one["story"]: pool.submit(one["story"], stage) for one in params if "story" in one}


def ended(status: Json, phase: str) -> None:
    assert status["phase"] == phase, json.dumps(status, indent=1)


# ---------------------------------------------------------------- in both modes


def kill_head(stage: Stage, name: str) -> None:
    """The head pod is killed without its grace period."""
    takes_steps(stage, name)
    pod = head_pod(stage.team, name)["metadata"]["name"]
    stage.team("delete", "pod", pod, "--grace-period=0", "--force", "--wait=false")
    costs_one_interval(stage, name)


def kill_trainer(stage: Stage, name: str) -> None:
    """The trainer is killed; its pod and Ray live on."""
    takes_steps(stage, name)
    send(stage, name, signal.SIGKILL, "finetune-trainer")
    costs_one_interval(stage, name)


def send(stage: Stage, name: str, number: signal.Signals, word: str) -> None:
    """Send a signal to the processes in the job's head pod that have this word at the beginning of their command."""
    script = SEND.format(word=word.encode(), number=int(number))
    assert "sent" in run_in_head(stage.team, name, script), f"no {word} runs in the head pod of {name}"


SEND = """
import os

for number in filter(str.isdigit, os.listdir("/proc")):
    with open(f"/proc/{{number}}/cmdline", "rb") as file:
        words = file.read().split(b"\\0")
    if any(word.endswith({word!r}) for word in words[:3]):
        os.kill(int(number), {number})
        print("sent to", number)
"""


def takes_steps(stage: Stage, name: str) -> None:
    """A job has its first checkpoint, and more to do than fits into a minute."""
    checkpoint = {"uri": f"pvc://files/checkpoints/{name}", "everySteps": INTERVAL}
    stage.team.apply(job(name, hyperparameters={**LONG, "maxSteps": 300}, checkpoint=checkpoint))
    stage.team.wait_job(name, lambda s: s.get("progress", {}).get("step", 0) > INTERVAL, seconds=JOB_SECONDS)


def costs_one_interval(stage: Stage, name: str) -> None:
    """The next attempt goes on from the newest checkpoint, to the end."""
    status = stage.team.finished(name, seconds=2 * JOB_SECONDS)
    ended(status, "Succeeded")
    assert len(status["attempts"]) == 2
    assert status["attempts"][0]["lostSteps"] <= INTERVAL
    assert status["attempts"][1]["resumedFromStep"] >= INTERVAL
    stage.runs_once(name, 2)
    delete(stage.team, name)


def fail_at_once(stage: Stage, name: str) -> None:
    """The image has no trainer, so the shell ends within milliseconds, twice. The status says so of each attempt.

    Only once a RayCluster is ready does KubeRay tell the shell's exit code: in SidecarMode it may be the submitter's.
    """
    if stage.settings.ray_image is None:
        pytest.skip("needs an image with Ray and without our trainer: FINETUNE_E2E_RAY_IMAGE")
    resources = {"image": stage.settings.ray_image, "cpu": CPU, "memory": "2Gi"}
    retry = {"maxInfraRetries": 1, "backoffSeconds": {"min": 1, "max": 1}}
    stage.team.apply(job(name, resources=resources, retry=retry))
    status = stage.team.finished(name, seconds=JOB_SECONDS)
    ended(status, "Failed")
    first, second = status["attempts"]
    assert [one["class"] for one in (first, second)] == ["Internal", "Internal"]
    assert {one["exitCode"] for one in (first, second)} <= {127, 1}
    assert f"{name}-a1" not in second["message"], "it is judged by its own pod"
    delete(stage.team, name)


def fail_soon(stage: Stage, name: str) -> None:
    """The trainer finds no data before it has imported anything: bad data, and no second try.

    It lives for a quarter of a second and may not be seen; a second one would be told by the watcher.
    """
    stage.team.apply(job(name, dataset=NOWHERE))
    status = stage.team.finished(name, seconds=JOB_SECONDS)
    ended(status, "Failed")
    assert status["reason"] == "BadData"
    assert len(status["attempts"]) == 1
    delete(stage.team, name)

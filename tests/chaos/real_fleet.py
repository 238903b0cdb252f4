"""A fleet with real trainers."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any, ClassVar

from tests import trainers
from tests.chaos.fleets import LocalFleet, choose
from tests.clients import Json, finetunejob

INTERVAL = 25  # steps between checkpoints


class RealFleet(LocalFleet):
    """Real KubeRay, Ray and trainers of the tiny model."""

    WEIGHTS: ClassVar[dict[str, float]] = {
        "trainer killed": 5, "trainer terminated": 5, "suspend": 2, "resume": 4, "cancel": 0.3, "job deleted": 0.3,
        "job replaced": 0.5,
        "rayjob deleted": 2, "rayjob held": 1, "rayjob released": 3, "raycluster deleted": 2, "pod deleted": 2,
        "operator killed": 2, "operator stands still": 1, "kuberay killed": 1, "gateway killed": 1,
        "apiserver killed": 0.5,
    }  # fmt: skip

    def __init__(self, *args: Any, model: Path, data: Path, steps: int, **more: Any) -> None:
        super().__init__(*args, **more)
        self.model, self.data, self.steps = model, data, steps

    def body(self, name: str) -> Json:
        hyper = {"maxSteps": self.steps, "globalBatchSize": 8, "maxLength": 64, "learningRate": 0.001}
        saved = {"everySteps": INTERVAL}
        return finetunejob(
            name, self.model, self.data, hyperparameters=hyper, checkpoint=saved, retry=self.retry(name)
        )

    def trainer_killed(self, pick: float) -> str:
        name = choose(self._at_work(), pick)
        trainers.kill(self.kubectl.namespace, name)
        return name

    def trainer_terminated(self, pick: float) -> str:
        name = choose(self._at_work(), pick)
        trainers.send(self.kubectl.namespace, name, signal.SIGTERM)
        return name

    def raycluster_deleted(self, pick: float) -> str:
        name = choose(self._names_of("raycluster"), pick)
        self.kubectl("delete", "raycluster", name, "--wait=false")
        return name

    def pod_deleted(self, pick: float) -> str:
        name = choose(self._names_of("pod"), pick)
        self.kubectl("delete", "pod", name, "--wait=false")
        return name

    def kuberay_killed(self, pick: float) -> str:
        return self._kill("kuberay")

    def gateway_killed(self, pick: float) -> str:
        return self._kill("ray-gateway")

    def _at_work(self) -> list[str]:
        return [name for name in self.names if trainers.find(self.kubectl.namespace, name)]

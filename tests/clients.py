"""kubectl for tests, and what they ask of FineTuneJobs. What a user types is what is tested."""

from __future__ import annotations

import functools
import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_local import binaries

Json = dict[str, Any]
FINAL = ("Succeeded", "Failed", "Cancelled")


class KubectlError(Exception):
    """kubectl refused; the text is its standard error."""


class Kubectl:
    """Runs kubectl against one cluster in one namespace."""

    def __init__(self, kubeconfig: Path, namespace: str) -> None:
        self.kubeconfig = kubeconfig
        self.namespace = namespace

    def __call__(self, *arguments: str, body: Json | None = None) -> str:
        done = subprocess.run(
            [
                kubectl_program(),
                f"--kubeconfig={self.kubeconfig}",
                f"--namespace={self.namespace}",
                *arguments,
            ],
            input=json.dumps(body) if body is not None else None,
            capture_output=True,
            text=True,
            timeout=150,
            check=False,
        )
        if done.returncode != 0:
            raise KubectlError(done.stderr.strip())
        return done.stdout

    def apply(self, body: Json) -> None:
        self("apply", "-f", "-", body=body)

    def get(self, kind: str, name: str) -> Json | None:
        try:
            found: Json = json.loads(self("get", kind, name, "-o", "json"))
        except KubectlError as error:
            if "NotFound" in str(error):
                return None
            raise
        return found

    def items(self, kind: str, *arguments: str) -> list[Json]:
        return list(json.loads(self("get", kind, "-o", "json", *arguments))["items"])

    def job(self, name: str) -> Json:
        found = self.get("ftj", name)
        assert found is not None, f"no FineTuneJob {name}"
        return found

    def wait_job(self, name: str, until: Callable[[Json], bool], *, seconds: float = 180) -> Json:
        """The job as soon as its status satisfies `until`; fails with the last status when that takes too long."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                job = self.job(name)
            except KubectlError:  # the API server is being restarted
                job = {}
            if until(job.get("status", {})):
                return job
            assert time.monotonic() < deadline, f"{name}: {json.dumps(job.get('status'), indent=1)}"
            time.sleep(0.3)

    def finished(self, name: str, *, seconds: float = 180) -> Json:
        """The status of the job when it has ended."""
        status: Json = self.wait_job(name, lambda s: s.get("phase") in FINAL, seconds=seconds)["status"]
        return status

    def events(self, name: str) -> list[Json]:
        return [e for e in self.items("events") if e["involvedObject"]["name"] == name]


@functools.cache
def kubectl_program() -> str:
    def quiet(line: str) -> None:
        del line

    return str(binaries.find_kubectl(binaries.Sources.from_environment(), announce=quiet, detail=quiet))


def finetunejob(name: str, model: Path, data: Path | str, /, **spec: Any) -> Json:
    """A FineTuneJob that trains the tiny model for a few steps; `spec` replaces or adds fields."""
    uri = data if isinstance(data, str) else f"file://{data}"
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "FineTuneJob",
        "metadata": {"name": name},
        "spec": {
            "model": {"uri": f"file://{model}"},
            "method": {"type": "LoRA", "lora": {"r": 8, "alpha": 16}},
            "dataset": {"sources": [{"uri": uri}]},
            "hyperparameters": {"maxSteps": 6, "globalBatchSize": 8, "maxLength": 64, "learningRate": 0.01},
            "resources": {"cpu": "200m", "memory": "1Gi"},
            **spec,
        },
    }

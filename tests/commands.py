"""The command line as a user starts it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import IO

from tests.clients import Kubectl

OPERATOR = Path(__file__).parents[1] / "operator"


class Command:
    """Runs `finetune <group> ...` in the test's namespace."""

    def __init__(self, group: str, kubectl: Kubectl) -> None:
        self.group = group
        self.kubectl = kubectl
        self.environment = {
            **{name: value for name, value in os.environ.items() if name != "FORCE_COLOR"},
            "KUBECONFIG": str(kubectl.kubeconfig),
            "PYTHONPATH": str(OPERATOR),
            "COLUMNS": "200",
        }

    def start(self, *arguments: str, stdout: int | IO[str] = subprocess.PIPE) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "finetune_cli", self.group, *arguments, "-n", self.kubectl.namespace],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *arguments: str, text: str = "", code: int = 0) -> str:
        """Standard output and error, after checking the exit code."""
        process = self.start(*arguments)
        out, err = process.communicate(text, timeout=60)
        assert process.returncode == code, out + err
        return out + err
